"""Noise levels, sampling and inversion as ComfyUI does them, with any guider."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from .training_model import is_flow

NEARLY_CLEAN = 1e-4  # the sigma that inversion starts from: at 0 the Euler step's direction is undefined


def ksampler_sigmas(model: ModelPatcher, steps: int, sampler_name: str, scheduler: str, denoise: float) -> Tensor:
    """The noise levels of ComfyUI's KSampler with these settings, descending."""
    return comfy.samplers.KSampler(
        model, steps, model.load_device, sampler=sampler_name, scheduler=scheduler, denoise=denoise
    ).sigmas


def sample(
    guider: comfy.samplers.CFGGuider,
    latent: dict,
    seed: int,
    sampler_name: str,
    sigmas: Tensor,
    noise: float = 1.0,
    run: tuple[int, int] = (0, 1),
) -> dict:
    """Samples a latent as ComfyUI's KSampler does, with any guider: the same noise, mask, preview and progress.

    noise: how strong the seed's is; 0 for a latent that already has the noise of the first level. run: number of this
    sampling, from 0, and how many the node makes, for its progress bar.
    """
    number, runs = run
    model = guider.model_patcher
    start = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    of_seed = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    progress = latent_preview.prepare_callback(model, runs * (len(sigmas) - 1))

    def show(step, z_0_hat, x, steps):
        progress(number * steps + step, z_0_hat, x, runs * steps)

    samples = guider.sample(
        noise * of_seed,
        start,
        comfy.samplers.sampler_object(sampler_name),
        sigmas,
        latent.get("noise_mask"),
        show,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": samples.to(comfy.model_management.intermediate_device())}


def invert(guider: comfy.samplers.CFGGuider, latent: dict, sigmas: Tensor, run: tuple[int, int] = (0, 1)) -> dict:
    """The noisy latent that Euler steps down `sigmas` turn into this one: DDIM inversion (arXiv 2010.02502).

    In fp32: the first step divides by `NEARLY_CLEAN`, which makes fp16's rounding larger than the latent itself.
    run: as for `sample`. Raises ValueError for a model of flow matching at sigma 1, where the latent that ComfyUI hands
    on has no noise left.
    """
    if is_flow(guider.model_patcher) and (sigmas >= 1).any():  # none at denoise 0
        raise ValueError(
            "structure_lock cannot begin at denoise 1 with a model of flow matching (as from ModelSamplingSD3). "
            "Set denoise to 0.95 or lower, or turn structure_lock off."
        )
    latent = {**latent, "samples": latent["samples"].float()}
    ascending = torch.cat([sigmas.new_tensor([NEARLY_CLEAN]), sigmas.flip(0)[1:]])
    return sample(guider, latent, 0, "euler", ascending, noise=0, run=run)


def sample_locked(
    guider: comfy.samplers.CFGGuider,
    inverting: comfy.samplers.CFGGuider,
    latent: dict,
    seed: int,
    sampler_name: str,
    sigmas: Tensor,
    variation: float,
) -> dict:
    """Samples a latent from its own noise, of whose variance a part, `variation`, becomes the seed's.

    inverting: a guider that reconstructs the latent.
    """
    noisy = invert(inverting, latent, sigmas)["samples"]
    clean = latent["samples"].to(noisy)
    start = {**latent, "samples": clean.lerp(noisy, (1 - variation) ** 0.5)}
    return sample(guider, start, seed, sampler_name, sigmas, noise=variation**0.5)
