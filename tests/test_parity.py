"""Our numbers are the authors': same noise and timesteps in, same losses and weights out."""

from contextlib import contextmanager

import pytest
import torch
from reference import (
    INDEX,
    change,
    comfy_conditioning,
    comfy_model,
    ddpm_sigmas,
    diffusers_denoiser,
    diffusers_unet,
    loras,
    relative_error,
    run,
)

from consislora_core.losses import Draw
from consislora_core.schedule import image_stage, style_stage
from consislora_core.trainer import Trainer


@contextmanager
def diffusers_host(tensors, request):
    cond = tensors["prompt_embeds"], tensors["pooled_prompt_embeds"], tensors["time_ids"][None]
    yield diffusers_denoiser(diffusers_unet()), tensors["z_0"], cond


@contextmanager
def comfy_host(tensors, request, memory="fast", dtype=torch.float32):
    """The very path the training nodes take, with latents as VAE Encode gives them."""
    pack = request.getfixturevalue("pack")
    bridge, model = pack.host.training_model, comfy_model()
    latent = {"samples": tensors["z_0"] / INDEX["vae_scaling_factor"]}
    shape = latent["samples"].shape
    with torch.inference_mode(), bridge.open_for_training(model, shape, dtype, memory) as denoiser:
        z_0 = bridge.clean_latents(model, latent)
        yield denoiser, z_0, bridge.encoded_conditioning(model, comfy_conditioning(tensors), z_0)


def lean_comfy_host(tensors, request):
    return comfy_host(tensors, request, "lean")


HOSTS = pytest.mark.parametrize("host", [diffusers_host, comfy_host, lean_comfy_host])


@HOSTS
def test_the_plain_unet_predicts_the_same_noise(host, request):
    tensors = run("forward")
    for row in range(2):
        row_tensors = {
            "z_0": tensors["sample"][row, None],
            "prompt_embeds": tensors["encoder_hidden_states"][row, None],
            "pooled_prompt_embeds": tensors["pooled"][row, None],
            "time_ids": tensors["time_ids"][row],
        }
        with host(row_tensors, request) as (model, _, cond), torch.no_grad():
            sigma = ddpm_sigmas()[tensors["timesteps"][row]]
            x = tensors["sample"][row, None] * (sigma**2 + 1).sqrt()
            noise = (x - model.denoise(x, sigma[None], cond)) / sigma
            assert relative_error(noise, tensors["output"][row, None]) < 1e-5


def stage_of(name):
    """Our Stage with the settings of a logged run."""
    logged = INDEX["runs"][name]
    if name == "stage2_style":
        return style_stage(logged["steps"], logged["lr"], logged["noise_offset"], rank=logged["rank"])
    return image_stage(
        logged["steps"], logged["start_x0_loss_steps"], logged["lr"], logged["second_lr"], rank=logged["rank"]
    )


RUNS = pytest.mark.parametrize("name", ["stage1_style", "stage2_style", "stage1_content"])


def start_of(name):
    """The weights before the first step of a logged run."""
    start = loras(run(name), "lora_init/")
    if name == "stage2_style":
        return {"content": loras(run("stage1_style"), "lora_after/16/")["content"], "style": start["style"]}
    return start


def steps_on_their_noise(name, model, z_0, cond, loss_scale=1.0):
    """Trains as a logged run did; the trainer and what happened, step by step."""
    tensors, stage, sigmas, start = run(name), stage_of(name), ddpm_sigmas(), start_of(name)
    trainer = Trainer(model, z_0, cond, stage, {"content": start["content"]}, loss_scale)
    trainer.start = [start]
    with trainer:
        for step in range(stage.steps):
            sigma = sigmas[tensors["timesteps"][step]].view(1, 1, 1, 1)
            yield trainer, trainer.train_step(z_0, Draw(tensors["noise"][step, None], sigma))


@HOSTS
@RUNS
def test_training_gives_the_authors_losses_and_weights(host, name, request):
    tensors, start = run(name), start_of(name)
    with host(tensors, request) as (model, z_0, cond):
        for step, (trainer, event) in enumerate(steps_on_their_noise(name, model, z_0, cond)):
            assert event.loss == pytest.approx(tensors["loss"][step].item(), rel=1e-5)
            assert event.learning_rate == pytest.approx(tensors["lr"][step].item())
            if any(key.startswith(f"lora_after/{event.step}/") for key in tensors):
                theirs = loras(tensors, f"lora_after/{event.step}/")
                ours = {role: part for role, part in trainer.parts().items() if role in theirs}
                assert relative_error(change(ours, start), change(theirs, start)) < 2e-3


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=["fp16", "bf16"])
@RUNS
def test_in_lower_precision_the_losses_stay_near_the_authors(name, dtype, tolerance, memory, request):
    """Weights differ more: in its first steps Adam makes a full step of a gradient that is all rounding."""
    tensors, loss_scale = run(name), request.getfixturevalue("pack").host.training_model.loss_scale(dtype)
    with comfy_host(tensors, request, memory, dtype) as (model, z_0, cond):
        losses = [event.loss for _, event in steps_on_their_noise(name, model, z_0, cond, loss_scale)]
    assert losses == pytest.approx(tensors["loss"].tolist(), rel=tolerance)
