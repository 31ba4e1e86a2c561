"""The demo's real pictures as tensors."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.run import IMAGES


def loaded(name: str) -> Tensor:
    """1 3 128 128, 0 to 1."""
    picture = Image.open(IMAGES / f"{name}.png").convert("RGB").resize((128, 128), Image.Resampling.LANCZOS)
    return torch.tensor(np.asarray(picture)).movedim(-1, 0)[None] / 255
