"""Dual guidance through the real nodes and ComfyUI's own samplers: the authors' numbers, and plain CFG at scale 0."""

from collections import namedtuple

import pytest
import torch
from reference import DATA, INDEX, comfy_conditioning, comfy_model, relative_error
from safetensors.torch import load_file

from consislora_core import lora_file

LOGGED = load_file(DATA / "guidance.safetensors")
SETTINGS = INDEX["guidance"]["settings"]
PROMPTS = ["content_positive", "content_negative", "style_positive", "style_negative"]
OFF = dict(content_guidance=0.0, style_guidance=0.0)

Call = namedtuple("Call", "x prompts output")


def conditioning(name):
    """One of the logged prompts, as CLIP Text Encode gives it."""
    return comfy_conditioning(
        {
            "prompt_embeds": LOGGED[f"embeds/{name}/prompt_embeds"],
            "pooled_prompt_embeds": LOGGED[f"embeds/{name}/pooled_prompt_embeds"],
            "time_ids": LOGGED["time_ids"][0],
        }
    )


def null_as_the_authors():
    """Without an added prompt their text is the negative's and their pooled vector the positive's."""
    ((text, _),), ((_, extras),) = conditioning("uncond"), conditioning("main")
    return [[text, extras]]


@pytest.fixture(scope="module")
def loras():
    return {
        "content": lora_file.read(DATA / "loras" / "stage1_content.safetensors"),
        "style": lora_file.read(DATA / "loras" / "stage2_style.safetensors"),
    }


@pytest.fixture
def guide(pack):
    return pack.nodes.guide


def guider(guide, model, loras, **changes):
    given = dict(
        cfg=5.0,
        content_guidance=2.0,
        style_guidance=3.0,
        content_strength=1.0,
        style_strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        reuse_steps=1,
        positive=conditioning("main"),
        negative=conditioning("uncond"),
    )
    with torch.inference_mode():
        return guide.Guider.execute(model, **{**given, **loras, **changes}).result[0]


def noise(batch=1):
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(7))


def sampled(guider, sigmas=LOGGED["sigmas"], start=None, sampler="euler", callback=None, **inputs):
    """What SamplerCustomAdvanced does with a guider, the callback aside."""
    import comfy.samplers

    start = noise() if start is None else start
    with torch.inference_mode():
        return guider.sample(
            start.clone(),
            torch.zeros_like(start),
            comfy.samplers.sampler_object(sampler),
            sigmas.clone(),
            callback=callback,
            disable_pbar=True,
            seed=1,
            **inputs,
        )


def logging_calls(model, pack):
    """A clone of the model, and the list that its UNet calls will fill."""
    from comfy.patcher_extension import WrappersMP

    calls, clone = [], model.clone()

    def log(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        rows = transformer_options.get(pack.host.guided_unet.ROWS, ())
        output = executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        calls.append(Call(x, [rows[i].prompt if rows else i for i in transformer_options["cond_or_uncond"]], output))
        return output

    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "log", log)
    return clone, calls


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_gives_the_authors_numbers(name, guide, pack, loras):
    logged = {key.removeprefix(f"{name}/"): value for key, value in LOGGED.items() if key.startswith(f"{name}/")}
    setting = SETTINGS[name]
    model, calls = logging_calls(comfy_model(), pack)
    prompts = {prompt: conditioning(prompt) for prompt in PROMPTS if setting["add_prompts"]}
    if name == "v":
        prompts = {prompt: null_as_the_authors() for prompt in PROMPTS}
    content_strength, style_strength = setting["lora_scaling"]
    ours = guider(
        guide,
        model,
        loras,
        cfg=setting["guidance_scale"],
        content_guidance=setting["content_guidance_scale"],
        style_guidance=setting["style_guidance_scale"],
        content_strength=content_strength,
        style_strength=style_strength,
        **prompts,
    )
    steps = []
    # ComfyUI scales unit noise by sqrt(1 + sigma^2) at the highest sigma, diffusers by sigma.
    start = LOGGED["initial_latents_scaled"] / (1 + LOGGED["sigmas"][0] ** 2).sqrt()
    final = sampled(ours, start=start, callback=lambda step, denoised, x, total: steps.append((x.clone(), denoised)))

    for step, (call, (x, denoised)) in enumerate(zip(calls, steps, strict=True)):
        for prompt, row, output in zip(call.prompts, call.x, call.output, strict=True):
            kind, place = {"negative": ("cfg", 0), "positive": ("cfg", 1), 1: ("cfg", 0), 0: ("cfg", 1)}.get(
                prompt, (prompt, 0)
            )
            assert relative_error(row, logged["unet/sample"][step]) < 1e-4
            assert relative_error(output, logged[f"unet/{kind}/output"][step, place]) < 1e-4
        combined = (x - denoised) / LOGGED["sigmas"][step]
        assert relative_error(combined, logged["noise_pred"][step, None]) < 1e-4
        assert relative_error(x, logged["latents"][step, None]) < 1e-4
    assert relative_error(final * INDEX["vae_scaling_factor"], logged["final_latents"]) < 1e-4


def plain_cfg(model, sampler="euler", **inputs):
    """The latent of ComfyUI's own guider."""
    import comfy.samplers

    ours = comfy.samplers.CFGGuider(model)
    ours.set_conds(conditioning("main"), conditioning("uncond"))
    ours.set_cfg(5.0)
    return sampled(ours, sampler=sampler, **inputs)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun"])
def test_without_guidance_it_is_plain_cfg_on_the_applied_loras_to_the_bit(sampler, guide, pack, loras):
    model = comfy_model()
    with torch.inference_mode():
        applied = pack.nodes.lora.Apply.execute(model, 1.0, 1.0, **loras).result[0]
    ours = sampled(guider(guide, model, loras, **OFF), sampler=sampler)
    assert torch.equal(ours, plain_cfg(applied, sampler))
    assert not torch.equal(ours, plain_cfg(model, sampler))


def test_at_strength_0_without_guidance_it_is_the_model_without_us_to_the_bit(guide, loras):
    model = comfy_model()
    ours = sampled(guider(guide, model, loras, **OFF, content_strength=0.0, style_strength=0.0))
    assert torch.equal(ours, plain_cfg(model))


@pytest.mark.parametrize("prompts, rows", [("null", (2, 4, 6)), ("own", (6, 6, 6))])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_rows_go_as_one_as_far_as_they_are_equal_which_changes_no_number(
    prompts, rows, batch, guide, pack, loras
):
    """rows: through the encoder, the content block and the style block."""
    own = {prompt: conditioning(prompt) for prompt in PROMPTS} if prompts == "own" else {}
    model, pictures, widths = comfy_model(), [], []
    unet = model.model.diffusion_model
    for layer in (unet.input_blocks[0][0], unet.output_blocks[0][1], unet.output_blocks[1][1]):
        layer.register_forward_hook(lambda module, inputs, output: widths.append(len(output)))
    for share in (True, False):
        ours = guider(guide, model, loras, **own)
        ours.model_patcher.wrappers["diffusion_model"]["consislora_guided"][0].share_encoder = share
        pictures.append(sampled(ours, start=noise(batch)))
    assert relative_error(*pictures) < 1e-5
    assert widths == 6 * [batch * n for n in rows] + 6 * [batch * 6] * 3


def test_the_picture_is_linear_in_each_scale(guide, loras):
    def one_step(**scales):
        return sampled(guider(guide, comfy_model(), loras, **scales), sigmas=LOGGED["sigmas"][[0, 6]])

    for role, other in (("content", "style"), ("style", "content")):
        at = {g: one_step(**{f"{role}_guidance": g, f"{other}_guidance": 1.5}) for g in (0.0, 1.0, 4.0)}
        assert relative_error(at[4.0] + 3 * at[0.0], 4 * at[1.0]) < 1e-5


def test_splitting_the_batch_changes_no_number(guide, pack, loras, monkeypatch):
    import comfy.model_management

    pictures, calls = [], []
    for short_of_memory in (False, True):
        if short_of_memory:
            # Sub-quadratic attention asks for two numbers, and is no part of what is tested.
            free = lambda device, both=False: (2**30, 2**30) if both else 0  # noqa: E731
            monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
        model, called = logging_calls(comfy_model(), pack)
        pictures.append(sampled(guider(guide, model, loras)))
        calls.append(called)
    assert [len(called) for called in calls] == [6, 36]
    assert relative_error(*pictures) < 1e-5


def test_the_order_of_rows_changes_no_number(guide, pack, loras, monkeypatch):
    import comfy.samplers

    plain, real = sampled(guider(guide, comfy_model(), loras)), comfy.samplers.calc_cond_batch
    order = [3, 0, 5, 2, 4, 1]

    def shuffled(model, conds, x, sigma, options):
        rows = options["transformer_options"][pack.host.guided_unet.ROWS]
        options["transformer_options"][pack.host.guided_unet.ROWS] = [rows[i] for i in order]
        predicted = real(model, [conds[i] for i in order], x, sigma, options)
        return [predicted[order.index(i)] for i in range(6)]

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", shuffled)
    assert relative_error(sampled(guider(guide, comfy_model(), loras)), plain) < 1e-5


def test_a_latent_batch_gives_the_pictures_of_its_latents_alone(guide, loras):
    together = sampled(guider(guide, comfy_model(), loras), start=noise(3))
    for i in range(3):
        alone = sampled(guider(guide, comfy_model(), loras), start=noise(3)[i, None])
        assert relative_error(together[i, None], alone) < 1e-5


def test_swapping_the_files_swaps_the_roles(guide, loras):
    """What guidance adds with the files swapped is the opposite of what it added."""
    swapped = {"content": loras["style"], "style": loras["content"]}

    def one_step(loras, **scales):
        ours = guider(guide, comfy_model(), loras, content_strength=0.0, style_strength=0.0, **{**OFF, **scales})
        return sampled(ours, sigmas=LOGGED["sigmas"][[0, 6]])

    for role in ("content", "style"):
        there, back = (one_step(files, **{f"{role}_guidance": 2.0}) for files in (loras, swapped))
        assert relative_error(there + back, 2 * one_step(loras)) < 1e-5
        assert relative_error(there, back) > 1e-3
