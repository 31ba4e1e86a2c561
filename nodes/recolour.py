"""Recolourings of a picture, from which a LoRA learns structure alone."""

import comfy.model_management
import torch
from comfy_api.latest import io

from ..consislora_core.recolour import recolour
from ..host.model_inputs import check_pictures
from .sockets import CATEGORY, aliases
from .widget_values import checked

PICTURE_BYTES = 2 * 12  # of memory that a pixel takes: in fp32, and a second time while they become one batch


class Recolour(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRARecolour",
            display_name="Recolour",
            category=CATEGORY,
            **aliases("colour jitter", "color augmentation", "hue", "structure only"),
            description="Gives a picture and the same picture in other colours, for Train ConsisLoRA (image): it "
            "learns the structure from them and no colours, so that the style image alone decides these.",
            inputs=[
                io.Image.Input("image", tooltip="A content image or a style image; of several, each is recoloured."),
                io.Int.Input(
                    "recolourings",
                    default=24,
                    min=1,
                    max=256,
                    tooltip="How many; training draws one of them, or the picture itself, in each step.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="The same seed gives the same colours.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="The picture, then its recolourings; VAE Encode takes them all."
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, image, recolourings, seed) -> io.NodeOutput:
        check_pictures(image, "image")
        check_memory(image, recolourings)
        generator = torch.Generator().manual_seed(seed)
        pictures = [picture[..., :3].expand(-1, -1, 3).float().cpu().clamp(0, 1) for picture in image]
        return io.NodeOutput(
            torch.cat([torch.cat([picture[None], recolour(picture, recolourings, generator)]) for picture in pictures])
        )


def check_memory(image: torch.Tensor, recolourings: int) -> None:
    """Raises ValueError if the computer has less memory free than the recolourings of these pictures (b h w c) take."""
    count, height, width = image.shape[:3]
    pictures = count * (recolourings + 1)
    gigabytes = PICTURE_BYTES * pictures * height * width / 1e9
    free = comfy.model_management.get_free_memory(torch.device("cpu")) / 1e9
    if gigabytes > free:
        raise ValueError(
            f"{pictures} pictures of {width} x {height} pixels take {gigabytes:.1f} GB of memory, and {free:.1f} GB "
            "are free. Lower recolourings, or scale image down first, to about 1024 x 1024 pixels."
        )
