"""Keep Colours: a result in the colours of its content image, as much as a strength says."""

import torch
from comfy_api.latest import io

from ..consislora_core.colours import keep_colours as with_colours
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
        for name, batch in {"images": images, "content_image": content_image}.items():
            check_pictures(batch, name)
        if mask is not None:
            mask = picture_masks(mask, len(images), "images", images.shape[1:3], "no colour would change")[:, 0]
        if keep_colours == 0:
            return io.NodeOutput(images)
        colours, alpha = images[..., :3].expand(-1, -1, -1, 3), images[..., 3:]
        moved = with_colours(colours, content_image[..., :3].expand(-1, -1, -1, 3), keep_colours, mask)
        return io.NodeOutput(torch.cat([moved, alpha], -1))
