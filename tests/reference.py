"""The authors' numbers (tests/data) and the tiny random UNet they were computed on, in both hosts.

tests/data/index.json says where the numbers come from: another program's run, so ours must never remake them.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from consislora_core import lora_file
from consislora_core.trainer import Denoiser

DATA = Path(__file__).parent / "data"
INDEX = json.loads((DATA / "index.json").read_text())


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def run(name: str) -> dict[str, torch.Tensor]:
    """The logged tensors of one training run, names without the run's own."""
    return {
        key.removeprefix(f"{name}/"): value
        for key, value in load_file(DATA / "training.safetensors").items()
        if key.startswith(name)
    }


def loras(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, lora_file.Part]:
    return lora_file.from_state_dict(
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    ).parts


def flat(parts: dict[str, lora_file.Part]) -> torch.Tensor:
    """All weights as one vector."""
    layers = [layer for _, part in sorted(parts.items()) for _, layer in sorted(part.items())]
    return torch.cat([side.flatten() for layer in layers for side in (layer.down, layer.up)])


def change(after: dict[str, lora_file.Part], before: dict[str, lora_file.Part]) -> torch.Tensor:
    """All weights' change as one vector."""
    return flat(after) - flat({role: before[role] for role in after})


def ddpm_sigmas() -> torch.Tensor:
    schedule = INDEX["scheduler_config"]
    betas = torch.linspace(schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    return ((1 - alpha_bar) / alpha_bar).sqrt().float()


def unet_weights() -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in load_file(DATA / "tiny_sdxl_unet_diffusers.safetensors").items()}


def diffusers_unet():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**INDEX["unet_config_diffusers"])
    unet.load_state_dict(unet_weights())
    return unet.eval()


def diffusers_denoiser(unet) -> Denoiser:
    """An epsilon model in diffusers, asked in ComfyUI's variance-exploding form; cond is (text, pooled, time_ids)."""
    sigmas = ddpm_sigmas()

    def denoise(x, sigma, cond):
        text, pooled, time_ids = cond
        timestep = torch.tensor([(sigmas - s).abs().argmin() for s in sigma])
        s = sigma.view(-1, 1, 1, 1)
        noise = unet(
            x / (s**2 + 1).sqrt(),
            timestep,
            text.expand(len(x), -1, -1),
            added_cond_kwargs={"text_embeds": pooled.expand(len(x), -1), "time_ids": time_ids.expand(len(x), -1)},
        ).sample
        return x - s * noise

    return Denoiser(unet, denoise, sigmas)


def comfy_model(prediction: str = "eps", dtype: torch.dtype = torch.float32, manual_cast: torch.dtype | None = None):
    """The same UNet as a ComfyUI MODEL, loaded in inference mode as a node would. Needs the `comfy` fixture.

    prediction: "eps", "v" or "edm", the three kinds of SDXL checkpoints.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    with torch.inference_mode():
        config = comfy.supported_models.SDXL(dict(INDEX["unet_config_comfyui"]))
        config.unet_config["num_head_channels"] = INDEX["unet_config_comfyui"]["num_head_channels"]
        config.set_inference_dtype(dtype, manual_cast)
        marks = {
            "eps": {},
            "v": {"v_pred": torch.ones(1)},
            "edm": {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)},
        }
        model = config.get_model(marks[prediction])
        names = comfy.utils.unet_to_diffusers(config.unet_config)
        model.diffusion_model.load_state_dict({names[key]: value for key, value in unet_weights().items()})
        device = comfy.model_management.get_torch_device()
        return comfy.model_patcher.ModelPatcher(model, device, device)


def comfy_conditioning(tensors: dict[str, torch.Tensor]) -> list:
    """ComfyUI's conditioning from a logged prompt."""
    names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
    sizes = dict(zip(names, tensors["time_ids"].tolist(), strict=True))
    return [[tensors["prompt_embeds"], {"pooled_output": tensors["pooled_prompt_embeds"], **sizes}]]
