"""Keep Colours and Match Palette: one picture in the colours of another."""

import torch
from comfy_api.latest import io

from ..consislora_core.colours import keep_colours as with_colours
from ..consislora_core.colours import match_palette
from ..host.masks import picture_masks
from ..host.model_inputs import check_pictures
from .sockets import CATEGORY, aliases
from .widget_values import checked


class KeepColours(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRAKeepColours",
            display_name="Keep Colours",
            category=CATEGORY,
            **aliases("color transfer", "colour match", "preserve colors", "hue", "product colours"),
            description="Gives results the colours of their content image. Lightness, lines and texture stay the "
            "style's, and white and black stay white and black.",
            inputs=[
                io.Image.Input("images", tooltip="The result, or several of one content image."),
                io.Image.Input(
                    "content_image",
                    tooltip="Whose colours they get, in any size: one for all, or one for each of the results.",
                ),
                io.Float.Input(
                    "keep_colours",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0: the style's colours, the result unchanged. 1: the content image's. 0.75 takes about "
                    "half of the difference away, for little style.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="1 where colours may change, 0 where not. Without it, inside the content image's "
                    "silhouette: on an even background, the subject.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The results in these colours.")],
        )

    @classmethod
    @checked
    def execute(cls, images, content_image, keep_colours, mask=None) -> io.NodeOutput:
        check_both(images, content_image=content_image)
        if mask is not None:
            mask = picture_masks(mask, len(images), "images", images.shape[1:3], "no colour would change")[:, 0].cpu()
        if keep_colours == 0:
            return io.NodeOutput(images)
        moved = with_colours(in_colour(images), in_colour(content_image), keep_colours, mask)
        return io.NodeOutput(torch.cat([moved, images[..., 3:].cpu()], -1))


class MatchPalette(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRAMatchPalette",
            display_name="Match Palette",
            category=CATEGORY,
            **aliases("color transfer", "color match", "colour match", "reinhard", "palette swap"),
            description="Gives a content image the style image's palette. Encoded, it is where structure_lock begins: "
            "outlines stay the product's, and its colours do not hold the style back.",
            inputs=[
                io.Image.Input("images", tooltip="A content image, or several."),
                io.Image.Input(
                    "style_image", tooltip="Whose palette they get, in any size: one for all, or one for each."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="1: all of the style image's palette. 0: the colours stay.",
                ),
                io.Boolean.Input(
                    "together",
                    default=False,
                    optional=True,
                    tooltip="For the frames of a film: all are recoloured alike, so that no colour changes from one to "
                    "the next. Off: each image by itself.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="For VAE Encode, and then latent_image of the sampler.")
            ],
        )

    @classmethod
    @checked
    def execute(cls, images, style_image, strength, together=False) -> io.NodeOutput:
        check_both(images, style_image=style_image)
        matched = match_palette(in_colour(images), in_colour(style_image), strength, together)
        return io.NodeOutput(torch.cat([matched, images[..., 3:].cpu()], -1))


def check_both(images: torch.Tensor, **others: torch.Tensor) -> None:
    for name, batch in {"images": images, **others}.items():
        check_pictures(batch, name)


def in_colour(images: torch.Tensor) -> torch.Tensor:
    """Pictures b h w 3 without their alpha, grey ones too with three channels; on the CPU, which has all operators."""
    return images[..., :3].expand(-1, -1, -1, 3).cpu()
