"""Score pictures for content, style and leakage, and split them by their scores."""

import json
from numbers import Real
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker
from einops import rearrange
from torch import Tensor

from ..consislora_core.metrics import Scores, feature_scores, misses, structure_scores
from ..host import drawing
from ..host.model_inputs import check_pictures
from .sockets import CATEGORY, PictureScores, aliases
from .widget_values import checked

LEAST_SIDE = 8  # pixels: outlines are compared at a fourth of the size, where less leaves no outline

# Gate's bounds: by input, the score, and the value at which every picture passes.
LEAST = {"min_content": ("content", -1.0), "min_style": ("style", -1.0)}
LEAST |= {"min_edges": ("edges", 0.0), "min_silhouette": ("silhouette", 0.0)}
MOST = {"max_leakage": ("leakage", 1.0)}


class Evaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRAEvaluate",
            display_name="Evaluate",
            category=CATEGORY,
            **aliases("clip score", "dino score", "image similarity"),
            description="Scores pictures: is it the content image's subject, in the style image's style?",
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to score."),
                io.Image.Input(
                    "content_image",
                    tooltip="The subject as it should be; shapes are compared with the first picture of a batch.",
                ),
                io.Image.Input(
                    "style_image", tooltip="The style as it should be; may be a batch of pictures in one style."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP or DINOv2, from Load CLIP Vision, for the content, style and leakage scores. "
                    "Without it only shapes are compared.",
                ),
            ],
            outputs=[
                PictureScores.Output(display_name="scores", tooltip="For Accept or Reject."),
                io.Image.Output(display_name="card", tooltip="For every picture a card with its scores."),
                io.String.Output(
                    display_name="report", tooltip="The scores as JSON: of every picture, and their mean."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    @checked
    def execute(cls, images, content_image, style_image, clip_vision=None) -> io.NodeOutput:
        for name, batch in {"images": images, "content_image": content_image, "style_image": style_image}.items():
            check_pictures(batch, name, least_side=LEAST_SIDE)
        scores = score_pictures(images, content_image, style_image, clip_vision)
        sources = {"content": drawing.to_picture(content_image[0]), "style": drawing.to_picture(style_image[0])}
        cards = drawing.stack_pictures(
            [
                drawing.draw_card({**sources, "picture": drawing.to_picture(image)}, score)
                for image, score in zip(images, scores, strict=True)
            ]
        )
        return io.NodeOutput(scores, cards, report_text(scores), ui=ui.PreviewImage(cards, cls=cls))


def score_pictures(images: Tensor, content_image: Tensor, style_image: Tensor, clip_vision: Any = None) -> Scores:
    """The scores of pictures (b h w c) beside both images (n h w c); those by features only with a CLIP_VISION."""
    pictures = to_channels_first(images)
    height, width = pictures.shape[-2:]
    content = comfy.utils.common_upscale(to_channels_first(content_image[:1]), width, height, "area", "center")
    found = structure_scores(pictures, content)
    if clip_vision is not None:
        batches = (images, content_image, style_image)
        features = [clip_vision.encode_image(batch)["image_embeds"].float().cpu() for batch in batches]
        found = feature_scores(*features) | found
    return [dict(zip(found, values, strict=True)) for values in torch.stack(list(found.values()), 1).tolist()]


def to_channels_first(images: Tensor) -> Tensor:
    """Pictures (b h w, 1, 3 or 4) as b 3 h w in fp32 on the CPU, grey ones in colour and without alpha."""
    return rearrange(images[..., :3], "b h w c -> b c h w").expand(-1, 3, -1, -1).float().cpu()


def report_text(scores: Scores) -> str:
    """The scores as JSON: their mean, and those of each picture."""
    mean = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    rounded = [{name: round(value, 4) for name, value in score.items()} for score in (mean, *scores)]
    return json.dumps({"mean": rounded[0], "pictures": rounded[1:]}, indent=1)


class Gate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        cosine, share = dict(min=-1.0, max=1.0, step=0.01), dict(min=0.0, max=1.0, step=0.01)
        return io.Schema(
            node_id="ConsisLoRAGate",
            display_name="Accept or Reject",
            category=CATEGORY,
            **aliases("filter images", "threshold", "quality gate"),
            description="Splits pictures by their scores. Nodes connected to a side without pictures do not run.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures that were scored."),
                PictureScores.Input("scores", tooltip="From Evaluate."),
                io.Float.Input("min_content", default=-1.0, tooltip="Least content score; -1 accepts all.", **cosine),
                io.Float.Input("min_style", default=-1.0, tooltip="Least style score; -1 accepts all.", **cosine),
                io.Float.Input("max_leakage", default=1.0, tooltip="Most leakage; 1 accepts all.", **cosine),
                io.Float.Input("min_edges", default=0.0, tooltip="Least overlap of edges; 0 accepts all.", **share),
                io.Float.Input(
                    "min_silhouette", default=0.0, tooltip="Least overlap of silhouettes; 0 accepts all.", **share
                ),
            ],
            outputs=[
                io.Image.Output(display_name="accepted", tooltip="The pictures that keep every bound."),
                io.Image.Output(display_name="rejected", tooltip="The pictures that miss a bound."),
                io.String.Output(
                    display_name="reasons", tooltip="For every picture whether it is accepted, or why not."
                ),
            ],
        )

    @classmethod
    @checked
    def execute(cls, images, scores, **bounds) -> io.NodeOutput:
        reasons = missed_bounds(len(images), scores, bounds)
        for image, missed in zip(images, reasons, strict=True):
            if not image.isfinite().all():
                missed.append("the picture holds values that are not numbers")
        sides = [[not missed for missed in reasons], [bool(missed) for missed in reasons]]
        # Nodes fail on an empty batch, so those downstream of an empty side are blocked.
        accepted, rejected = (images[side] if any(side) else ExecutionBlocker(None) for side in sides)
        lines = [f"{i}: {'; '.join(missed) or 'accepted'}" for i, missed in enumerate(reasons, 1)]
        return io.NodeOutput(accepted, rejected, "\n".join(lines))


def missed_bounds(count: int, scores: Scores, bounds: dict[str, float]) -> list[list[str]]:
    """For each of `count` pictures which bounds it misses. Raises ValueError for scores that do not fit."""
    if not scores or not all(
        isinstance(score, dict) and all(isinstance(value, Real) for value in score.values()) for score in scores
    ):
        raise ValueError("scores are not what Evaluate gives: numbers for each picture. Connect Evaluate.")
    if count != len(scores):
        raise ValueError(
            f"images holds {count} pictures, but scores are for {len(scores)}. "
            "Connect the same pictures to Evaluate and to Accept or Reject."
        )
    least, most = (
        {score: bounds[name] for name, (score, passes_all) in table.items() if bounds[name] != passes_all}
        for table in (LEAST, MOST)
    )
    unscored = (least.keys() | most.keys()) - scores[0].keys()
    if missing := {name: passes_all for name, (score, passes_all) in (LEAST | MOST).items() if score in unscored}:
        accepting = ", ".join(f"{name} to {value:g}" for name, value in missing.items())
        raise ValueError(
            f"{' and '.join(missing)} cannot be checked: Evaluate gave no such score. Connect clip_vision to Evaluate, "
            f"or set {accepting}, which accepts all."
        )
    return [misses(score, least, most) for score in scores]
