"""Noises a latent and scores the prediction: as noise, or as x0 prediction.

Notation of the paper in the variance-exploding form: x = z_0 + sigma n, where the paper's z_t is x / sqrt(1 + sigma^2).
A denoiser gives z_0_hat; the noise it implies is n_hat = (x - z_0_hat) / sigma. Flow matching (arXiv 2210.02747) has
(1 - sigma) z_0 for z_0 in both.

A mask m (b 1 h w, 0 to 1) makes of a loss, mean e^2 over all pixels, the mean over those inside:

    mean w e^2,   w = m / mean(m)

with the mean of m over each latent. The weights w are 1 on average, so that learning rates keep their meaning.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import NOISE, RECONSTRUCTION


class Draw(NamedTuple):
    """The randomness of one training step: noise like z_0, and sigma (b 1 1 1)."""

    noise: Tensor
    sigma: Tensor


def draw(z_0: Tensor, sigmas: Tensor, noise_offset: float, generator: torch.Generator) -> Draw:
    """Gaussian noise like z_0 (1 c h w), and a noise level, uniform over the model's training `sigmas`.

    Drawn on the CPU, so that every device trains alike.
    noise_offset: scale of one more normal number for each channel, which shifts the whole channel.
    """
    noise = torch.randn(z_0.shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*z_0.shape[:2], 1, 1, generator=generator)
    level = torch.randint(len(sigmas), (1,), generator=generator)
    return Draw(noise.to(z_0), sigmas[level.to(sigmas.device)].to(z_0).view(-1, 1, 1, 1))


def add_noise(z_0: Tensor, noise: Tensor, sigma: Tensor, flow: bool = False) -> Tensor:
    """x = z_0 + sigma n. z_0, noise: b c h w; sigma: b 1 1 1."""
    return _signal(z_0, sigma, flow) + sigma * noise


def noise_from_x0(x: Tensor, z_0_hat: Tensor, sigma: Tensor, flow: bool = False) -> Tensor:
    """n_hat = (x - z_0_hat) / sigma. x, z_0_hat: b c h w; sigma: b 1 1 1."""
    return (x - _signal(z_0_hat, sigma, flow)) / sigma


def _signal(z_0: Tensor, sigma: Tensor, flow: bool) -> Tensor:
    return (1 - sigma) * z_0 if flow else z_0


def mask_weights(mask: Tensor) -> Tensor:
    """w = m / mean(m), the mean over each latent: what a loss takes as `weight`. mask: b 1 h w, in no latent all 0."""
    return mask / mask.mean((1, 2, 3), keepdim=True)


def noise_loss(
    z_0: Tensor, z_0_hat: Tensor, noise: Tensor, sigma: Tensor, flow: bool = False, weight: Tensor | None = None
) -> Tensor:
    """Noise-prediction loss (arXiv 2503.10614, eq. 1): mean (n_hat - n)^2.

    weight: w (b 1 h w), from `mask_weights`, with which it is mean w (n_hat - n)^2.
    """
    n_hat = noise_from_x0(add_noise(z_0, noise, sigma, flow), z_0_hat, sigma, flow)
    return _mean_square(n_hat - noise, weight)


def reconstruction_loss(
    z_0: Tensor, z_0_hat: Tensor, noise: Tensor, sigma: Tensor, flow: bool = False, weight: Tensor | None = None
) -> Tensor:
    """x0-reconstruction loss of ConsisLoRA (arXiv 2503.10614, section 4.1): mean (z_0_hat - z_0)^2 at any sigma.

    weight: w (b 1 h w), from `mask_weights`, with which it is mean w (z_0_hat - z_0)^2.

    It is sigma^2 times the noise loss (in flow matching (sigma / (1 - sigma))^2 times), so it learns from high noise,
    where global structure is decided.
    """
    return _mean_square(z_0_hat - z_0, weight)


def _mean_square(error: Tensor, weight: Tensor | None) -> Tensor:
    squares = error.square()
    return (squares if weight is None else weight * squares).mean()


LOSSES = {NOISE: noise_loss, RECONSTRUCTION: reconstruction_loss}
