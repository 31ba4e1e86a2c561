"""The demo's real pictures as tensors, and as files."""

import json
import math
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from demo.run import IMAGES


def loaded(name: str, side: int = 128) -> Tensor:
    """1 3 side side, 0 to 1."""
    picture = Image.open(IMAGES / f"{name}.png").convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return torch.tensor(np.asarray(picture)).movedim(-1, 0)[None] / 255


def cut_out(name: str, size: tuple[int, int] = (256, 256)) -> Image.Image:
    """RGBA without its white page, under which red is left, and with a shadow below that is half transparent."""
    picture = Image.open(IMAGES / f"{name}.png").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    filled = picture.copy()
    ImageDraw.floodfill(filled, (0, 0), (255, 0, 255), thresh=40)
    is_page = (np.asarray(filled) == (255, 0, 255)).all(-1)
    alpha = np.where(is_page, 0, 255).astype(np.uint8)
    shadow = np.zeros_like(is_page)
    shadow[-12:-4, size[0] // 4 : -size[0] // 4] = True
    alpha[shadow & is_page] = 128
    picture.paste((255, 0, 0), mask=Image.fromarray((is_page * 255).astype(np.uint8)))
    picture.paste((0, 0, 0), mask=Image.fromarray(((shadow & is_page) * 255).astype(np.uint8)))
    picture.putalpha(Image.fromarray(alpha))
    return picture


def write_film(path: Path, frames: int = 16) -> None:
    """The crown, which turns from one side to the other and back."""
    picture = Image.open(IMAGES / "crown-flat.png").convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
    with av.open(path, "w") as film:
        stream = film.add_stream("libx264", rate=8, options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = *picture.size, "yuv420p"
        for i in range(frames):
            angle = 18 * math.sin(2 * math.pi * i / frames)
            turned = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")
            film.mux(stream.encode(av.VideoFrame.from_image(turned)))
        film.mux(stream.encode())


def write_png(picture: Image.Image, path: Path, workflow: dict) -> None:
    """A picture with the workflow in it, as ComfyUI writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = PngInfo()
    texts.add_text("prompt", json.dumps(workflow))
    picture.save(path, "PNG", pnginfo=texts)
