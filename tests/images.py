"""The demo's real pictures as tensors."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.run import IMAGES


def loaded(name: str, side: int = 128) -> Tensor:
    """1 3 side side, 0 to 1."""
    picture = Image.open(IMAGES / f"{name}.png").convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    return torch.tensor(np.asarray(picture)).movedim(-1, 0)[None] / 255
