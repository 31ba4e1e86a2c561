"""Keep Outside Mask: the result where a mask says so, around it the original's background or none."""

from comfy_api.latest import io

from ..host.masks import keep_outside
from .sockets import CATEGORY, aliases
from .widget_values import checked

ORIGINAL, TRANSPARENT = "original", "transparent"


class KeepOutsideMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRAKeepOutsideMask",
            display_name="Keep Outside Mask",
            category=CATEGORY,
            **aliases("composite", "alpha", "cut out", "background", "feather"),
            description="Puts a result into its original: inside the mask is the result, outside the original's own "
            "background, or nothing.",
            inputs=[
                io.Image.Input("images", tooltip="The result, or several of one original."),
                io.Image.Input("original", tooltip="What the result was made from. The result gets its size."),
                io.Mask.Input(
                    "mask",
                    tooltip="1 where the result is to show, as Load Catalogue and Remove Background give it. Load "
                    "Image gives it the other way round: put Invert Mask behind it.",
                ),
                io.Combo.Input(
                    "outside",
                    options=[ORIGINAL, TRANSPARENT],
                    default=ORIGINAL,
                    tooltip="original: the original's background, to the pixel. transparent: the mask becomes the "
                    "result's alpha.",
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Pixels of the original over which the edge becomes soft, inwards from the mask's edge. 0: "
                    "the edge as it is in the mask.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The pictures, in the original's size."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, images, original, mask, outside, feather) -> io.NodeOutput:
        return io.NodeOutput(keep_outside(images, original, mask, feather, outside == TRANSPARENT))
