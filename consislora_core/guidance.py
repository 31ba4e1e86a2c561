"""The rows of a guided step, which of them share an encoder pass, and their sum."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lora_file import ImageLora, Part, Source

CONTENT, STYLE = Source("content", "content"), Source("style", "style")  # what is wanted of each image
STYLES_CONTENT, CONTENTS_STYLE = Source("content", "style"), Source("style", "content")  # what is not

Mix = Mapping[Source, float]  # the strength of every part that acts


class Row(NamedTuple):
    """One denoiser pass of a guided step: the prompt it reads and the parts that act in it."""

    prompt: str
    mix: Mix


# Each scale's pair of rows, toward and away (ConsisLoRA section 4.4, inference guidance).
GUIDANCE = {
    "content": (Row("content_positive", {CONTENT: 1.0}), Row("content_negative", {STYLES_CONTENT: 1.0})),
    "style": (Row("style_positive", {STYLE: 1.0}), Row("style_negative", {CONTENTS_STYLE: 1.0})),
}


def parts_of(content: ImageLora | None, style: ImageLora | None) -> dict[Source, Part]:
    """All parts of two images' LoRAs. Raises ValueError if one lacks the part that is wanted of it."""
    images = {image: lora for image, lora in (("content", content), ("style", style)) if lora is not None}
    for image, lora in images.items():
        lora.part(image)
    return {Source(role, image): part for image, lora in images.items() for role, part in lora.parts.items()}


def wanted(content_strength: float, style_strength: float) -> Mix:
    """The mix of the two rows of classifier-free guidance."""
    return {part: s for part, s in ((CONTENT, content_strength), (STYLE, style_strength)) if s != 0}


def guidance_rows(scales: Mapping[str, float]) -> list[Row]:
    """The rows that the scales (by role) add to a step. A scale of 0 adds none."""
    return [row for role, rows in GUIDANCE.items() if scales[role] != 0 for row in rows]


def guidance(predictions: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """g_c (D[content +] - D[content -]) + g_s (D[style +] - D[style -]), predictions (b c h w) by prompt.

    Its rows' weights add up to 0, so that it is added to classifier-free guidance alike in noise and in x0.
    """
    return sum(
        scales[role] * (predictions[toward.prompt] - predictions[away.prompt])
        for role, (toward, away) in GUIDANCE.items()
        if scales[role] != 0
    )


def first_equals(rows: Sequence[Sequence[Tensor]]) -> list[int]:
    """For every row, given as the inputs of its pass, the first row with the same: they share an encoder pass."""
    firsts: list[int] = []
    for i, row in enumerate(rows):
        firsts.append(next((j for j in sorted(set(firsts)) if all(map(torch.equal, row, rows[j]))), i))
    return firsts
