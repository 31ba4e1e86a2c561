"""The rows of a guided step, which of them share an encoder pass, and their sum."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .lora_file import ImageLora, Part, Source

CONTENT, STYLE = Source("content", "content"), Source("style", "style")  # the wanted part of each image
STYLES_CONTENT, CONTENTS_STYLE = Source("content", "style"), Source("style", "content")  # the unwanted parts

Mix = Mapping[Source, float]  # the strength of every part that acts in a row


class Row(NamedTuple):
    """One row of a guided step's batch: the name of its prompt and the parts that act in it."""

    prompt: str
    mix: Mix


# Each scale's pair of rows, toward and away (ConsisLoRA section 4.4, inference guidance).
GUIDANCE = {
    "content": (Row("content_positive", {CONTENT: 1.0}), Row("content_negative", {STYLES_CONTENT: 1.0})),
    "style": (Row("style_positive", {STYLE: 1.0}), Row("style_negative", {CONTENTS_STYLE: 1.0})),
}


def parts_of(content: ImageLora | None, style: ImageLora | None) -> dict[Source, Part]:
    """All parts of a content image's and a style image's LoRA. Raises ValueError if one lacks the part wanted of it."""
    images = {image: lora for image, lora in (("content", content), ("style", style)) if lora is not None}
    for image, lora in images.items():
        lora.part(image)
    return {Source(role, image): part for image, lora in images.items() for role, part in lora.parts.items()}


def wanted_mix(content_strength: float, style_strength: float) -> Mix:
    """The mix of the two rows of classifier-free guidance; a strength of 0 leaves a part out."""
    return {part: s for part, s in ((CONTENT, content_strength), (STYLE, style_strength)) if s != 0}


def guidance_rows(scales: Mapping[str, float]) -> list[Row]:
    """The rows that guidance at these scales (by role) adds to a step; a scale of 0 adds none."""
    return [row for role, rows in GUIDANCE.items() if scales[role] != 0 for row in rows]


def guidance(predictions: Mapping[str, Tensor], scales: Mapping[str, float]) -> Tensor:
    """g_c (D[content +] - D[content -]) + g_s (D[style +] - D[style -]) (arXiv 2503.10614, section 4.4).

    predictions: b c h w, by prompt. The weights of its rows add up to 0, so it is the same in noise and in x0.
    """
    return sum(
        scales[role] * (predictions[toward.prompt] - predictions[away.prompt])
        for role, (toward, away) in GUIDANCE.items()
        if scales[role] != 0
    )


def first_equals(rows: Sequence[Sequence[Tensor]]) -> list[int]:
    """For every row, given as its inputs, the index of the first row with equal inputs: they share an encoder pass."""
    firsts: list[int] = []
    for i, row in enumerate(rows):
        firsts.append(next((j for j in sorted(set(firsts)) if all(map(torch.equal, row, rows[j]))), i))
    return firsts
