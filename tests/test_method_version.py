"""Golden numbers of short trainings: while they do not move, LoRAs in users' stores stay valid."""

import pytest
import torch
from reference import INDEX, comfy_conditioning, comfy_model, run

from consislora_core import METHOD_VERSION, store
from consislora_core.schedule import SHORTER, image_stage, muon_rate, style_stage, with_rates
from consislora_core.trainer import Trainer

RATES = dict(learning_rate=1e-3, reconstruction_learning_rate=5e-4)
# Of METHOD_VERSION 1, by stage: the loss of every step, and the norm of the trained up matrices, which start at 0.
GOLDEN = {
    "image, paper": ([1.3394643, 1.2639307, 1.3516366, 37.4970818, 2.2020507, 21.6755066], 0.1947836),
    "image, quality": ([1.3394643, 1.262735, 1.3522408, 37.5816536, 2.2040195, 21.6828575], 0.1239253),
    "style, paper": ([3.0716062, 3.0445664, 89.7577133, 43.9944649, 0.1390519], 0.0786718),
    "style, quality": ([3.0716062, 3.0445664, 89.7615433, 44.0134583, 0.1390646], 0.0544223),
    "style, fast": ([3.0716057, 3.0422802, 89.6657104, 43.8878288, 0.1390362], 0.1098940),
}


def stage_of(name: str):
    stage, preset = name.split(", ")
    longer, settings = SHORTER.get(preset, 1), dict(preset=preset, rank=2, seed=3)
    if stage == "image":
        made = image_stage(6 * longer, 3 * longer, **RATES, **settings)
        return made if preset == "paper" else with_rates(made, 3 / muon_rate(made.steps))  # as when there was one rate
    return style_stage(5 * longer, RATES["reconstruction_learning_rate"], **settings)


def train(pack, stage):
    """Losses and the norm of the weights after a training through all of host/, on the tiny UNet in fp32."""
    host, model, tensors = pack.host.training_model, comfy_model(), run("stage1_content")
    latent = {"samples": tensors["z_0"] / INDEX["vae_scaling_factor"]}
    shape = latent["samples"].shape
    with torch.inference_mode(), host.open_for_training(model, shape, torch.float32) as denoiser:
        z_0 = host.clean_latents(model, latent)
        cond = host.encoded_conditioning(model, comfy_conditioning(tensors), z_0)
        with Trainer(denoiser, z_0, cond, stage) as trainer:
            losses = [event.loss for event in trainer]
            ups = [layer.up.flatten() for part in trainer.parts().values() for layer in part.values()]
    return losses, torch.cat(ups).norm().item()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_numbers_of_a_training_are_those_of_its_version(pack, name):
    losses, norm = train(pack, stage_of(name))
    moved = (
        "The numbers of training have moved. If that is meant, raise METHOD_VERSION in consislora_core/__init__.py, "
        f"and put the new numbers here: {name!r}: ({losses}, {norm}),"
    )
    golden_losses, golden_norm = GOLDEN[name]
    assert losses == pytest.approx(golden_losses, rel=1e-4), moved
    assert norm == pytest.approx(golden_norm, rel=1e-3), moved


def test_version_1_finds_what_was_trained_before_there_was_a_version():
    assert METHOD_VERSION == 1, "remove this test together with the first entry of store.METHOD"
    assert store.METHOD == "409b59147a1989079b1d6d7e2fa67cbacc8e40a2ae9aebcf506023965a4c6cd6"
