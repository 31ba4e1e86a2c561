"""The trainer: what it learns, what it leaves alone, how it stops and goes on."""

import gc
import weakref

import pytest
import torch
from reference import diffusers_unet, flat, relative_error
from torch import nn

from consislora_core.adapters import Inserted, LoraLinear, fresh_part, inserted
from consislora_core.losses import draw, noise_loss, reconstruction_loss
from consislora_core.roles import Target
from consislora_core.schedule import ADAMW, MUON, PRESETS, SHORTER, image_stage, style_stage
from consislora_core.trainer import Trainer

SHORT = dict(steps=6, transition_step=3, learning_rate=1e-2, reconstruction_learning_rate=1e-2, rank=2)


def train(host, stage, **settings):
    with Trainer(*host, stage, **settings) as trainer:
        return [event.loss for event in trainer], trainer.parts()


def test_nothing_holds_a_trainer_when_it_is_done(host):
    gc.disable()
    try:
        trainer = Trainer(*host, image_stage(**SHORT))
        with trainer:
            next(iter(trainer))
        done = weakref.ref(trainer)
        del trainer
        assert done() is None
    finally:
        gc.enable()


def test_the_reconstruction_loss_is_sigma_squared_times_the_noise_loss():
    z_0, noise, z_0_hat = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor(2.5, dtype=torch.float64)
    torch.testing.assert_close(
        reconstruction_loss(z_0, z_0_hat, noise, sigma), sigma**2 * noise_loss(z_0, z_0_hat, noise, sigma)
    )


def test_the_noise_offset_moves_whole_channels():
    z_0, sigmas = torch.zeros(1, 4, 32, 32), torch.ones(1)
    plain = draw(z_0, sigmas, 0.0, torch.Generator().manual_seed(1)).noise
    offset = draw(z_0, sigmas, 0.5, torch.Generator().manual_seed(1)).noise - plain
    assert offset.flatten(2).std(-1).max() < 1e-6 < offset.mean((2, 3)).abs().min()


def test_each_noise_level_is_as_likely_as_any():
    sigmas, generator = torch.arange(9.0), torch.Generator().manual_seed(0)
    levels = torch.cat([draw(torch.zeros(1, 4, 1, 1), sigmas, 0.0, generator).sigma.flatten() for _ in range(900)])
    assert levels.long().bincount().sub(100).abs().max() < 40


def test_the_same_seed_trains_the_same_lora_and_another_seed_another(host):
    first, again, other = (flat(train(host, image_stage(**SHORT, seed=seed))[1]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("preset", PRESETS)
def test_six_steps_equal_three_steps_saved_loaded_and_three_more(host, preset):
    times = SHORTER.get(preset, 1)
    stage = image_stage(**{**SHORT, "steps": 6 * times, "transition_step": 2 * times}, preset=preset)
    losses, whole = train(host, stage)
    with Trainer(*host, stage) as trainer:
        events = iter(trainer)
        first_losses = [next(events).loss for _ in range(3)]
        state, parts = trainer.state_dict(), trainer.parts()
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == trainer.state_shapes()
        kept, weights = {name: tensor.clone() for name, tensor in state.items()}, flat(parts).clone()
        next(events)
        assert torch.equal(flat(parts), weights)
    with Trainer(*host, stage) as resumed:
        resumed.load_state_dict(state)
        assert first_losses + [event.loss for event in resumed] == losses
        assert torch.equal(flat(resumed.parts()), flat(whole))
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


def test_stage_two_learns_style_anew_and_leaves_the_content_part_alone(host):
    _, first = train(host, image_stage(**SHORT))
    _, second = train(host, style_stage(steps=3, rank=2), frozen={"content": first["content"]})
    assert torch.equal(flat({"content": second["content"]}), flat({"content": first["content"]}))
    assert any(layer.up.any() for layer in second["style"].values())


@pytest.mark.parametrize(("optimizer", "each"), [(ADAMW, 1), (MUON, 1), (ADAMW, 2)])
def test_loras_that_train_together_are_those_that_each_image_or_images_would_get_alone(host, optimizer, each):
    model, z_0, cond = host
    images = torch.cat([z_0, z_0.flip(-1), z_0.roll(3, -1), z_0.flip(-2)])
    content = None
    # At the paper's learning rates: AdamW's first steps blow up the rounding of gradients near 0.
    settings = dict(rank=2, optimizer=optimizer)
    for stage in (image_stage(steps=6, transition_step=3, **settings), style_stage(steps=3, **settings)):
        alone = [
            train((model, image, cond), stage, frozen=content and {"content": content[row]})
            for row, image in enumerate(images.split(each))
        ]
        frozen = content and [{"content": part} for part in content]
        with Trainer(model, images, cond, stage, frozen, loras=len(alone)) as trainer:
            losses = zip(*(event.losses for event in trainer), strict=True)
            for row, (ours, (theirs, parts)) in enumerate(zip(losses, alone, strict=True)):
                assert ours == pytest.approx(theirs, rel=1e-4)
                assert relative_error(flat(trainer.parts(row)), flat(parts)) < 1e-4
        content = [parts["content"] for _, parts in alone]


def test_the_frozen_content_part_acts_in_stage_two(host):
    _, first = train(host, image_stage(**SHORT))
    stage = style_stage(steps=1, rank=2)
    assert train(host, stage, frozen={"content": first["content"]})[0] != train(host, stage)[0]


def test_encoder_and_middle_block_run_without_a_graph(host):
    graphs = {}
    unet = host[0].unet
    hooks = [
        module.register_forward_hook(
            lambda _, __, out, name=name: graphs.update({name: torch.as_tensor(out).requires_grad})
        )
        for name, module in [
            ("middle", unet.mid_block),
            ("first output resnet", unet.up_blocks[0].resnets[0]),
            ("end", unet.conv_out),
        ]
    ]
    train(host, image_stage(steps=1, transition_step=0, rank=2))
    for hook in hooks:
        hook.remove()
    assert graphs == {"middle": False, "first output resnet": False, "end": True}


def test_lora_weights_stay_fp32_on_a_half_precision_unet_which_afterwards_learns_as_before():
    unet = diffusers_unet().to(torch.bfloat16)
    unet.conv_in.requires_grad_(False)
    unet.conv_out.requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    part = fresh_part(unet, "style", 2, torch.Generator())
    with inserted(unet, [{"style": part}], ("style",), torch.device("cpu")) as lora:
        assert {parameter.dtype for parameter in lora.parameters} == {torch.float32}
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == before


def test_after_a_cast_layers_compute_with_their_own_weights_again():
    base, x = nn.Linear(4, 4), torch.ones(1, 4)
    layer = LoraLinear(base, torch.ones(1, 2, 4), torch.ones(1, 4, 2), 2.0)
    with Inserted({Target("style", "to_q"): layer}, ("style",)).cast(torch.bfloat16):
        pass
    nn.init.zeros_(layer.up)
    assert torch.equal(layer(x), base(x))


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(host):
    model, z_0, cond = host
    broken = model._replace(denoise=lambda x, sigma, cond: model.denoise(x, sigma, cond) * float("nan"))
    with Trainer(broken, z_0, cond, image_stage(**SHORT)) as trainer:
        before = flat(trainer.parts())
        with pytest.raises(
            FloatingPointError, match="step 1 of 6 .noise phase, learning rate 0.01.. Lower the learning rate"
        ):
            next(iter(trainer))
        assert torch.equal(flat(trainer.parts()), before)


def test_gradients_that_overflow_halve_the_loss_scale_and_the_step_is_done_again(host):
    model, z_0, cond = host
    stage = image_stage(**SHORT)

    class Overflow(torch.autograd.Function):  # what fp16 does to a large gradient
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.where(grad.abs() > 0.05, torch.inf, grad)

    narrow = model._replace(denoise=lambda x, sigma, cond: Overflow.apply(model.denoise(x, sigma, cond)))
    with Trainer(narrow, z_0, cond, stage, loss_scale=2.0**16) as trainer:
        losses = [event.loss for event in trainer]
        assert trainer.loss_scale < 2.0**16
        scale, state = trainer.loss_scale, trainer.state_dict()
    with Trainer(narrow, z_0, cond, stage, loss_scale=2.0**16) as resumed:
        resumed.load_state_dict(state)
        assert resumed.loss_scale == scale
    assert losses == pytest.approx(train(host, stage)[0], rel=1e-5)


@pytest.mark.parametrize(
    ("latent", "words"),
    [(torch.zeros(0, 4, 16, 16), "at least one image"), (torch.full((1, 4, 16, 16), torch.nan), "not numbers")],
)
def test_a_latent_that_cannot_be_learned_is_refused(host, latent, words):
    with pytest.raises(ValueError, match=words):
        Trainer(host[0], latent, host[2], image_stage(**SHORT))
