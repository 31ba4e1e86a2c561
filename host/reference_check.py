"""Looks at the pictures that a training is about to learn, and says in words what is wrong with them."""

import logging
import math
from pathlib import Path
from typing import Any

import folder_paths
from PIL import Image, ImageOps

from ..consislora_core.files import escape_text
from ..consislora_core.image_faults import find_faults
from .drawing import to_image
from .progress import show_text
from .prompt_graph import widget_values_behind
from .training_key import TrainingRequest

LOADERS = "LoadImage", "LoadImageOutput"
# Nodes behind which a picture is still as it was loaded, but for its size and colours. Behind others, such as an
# upscaler, the file no longer says what is learned.
FAITHFUL = (
    "VAEEncode", "VAEEncodeTiled", "ImageScale", "ImageScaleBy", "ImageScaleToMaxDimension", "ImageScaleToTotalPixels",
    "ResizeImageMaskNode", "ImageBatch", "BatchImagesNode", "LatentBatch", "RepeatLatentBatch", "ConsisLoRARecolour",
)  # fmt: skip
BYTES = "1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"  # modes that Pillow turns into RGB without clipping
FULL_SIZE_CHANNELS, SMALLEST = 320, 512  # of SDXL's UNet; the side of a square that is half of what SDXL draws


def report_faults(request: TrainingRequest, hidden: Any) -> None:
    """Shows on the running node, and logs, what is wrong with the pictures that it learns. It goes on in any case."""
    height, width = (8 * side for side in request.latent["samples"].shape[-2:])
    side, faults = math.sqrt(height * width), []
    channels = request.model.model.model_config.unet_config["model_channels"]
    if side < SMALLEST and channels >= FULL_SIZE_CHANNELS:
        faults.append(
            f"latent is of {width} x {height} pixels, and SDXL draws 1024 x 1024. Scale the image up before VAE Encode."
        )
    for name in dict.fromkeys(widget_values_behind(hidden, "latent", "image", LOADERS, FAITHFUL)):
        faults += faults_of_file(name, side, masked=request.mask is not None)
    if faults:
        text = "\n".join(faults)
        logging.warning("ConsisLoRA %s stage: %s", request.stage.name, escape_text(text))
        show_text(hidden, text)


def faults_of_file(name: str, side: float, masked: bool) -> list[str]:
    """As `find_faults`, with the name before each; none for a file that Pillow cannot open, or of 16 bits.

    name: as Load Image has it.
    """
    try:
        with Image.open(folder_paths.get_annotated_filepath(name)) as picture:
            if picture.mode not in BYTES:
                return []
            pixels = to_image(ImageOps.exif_transpose(picture))[0]
    except Exception as error:  # the file may be gone since, and readers raise whatever they run into
        logging.info("ConsisLoRA: %s is not looked at: %s.", escape_text(name), error)
        return []
    return [f"{Path(name).name} {fault}" for fault in find_faults(pixels, side, masked)]
