"""Dual guidance beside the rest of ComfyUI: other patches, control, masks, hooks, samplers, windows, interruption."""

import logging
from functools import partial
from itertools import cycle

import pytest
import torch
from images import loaded
from reference import DATA, INDEX, comfy_model, relative_error
from test_guidance import LOGGED, OFF, PROMPTS, conditioning, guider, logging_calls, noise, sampled
from test_training_nodes import everything_about, loaded_model
from torch.utils._python_dispatch import TorchDispatchMode

from consislora_core import lora_file
from consislora_core.guidance import GUIDANCE, parts_of, wanted_mix

ONE_STEP = LOGGED["sigmas"][[0, 6]]
THREE_STEPS = LOGGED["sigmas"][[0, 2, 4, 6]]
TWO_STEPS = LOGGED["sigmas"][[0, 2, 6]]
SETTINGS = dict(cfg=5.0, content_guidance=2.0, style_guidance=3.0)


# Some of ComfyUI's samplers warn by themselves: of copied tensors, of rounded times, of an older NumPy's ways.
THEIR_WARNINGS = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def inside_a_node():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
        yield


def own_prompts():
    return {prompt: conditioning(prompt) for prompt in PROMPTS}


def cfg_guider(model, positive=None, negative=None, cfg=5.0):
    """ComfyUI's own guider."""
    import comfy.samplers

    theirs = comfy.samplers.CFGGuider(model)
    theirs.set_conds(positive or conditioning("main"), negative or conditioning("uncond"))
    theirs.set_cfg(cfg)
    return theirs


def applied(pack, model, loras, content_strength=1.0, style_strength=1.0):
    return pack.nodes.lora.Apply.execute(model, content_strength, style_strength, **loras).result[0]


def one_row(pack, model, loras, mix, prompt, prompts, **inputs):
    """One denoiser pass by itself. With a single Euler step down to 0 the picture is what the pass predicts."""
    import comfy.samplers

    alone = comfy.samplers.CFGGuider(pack.host.guided_unet.with_mix(model, parts_of(**loras), mix))
    # The other prompts are there, though nothing reads them, because ComfyUI carries areas from one to another.
    alone.inner_set_conds({"positive": prompts[prompt], **{f"beside {name}": cond for name, cond in prompts.items()}})
    alone.set_cfg(1.0)
    return sampled(alone, sigmas=ONE_STEP, **inputs)


def by_hand(pack, model, loras, positive=None, negative=None, start=None, **changes):
    """One guided step, each of its rows asked for by itself, and summed as the method is written."""
    prompts = {"positive": positive or conditioning("main"), "negative": negative or conditioning("uncond")}
    prompts |= {prompt: changes.pop(prompt, prompts["negative"]) for prompt in PROMPTS}
    scales = {**SETTINGS, **changes}

    def row(prompt, mix):
        return one_row(pack, model, loras, mix, prompt, prompts, start=start)

    uncond, cond = row("negative", wanted_mix(1.0, 1.0)), row("positive", wanted_mix(1.0, 1.0))
    guidance = [scales[f"{role}_guidance"] * (row(*toward) - row(*away)) for role, (toward, away) in GUIDANCE.items()]
    return uncond + scales["cfg"] * (cond - uncond) + sum(guidance)


def unshared_guider(pack, model, loras, positive=None, negative=None, **changes):
    """A guider that sends every row through the whole UNet by itself."""
    prompts = positive or conditioning("main"), negative or conditioning("uncond")
    images = (loras.get(image) for image in ("content", "style"))
    settings = pack.host.guider.GuidanceSettings(**{**SETTINGS, **changes})
    return pack.host.guider.build_dual_guider(model, *prompts, *images, settings, share_encoder=False)


def shared_and_unshared(guide, pack, model, loras, **changes):
    """The same step twice: equal rows go through the encoder once, and every row goes by itself."""
    guiders = guider(guide, model, loras, **changes), unshared_guider(pack, model, loras, **changes)
    return [sampled(ours, sigmas=ONE_STEP) for ours in guiders]


def encoder_rows(model):
    """A list that every pass through the UNet will add to: how many rows its encoder sees."""
    rows = []
    encoder = model.model.diffusion_model.input_blocks[0][0]
    encoder.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    return rows


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.05, generator=generator)
    return module


# Other patches of the model


@pytest.fixture
def another_lora(tmp_path):
    """A third image's LoRA, as ComfyUI reads it from a file of ours."""
    import comfy.utils

    file = tmp_path / "another.safetensors"
    lora_file.write(lora_file.read(DATA / "loras" / "stage1_style.safetensors"), file)
    return comfy.utils.load_torch_file(str(file))


def with_weight_patches(model, lora):
    """The model as ComfyUI's Load LoRA makes it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def test_another_lora_as_a_weight_patch_adds_to_guidance(guide, pack, loras, another_lora):
    model = comfy_model()
    patched = with_weight_patches(model, another_lora)
    shared, unshared = shared_and_unshared(guide, pack, patched, loras)
    assert relative_error(shared, by_hand(pack, patched, loras)) < 1e-5
    assert relative_error(shared, unshared) < 1e-5
    assert relative_error(shared, sampled(guider(guide, model, loras), sigmas=ONE_STEP)) > 1e-3
    off = sampled(guider(guide, patched, loras, **OFF), sigmas=TWO_STEPS)
    assert torch.equal(off, sampled(cfg_guider(applied(pack, patched, loras)), sigmas=TWO_STEPS))


def test_a_lora_as_a_weight_patch_is_the_same_lora_at_strength_1_of_ours(guide, loras):
    model = comfy_model()
    content = {"content": loras["content"].part("content")}
    patched = with_weight_patches(model, lora_file.to_state_dict(lora_file.ImageLora(content, {})))
    theirs = sampled(guider(guide, patched, loras, **OFF, content_strength=0.0), sigmas=TWO_STEPS)
    assert relative_error(theirs, sampled(guider(guide, model, loras, **OFF), sigmas=TWO_STEPS)) < 1e-5


@pytest.mark.parametrize("node, connected", [("FreeU", ["content", "style"]), ("FreeU_V2", ["style"])])
def test_freeu_keeps_the_encoder_shared_and_gives_the_same_numbers(node, connected, guide, pack, loras):
    import comfy_extras.nodes_freelunch

    loras = {image: loras[image] for image in connected}
    model = comfy_model()
    patched = getattr(comfy_extras.nodes_freelunch, node)().patch(model, 1.3, 1.4, 0.9, 0.2)[0]
    rows = encoder_rows(model)
    shared, unshared = shared_and_unshared(guide, pack, patched, loras)
    assert rows == [2, 6]
    assert relative_error(shared, unshared) < 1e-5
    both = {image: loras.get(image) for image in ("content", "style")}
    assert relative_error(shared, by_hand(pack, patched, both)) < 1e-5
    assert relative_error(shared, sampled(guider(guide, model, loras), sigmas=ONE_STEP)) > 1e-3


def with_pag(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 3.0)[0]


def with_sag(model):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model, 2.0, 2.0)[0]


@pytest.mark.parametrize("patch", [with_pag, with_sag])
def test_another_guidance_without_ours_is_that_of_the_applied_loras_to_the_bit(patch, guide, pack, loras):
    model = patch(comfy_model())
    ours = sampled(guider(guide, model, loras, **OFF), sigmas=TWO_STEPS)
    assert torch.equal(ours, sampled(cfg_guider(applied(pack, model, loras)), sigmas=TWO_STEPS))


@pytest.mark.parametrize("patch", [with_pag, with_sag])
def test_another_guidance_adds_to_ours_what_it_adds_to_the_applied_loras(patch, guide, pack, loras):
    def one_step(model):
        # Ours first: self-attention guidance keeps what it saw of the last pass, and must see it in ours.
        ours = sampled(guider(guide, model, loras), sigmas=ONE_STEP)
        return ours, sampled(cfg_guider(applied(pack, model, loras)), sigmas=ONE_STEP)

    model = comfy_model()
    (ours, theirs), (ours_with, theirs_with) = one_step(model), one_step(patch(model))
    assert relative_error(ours_with - ours, theirs_with - theirs) < 1e-4
    assert relative_error(ours_with, ours) > 1e-3


def test_the_pass_of_perturbed_attention_is_one_row_and_sharing_stays_on_beside_it(guide, loras):
    model = comfy_model()
    rows = encoder_rows(model)
    sampled(guider(guide, with_pag(model), loras), sigmas=TWO_STEPS)
    assert rows == [2, 1, 2, 1]


def test_easycache_is_refused_beside_guidance_that_begins_later(guide, loras):
    """It fails at a row of which it has no earlier pass."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    settings = dict(reuse_threshold=0.2, start_percent=0.1, end_percent=0.95, verbose=False)
    easy, lazy = (node.execute(comfy_model(), **settings)[0] for node in (EasyCacheNode, LazyCacheNode))
    with pytest.raises(ValueError, match="start_percent is 0.5, and the model has EasyCache.*LazyCache instead"):
        guider(guide, easy, loras, start_percent=0.5)
    guider(guide, lazy, loras, start_percent=0.5)
    guider(guide, easy, loras, start_percent=0.5, **OFF)
    guider(guide, easy, loras)


def test_a_merged_model_is_guided_as_the_model_it_comes_to(guide, pack, loras):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    ones, others, both = comfy_model(), comfy_model(), comfy_model()
    randomised(others.model.diffusion_model.middle_block)
    randomised(others.model.diffusion_model.output_blocks[0], seed=1)
    weights = zip(*(list(model.model.parameters()) for model in (ones, others, both)), strict=True)
    for one, other, mean in weights:
        mean.copy_(0.25 * one + 0.75 * other)
    merged = ModelMergeSimple().merge(ones, others, 0.25)[0]
    shared, unshared = shared_and_unshared(guide, pack, merged, loras)
    assert relative_error(shared, unshared) < 1e-5
    assert relative_error(shared, sampled(guider(guide, both, loras), sigmas=ONE_STEP)) < 1e-5
    off = sampled(guider(guide, merged, loras, **OFF), sigmas=TWO_STEPS)
    assert torch.equal(off, sampled(cfg_guider(applied(pack, merged, loras)), sigmas=TWO_STEPS))


def with_hypertile(model):
    from comfy_extras.nodes_hypertile import HyperTile

    return HyperTile.execute(model, tile_size=32, swap_size=2, max_depth=2, scale_depth=False)[0]


def with_attention_replaced(model):
    clone = model.clone()
    clone.set_model_attn1_replace(lambda q, k, v, extra_options: v, "output", 1, 0)
    return clone


@pytest.mark.parametrize("patch", [with_hypertile, with_attention_replaced])
def test_a_patch_that_may_count_rows_turns_sharing_off_and_says_so_once(patch, guide, pack, loras, caplog):
    model = comfy_model()
    patched, rows = patch(model), encoder_rows(model)

    def picture(ours):
        torch.manual_seed(0)  # HyperTile rolls dice
        return sampled(ours, sigmas=TWO_STEPS)

    ours = guider(guide, patched, loras)
    with caplog.at_level(logging.INFO):
        assert torch.equal(picture(ours), picture(unshared_guider(pack, patched, loras)))
        picture(ours)
        assert set(rows) == {6}
        assert caplog.text.count("each row goes through the whole UNet") == 1
        picture(guider(guide, patched, loras))
        assert caplog.text.count("each row goes through the whole UNet") == 2
    assert relative_error(picture(ours), picture(guider(guide, model, loras))) > 1e-3


@pytest.mark.parametrize("kind", ["guided", "applied"])
def test_torch_compile_changes_no_number_and_compiles_nothing_after_the_first_step(kind, guide, pack, loras):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.utils import counters

    def build(model):
        return guider(guide, model, loras) if kind == "guided" else cfg_guider(applied(pack, model, loras))

    model, graphs = comfy_model(), []
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    ours = sampled(build(compiled), callback=lambda *_: graphs.append(counters["stats"]["unique_graphs"]))
    assert torch.equal(ours, sampled(build(model)))
    assert set(graphs) == {graphs[0]}


class Counting(TorchDispatchMode):
    """Counts the calls of some of torch's operators."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.count = names, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation._schema.name.removeprefix("aten::") in self.names
        return operation(*args, **(kwargs or {}))


def test_guidance_adds_no_wait_for_a_gpu_to_a_step(guide, pack, loras):
    def waits_a_step(ours):
        counts = []
        with Counting("_local_scalar_dense", "equal", "nonzero") as waits:  # for their results a CPU waits
            sampled(ours, callback=lambda *_: counts.append(waits.count))
        return {after - before for before, after in zip(counts, counts[1:], strict=False)}

    model = comfy_model()
    assert waits_a_step(guider(guide, model, loras)) == waits_a_step(cfg_guider(applied(pack, model, loras)))


@pytest.mark.parametrize("prompts", [dict, own_prompts])
def test_all_parts_of_a_layer_are_added_in_one_product(prompts, guide, loras):
    with Counting("addmm_") as products:
        sampled(guider(guide, comfy_model(), loras, **prompts()), sigmas=ONE_STEP)
    assert products.count == sum(map(len, loras["content"].parts.values()))


@pytest.mark.parametrize("kind", ["guided", "applied"])
def test_hooks_are_put_in_once_a_sampling_and_taken_out(kind, guide, pack, loras):
    model, seen = comfy_model(), []
    ours = guider(guide, model, loras) if kind == "guided" else cfg_guider(applied(pack, model, loras))
    layers = dict(model.model.diffusion_model.named_modules())

    def hooks(*_):
        ids = ((name, *layer._forward_hooks, *layer._forward_pre_hooks) for name, layer in layers.items())
        return tuple(entry for entry in ids if len(entry) > 1)

    sampled(ours, callback=lambda *_: seen.append(hooks()))
    assert seen[0] and set(seen) == {seen[0]} and not hooks()


# Control


def controlnet():
    """A tiny ControlNet for the tiny UNet, built as ComfyUI's loader does; random, so that it controls at all."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management

    config = {key: value for key, value in INDEX["unet_config_comfyui"].items() if key != "out_channels"}
    network = randomised(comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=torch.float32))
    return comfy.controlnet.ControlNet(network, load_device=comfy.model_management.get_torch_device())


def t2i_adapter():
    """A tiny T2I adapter of SDXL's kind."""
    import comfy.controlnet
    from comfy.t2i_adapter.adapter import Adapter

    network = randomised(Adapter(channels=[32, 64, 128, 128], nums_rb=2, cin=3 * 16**2, ksize=1, sk=True, xl=True))
    return comfy.controlnet.T2IAdapter(network, network.input_channels, 8, "nearest-exact")


def hints(batch=1):
    return torch.rand(batch, 128, 128, 3, generator=torch.Generator().manual_seed(3))


def controlled(control, on, image=None):
    """Positive and negative, as `on` says: by which of ComfyUI's nodes, and which of them are controlled."""
    from nodes import ControlNetApply, ControlNetApplyAdvanced

    image = hints() if image is None else image
    positive, negative = conditioning("main"), conditioning("uncond")
    if on == "older node":  # which controls the positive, and asks the sampler to control whatever else there is
        return dict(positive=ControlNetApply().apply_controlnet(positive, control(), image, 1.0)[0], negative=negative)
    both = ControlNetApplyAdvanced().apply_controlnet(positive, negative, control(), image, 1.0, 0.0, 1.0)
    return dict(positive=both[0], negative=both[1] if on == "both" else negative)


CONTROLS = pytest.mark.parametrize("control", [controlnet, t2i_adapter])
WAYS = pytest.mark.parametrize("on", ["positive", "both", "older node"])


@CONTROLS
@WAYS
def test_control_changes_the_picture_and_sharing_does_not(control, on, guide, pack, loras):
    model = comfy_model()
    shared, unshared = shared_and_unshared(guide, pack, model, loras, **controlled(control, on))
    assert relative_error(shared, unshared) < 1e-5
    assert relative_error(shared, sampled(guider(guide, model, loras), sigmas=ONE_STEP)) > 1e-3


@CONTROLS
@WAYS
def test_control_without_guidance_is_that_of_the_applied_loras_to_the_bit(control, on, guide, pack, loras):
    model, prompts = comfy_model(), controlled(control, on)
    ours = sampled(guider(guide, model, loras, **OFF, **prompts), sigmas=TWO_STEPS)
    assert torch.equal(ours, sampled(cfg_guider(applied(pack, model, loras), **prompts), sigmas=TWO_STEPS))


@CONTROLS
@pytest.mark.parametrize("on", ["positive", "both"])
def test_a_controlled_step_is_the_sum_of_its_rows(control, on, guide, pack, loras):
    model, prompts = comfy_model(), controlled(control, on)
    ours = sampled(guider(guide, model, loras, **prompts), sigmas=ONE_STEP)
    assert relative_error(ours, by_hand(pack, model, loras, **prompts)) < 1e-5


@CONTROLS
@pytest.mark.parametrize("setting", [dict(end_percent=0.5), dict(start_percent=0.5), dict(reuse_steps=2)])
def test_control_acts_in_all_steps_though_guidance_does_in_some(control, setting, guide, loras, caplog):
    """Two latents, each controlled by an image of its own."""

    def picture(image, start):
        ours = guider(guide, comfy_model(), loras, **controlled(control, "both", image), **setting)
        return sampled(ours, sigmas=THREE_STEPS, start=start)

    together = picture(hints(2), noise(2))
    assert relative_error(together[1, None], picture(hints(2)[1, None], noise(2)[1, None])) < 1e-5
    assert "control could not be applied" not in caplog.text


# Masks, areas, several prompts in one


def masked(bounds):
    from nodes import ConditioningCombine, ConditioningSetMask

    left, right = torch.zeros(2, 1, 16, 16)
    left[..., :8], right[..., 8:] = 1.0, 0.5
    parts = [
        ConditioningSetMask().append(conditioning(name), mask, bounds, 0.8)[0]
        for name, mask in (("main", left), ("content_positive", right))
    ]
    return ConditioningCombine().combine(*parts)[0]


def with_an_area():
    from nodes import ConditioningCombine, ConditioningSetArea

    corner = ConditioningSetArea().append(conditioning("content_positive"), 64, 64, 64, 0, 0.9)[0]
    return ConditioningCombine().combine(conditioning("main"), corner)[0]


def combined():
    from nodes import ConditioningCombine

    return ConditioningCombine().combine(conditioning("main"), conditioning("content_positive"))[0]


POSITIVES = {
    "masks": lambda: masked("default"),
    "bounds of masks": lambda: masked("mask bounds"),
    "area": with_an_area,
    "combined": combined,
}


@pytest.mark.parametrize("positive", POSITIVES.values(), ids=POSITIVES)
def test_a_prompt_in_places_is_guided_as_the_sum_of_its_rows(positive, guide, pack, loras):
    model, positive = comfy_model(), positive()
    shared, unshared = shared_and_unshared(guide, pack, model, loras, positive=positive)
    assert relative_error(shared, unshared) < 1e-5
    assert relative_error(shared, by_hand(pack, model, loras, positive=positive)) < 1e-5
    assert relative_error(shared, sampled(guider(guide, model, loras), sigmas=ONE_STEP)) > 1e-3


@pytest.mark.parametrize("positive", POSITIVES.values(), ids=POSITIVES)
def test_a_prompt_in_places_without_guidance_is_that_of_the_applied_loras_to_the_bit(positive, guide, pack, loras):
    model, positive = comfy_model(), positive()
    ours = sampled(guider(guide, model, loras, **OFF, positive=positive), sigmas=TWO_STEPS)
    theirs = sampled(cfg_guider(applied(pack, model, loras), positive), sigmas=TWO_STEPS)
    assert torch.equal(ours, theirs)


def test_an_area_outside_of_the_picture_is_refused_in_words(guide, loras):
    from nodes import ConditioningSetArea, ConditioningSetAreaPercentage

    beside = ConditioningSetArea().append(conditioning("main"), 64, 64, 256, 8, 1.0)[0]
    below = ConditioningSetAreaPercentage().append(conditioning("main"), 0.5, 0.5, 0.0, 1.0, 1.0)[0]
    for place, at in ((beside, "256 x 8"), (below, "0 x 128")):
        for name in ("positive", "style_positive"):
            with pytest.raises(ValueError, match=f"^{name} has an area that begins at {at} pixels, .* is 64 x 128"):
                tall = noise()[..., :8]
                sampled(guider(guide, comfy_model(), loras, **{name: place}), sigmas=ONE_STEP, start=tall)


@pytest.mark.parametrize("positive", POSITIVES.values(), ids=POSITIVES)
def test_a_latent_batch_with_prompts_in_places_gives_the_pictures_of_its_latents_alone(positive, guide, loras):
    model, positive = comfy_model(), positive()

    def picture(start):
        return sampled(guider(guide, model, loras, positive=positive), sigmas=ONE_STEP, start=start)

    together = picture(noise(2))
    for i in range(2):
        assert relative_error(together[i, None], picture(noise(2)[i, None])) < 1e-5


# The sampler node


STEPS = 2


def latent_of(side=16):
    return {"samples": 2 * torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(5))}


def by_node(*inputs, **changes):
    return latent_by_node(*inputs, **changes)["samples"]


def latent_by_node(guide, model, loras, latent, sampler="euler", scheduler="normal", denoise=1.0, **changes):
    usual = dict(content_strength=1.0, style_strength=1.0, start_percent=0.0, end_percent=1.0, reuse_steps=1, seed=11)
    prompts = dict(positive=conditioning("main"), negative=conditioning("uncond"))
    return guide.Sampler.execute(
        model,
        latent_image=latent,
        steps=STEPS,
        sampler_name=sampler,
        scheduler=scheduler,
        denoise=denoise,
        **{**prompts, **SETTINGS, **usual, **loras, **changes},
    ).result[0]


def samplers():
    """All of ComfyUI's, less those that differ on a GPU only, and the one that takes as many steps as it likes."""
    from comfy.samplers import KSampler

    return [name for name in KSampler.SAMPLERS if name != "dpm_adaptive" and not name.endswith("_gpu")]


def by_ksampler(model, latent, sampler="euler", scheduler="normal", denoise=1.0):
    from nodes import common_ksampler

    prompts = conditioning("main"), conditioning("uncond")
    return common_ksampler(model, 11, STEPS, SETTINGS["cfg"], sampler, scheduler, *prompts, latent, denoise)[0][
        "samples"
    ]


@THEIR_WARNINGS
def test_without_guidance_the_node_is_ksampler_to_the_bit_with_every_sampler_and_scheduler(guide, pack, loras):
    from comfy.samplers import KSampler

    model = comfy_model()
    theirs, latent = applied(pack, model, loras), {**latent_of(8), "batch_index": [2]}  # the third of a batch
    for names in zip(samplers(), cycle(KSampler.SCHEDULERS), cycle([1.0, 0.5]), strict=False):
        ours = by_node(guide, model, loras, latent, *names, **OFF)
        assert torch.equal(ours, by_ksampler(theirs, latent, *names)), names


@pytest.mark.parametrize("settings", [{}, {"structure_lock": True}, {"frames": "consistent"}], ids=str)
def test_nothing_denoised_is_the_latent_that_was_given(settings, guide, loras):
    latent = {**latent_of(), "batch_index": [2]}
    drawn = latent_by_node(guide, comfy_model(), loras, latent, denoise=0.0, **settings)
    assert relative_error(drawn["samples"], latent["samples"]) < 1e-3 and drawn["batch_index"] == [2]


def test_an_empty_latent_of_another_base_model_is_taken_as_one_of_this(guide, loras):
    theirs, ours = (
        by_node(guide, comfy_model(), loras, {"samples": torch.zeros(1, channels, 16, 16)}) for channels in (16, 4)
    )
    assert torch.equal(theirs, ours)


def test_the_node_is_the_guider_with_ksamplers_noise_and_steps(guide, loras):
    import comfy.samplers

    model, sigmas = comfy_model(), comfy.samplers.calculate_sigmas(comfy_model().model.model_sampling, "karras", STEPS)
    start = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(11))
    ours = by_node(guide, model, loras, {"samples": torch.zeros(1, 4, 16, 16)}, scheduler="karras")
    assert torch.equal(ours, sampled(guider(guide, model, loras), sigmas=sigmas, start=start))


@THEIR_WARNINGS
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde", "ddim"])
def test_inpainting_keeps_what_the_mask_leaves_out(sampler, guide, pack, loras):
    from nodes import SetLatentNoiseMask

    mask = torch.zeros(1, 16, 16)
    mask[:, :, 8:] = 1.0
    model, latent = comfy_model(), latent_of()
    masked = SetLatentNoiseMask().set_mask(latent, mask)[0]
    ours = by_node(guide, model, loras, masked, sampler)
    assert relative_error(ours[..., :8], latent["samples"][..., :8]) < 1e-6
    assert relative_error(ours[..., 8:], latent["samples"][..., 8:]) > 1e-1
    off = by_node(guide, model, loras, masked, sampler, **OFF)
    assert torch.equal(off, by_ksampler(applied(pack, model, loras), masked, sampler))
    assert relative_error(ours[..., 8:], off[..., 8:]) > 1e-3


# Structure lock


def test_a_locked_picture_comes_back_when_the_same_model_reconstructs_it(guide, pack):
    """Euler inversion is undone by as many Euler steps, the closer the finer they are."""
    from demo_model import model as demo

    model, clip, vae = demo.load()
    latent = {"samples": vae.encode(loaded("crown-flat", demo.SIZE).movedim(1, -1))}
    empty_prompt = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    guider, sampling = (
        pack.host.guider.build_reconstruction_guider(model, empty_prompt, content=None),
        pack.host.sampling,
    )

    def error(steps):
        sigmas = sampling.ksampler_sigmas(model, steps, "euler", "karras", 1.0)
        inverted = sampling.invert(guider, latent, sigmas)
        reconstructed = sampling.sample(guider, inverted, 0, "euler", sigmas, noise=0)
        return relative_error(reconstructed["samples"], latent["samples"])

    assert error(40) < 0.5 * error(10)
    assert error(80) < 0.1


def test_a_locked_picture_begins_with_no_random_noise(guide, loras):
    model, latent = comfy_model(), latent_of()
    locked = by_node(guide, model, loras, latent, structure_lock=True)
    assert torch.equal(locked, by_node(guide, model, loras, latent, structure_lock=True, seed=12))
    assert torch.equal(locked, by_node(guide, model, loras, {**latent, "noise_mask": None}, structure_lock=True))
    assert relative_error(locked, by_node(guide, model, loras, latent)) > 1e-2


def test_variation_leads_from_the_lock_to_random_noise_and_gives_each_seed_its_own_picture(guide, loras):
    draw = partial(by_node, guide, comfy_model(), loras, latent_of())
    locked, little, much, all_of_it = (draw(structure_lock=True, variation=part) for part in (0.0, 0.1, 0.4, 1.0))
    assert 1e-2 < relative_error(little, locked) < relative_error(much, locked)
    assert relative_error(draw(structure_lock=True, variation=0.4, seed=12), much) > 1e-2
    assert torch.equal(all_of_it, draw())


def test_variation_is_the_share_of_the_variance_that_the_seeds_noise_has(guide, pack, loras, monkeypatch):
    begun, sample = [], pack.host.sampling.sample

    def spy(guider, latent, *inputs, noise=1.0, **settings):
        begun.append((latent["samples"], noise))
        return sample(guider, latent, *inputs, noise=noise, **settings)

    monkeypatch.setattr(pack.host.sampling, "sample", spy)
    for variation in (0.0, 0.36):
        by_node(guide, comfy_model(), loras, latent_of(), structure_lock=True, variation=variation)
    (_, _), (locked, _), (_, _), (varied, noise) = begun  # each is inverted first
    clean = latent_of()["samples"]
    assert noise == pytest.approx(0.6) and relative_error(varied - clean, 0.8 * (locked - clean)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_picture_in_any_precision_is_locked_as_in_fp32(dtype, guide, loras):
    model, latent = comfy_model(), {"samples": latent_of()["samples"].to(dtype)}
    whole = {"samples": latent["samples"].float()}
    locked, wanted = (by_node(guide, model, loras, one, structure_lock=True) for one in (latent, whole))
    assert torch.equal(locked, wanted) and locked.isfinite().all()


def test_a_lock_without_a_picture_or_beside_a_mask_is_refused_in_words(guide, loras):
    with pytest.raises(ValueError, match="latent_image is empty"):
        by_node(guide, comfy_model(), loras, {"samples": torch.zeros(1, 4, 16, 16)}, structure_lock=True)
    with pytest.raises(ValueError, match="remove the mask"):
        masked = {**latent_of(), "noise_mask": torch.ones(1, 16, 16)}
        by_node(guide, comfy_model(), loras, masked, structure_lock=True)


# Frames of a film


ROUNDING = 1e-3  # inversion begins with a division by `NEARLY_CLEAN`


def film_of(count):
    return {"samples": 2 * torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(6))}


def test_frames_are_the_same_in_chunks_of_any_size_and_no_pass_sees_more_than_a_chunk(guide, pack, loras, monkeypatch):
    model, pictures = comfy_model(), {}
    rows = encoder_rows(model)
    for at_once in (3, 8):
        monkeypatch.setattr(pack.host.frames, "AT_ONCE", at_once)
        rows.clear()
        pictures[at_once] = by_node(guide, model, loras, film_of(5), frames="consistent")
        assert max(rows) == 2 * min(at_once, 5)  # cond and uncond, whose encoder the guidance rows share
    assert relative_error(pictures[3], pictures[8]) < ROUNDING


def texts_for_frames(count):
    """A conditioning with a text for each of so many frames."""
    parts = [
        conditioning(name)[0] for name in ("main", "content_positive", "uncond", "style_positive", "style_negative")
    ]
    texts, pooled = zip(*((text, extras["pooled_output"]) for text, extras in parts[:count]), strict=True)
    return [[torch.cat(texts), {**parts[0][1], "pooled_output": torch.cat(pooled)}]]


def masks_for_frames(count):
    from nodes import ConditioningSetMask

    masks = torch.rand(count, 16, 16, generator=torch.Generator().manual_seed(8))
    return ConditioningSetMask().append(conditioning("main"), masks, "default", 1.0)[0]


@pytest.mark.parametrize("positive, count", [(texts_for_frames, 5), (masks_for_frames, 5), (texts_for_frames, 3)])
def test_each_frame_has_its_own_text_and_mask_in_chunks_of_any_size(positive, count, guide, pack, loras, monkeypatch):
    model, pictures = comfy_model(), {}
    for at_once in (3, 8):
        monkeypatch.setattr(pack.host.frames, "AT_ONCE", at_once)
        prompts = dict(positive=positive(count), negative=texts_for_frames(count))
        pictures[at_once] = by_node(guide, model, loras, film_of(5), frames="consistent", **prompts)
    assert relative_error(pictures[3], pictures[8]) < ROUNDING


def test_the_first_frame_is_locked_and_the_others_read_it_too(guide, loras):
    model = comfy_model()
    frames = by_node(guide, model, loras, film_of(3), frames="consistent")
    locked = by_node(guide, model, loras, film_of(3), structure_lock=True)
    assert relative_error(frames[:1], locked[:1]) < ROUNDING
    assert relative_error(frames[1:], locked[1:]) > 10 * ROUNDING
    assert torch.equal(frames, by_node(guide, model, loras, film_of(3), frames="consistent", seed=12))


@pytest.mark.parametrize("patch", [with_pag, with_sag, with_hypertile, with_attention_replaced])
def test_beside_what_changes_self_attention_the_first_frame_is_locked_as_without_frames(patch, guide, loras):
    model = patch(comfy_model())

    def first_frame(**settings):
        torch.manual_seed(0)  # HyperTile rolls dice
        return by_node(guide, model, loras, film_of(3), **settings)[:1]

    assert relative_error(first_frame(frames="consistent"), first_frame(structure_lock=True)) < ROUNDING


def test_frames_cancelled_in_the_second_chunk_leave_the_model_untouched(guide, pack, loras, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    monkeypatch.setattr(pack.host.frames, "AT_ONCE", 2)
    model = loaded_model()
    usual, before = by_node(guide, model, loras, film_of(3), frames="consistent"), everything_about(model)
    passes = []

    def at_the_last_pass(*_):
        passes.append(1)
        if len(passes) == 4 * STEPS:  # each chunk is inverted, then sampled
            cancel()

    hook = model.model.diffusion_model.input_blocks[0][0].register_forward_hook(at_the_last_pass)
    with pytest.raises(InterruptProcessingException):
        by_node(guide, model, loras, film_of(3), frames="consistent")
    hook.remove()
    assert everything_about(model) == before
    assert torch.equal(by_node(guide, model, loras, film_of(3), frames="consistent"), usual)


def test_more_frames_than_a_chunk_with_a_control_picture_each_are_refused_in_words(guide, loras):
    from nodes import ControlNetApplyAdvanced

    prompts = controlled(controlnet, "positive", hints(9))
    one_more = ControlNetApplyAdvanced().apply_controlnet(*prompts.values(), controlnet(), hints(), 1.0, 0.0, 1.0)
    for positive in (prompts["positive"], one_more[0]):
        with pytest.raises(ValueError, match="picture for each frame, which works up to 8"):
            inputs = {**prompts, "positive": positive}
            by_node(guide, comfy_model(), loras, film_of(9), frames="consistent", **inputs)


# Hooks on conditioning


def hooked(name, lora):
    """A logged prompt in whose passes a LoRA acts: Create Hook LoRA, Set Hooks."""
    import comfy.hooks

    hook = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(conditioning(name), hook)


def test_a_lora_hook_on_the_positive_acts_in_that_row_alone(guide, pack, loras, another_lora):
    model, positive = comfy_model(), hooked("main", another_lora)
    shared, unshared = shared_and_unshared(guide, pack, model, loras, positive=positive)
    assert relative_error(shared, unshared) < 1e-5

    def cond(model):
        return one_row(pack, model, loras, wanted_mix(1.0, 1.0), "positive", {"positive": conditioning("main")})

    change = SETTINGS["cfg"] * (cond(with_weight_patches(model, another_lora)) - cond(model))
    assert relative_error(shared, by_hand(pack, model, loras) + change) < 1e-5
    assert change.norm() > 1e-3 * shared.norm()


def test_a_lora_hook_without_guidance_is_that_of_the_applied_loras_to_the_bit(guide, pack, loras, another_lora):
    model, positive = comfy_model(), hooked("main", another_lora)
    off = sampled(guider(guide, model, loras, **OFF, positive=positive), sigmas=TWO_STEPS)
    assert torch.equal(off, sampled(cfg_guider(applied(pack, model, loras), positive), sigmas=TWO_STEPS))


def test_a_lora_hook_on_the_negative_acts_in_the_guidance_that_reads_it(guide, pack, loras, another_lora):
    model, negative = comfy_model(), hooked("uncond", another_lora)
    usual = sampled(guider(guide, model, loras), sigmas=ONE_STEP)
    shared, unshared = shared_and_unshared(guide, pack, model, loras, negative=negative)
    assert relative_error(shared, unshared) < 1e-5
    assert relative_error(shared, by_hand(pack, model, loras, negative=negative)) < 1e-5
    assert relative_error(shared, usual) > 1e-4
    assert torch.equal(sampled(guider(guide, model, loras), sigmas=ONE_STEP), usual)  # the weights are back


# One row, six rows


def test_at_cfg_1_nothing_asks_for_the_unconditional_row(guide, pack, loras):
    model, calls = logging_calls(comfy_model(), pack)
    rows = encoder_rows(model)
    off = sampled(guider(guide, model, loras, cfg=1.0, **OFF), sigmas=TWO_STEPS)
    assert [call.prompts for call in calls] == [[0]] * 2
    assert torch.equal(off, sampled(cfg_guider(applied(pack, model, loras), cfg=1.0), sigmas=TWO_STEPS))
    calls.clear(), rows.clear()
    ours = sampled(guider(guide, model, loras, cfg=1.0), sigmas=ONE_STEP)
    assert sorted(calls[0].prompts) == sorted(["positive", *PROMPTS])
    assert rows == [2]  # the positive, and the negative's words that all four read
    assert relative_error(ours, by_hand(pack, model, loras, cfg=1.0)) < 1e-5


@pytest.mark.parametrize("prediction", ["eps", "v", "edm"])
@pytest.mark.parametrize("prompts", [dict, own_prompts])
def test_a_guided_step_is_the_sum_of_six_passes_by_themselves(prediction, prompts, guide, pack, loras):
    model, prompts = comfy_model(prediction), prompts()
    ours = sampled(guider(guide, model, loras, **prompts), sigmas=ONE_STEP)
    assert relative_error(ours, by_hand(pack, model, loras, **prompts)) < 1e-5
    assert relative_error(ours, sampled(cfg_guider(applied(pack, model, loras)), sigmas=ONE_STEP)) > 1e-3


# Watching and stopping


def previews(ours, **inputs):
    """x and the predicted x0 of every step, as the sampler's callback gets them."""
    steps = []
    sampled(ours, callback=lambda step, x0, x, total: steps.append((x.clone(), x0.clone())), **inputs)
    return steps


def test_every_step_is_previewed_as_the_guided_picture(guide, pack, loras):
    model = comfy_model()
    steps = previews(guider(guide, model, loras))
    assert len(steps) == 6
    scale = model.model.latent_format.scale_factor
    assert relative_error(steps[0][1] / scale, by_hand(pack, model, loras)) < 1e-5
    assert relative_error(steps[-1][1] / scale, sampled(guider(guide, model, loras))) < 1e-6


def test_the_node_shows_a_picture_at_every_step(guide, loras, monkeypatch):
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    shown = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: shown.append((done, preview))
    )
    by_node(guide, comfy_model(), loras, latent_of())
    assert [done for done, _ in shown] == [1, 2]
    assert [picture.size for _, (_, picture, _) in shown] == [(16, 16)] * STEPS
    shown.clear()
    by_node(guide, comfy_model(), loras, film_of(9), frames="consistent")
    assert [done for done, _ in shown] == list(range(1, 9))  # of two chunks, each inverted and sampled


def cancel(*_):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()


def fail(*_):
    raise RuntimeError("a broken layer")


@pytest.mark.parametrize("fault", [cancel, fail])
@pytest.mark.parametrize("where", ["between steps", "in the UNet"])
def test_a_sampling_that_stops_half_way_leaves_the_model_untouched(fault, where, guide, loras):
    from comfy.model_management import InterruptProcessingException

    model = loaded_model()
    ours = guider(guide, model, loras, reuse_steps=2)
    usual = sampled(ours, sigmas=THREE_STEPS)
    before = everything_about(model), everything_about(ours.model_patcher)
    seen = []

    def at_the_second_time(*_):
        seen.append(where)
        if len(seen) == 2:
            fault()

    block = model.model.diffusion_model.output_blocks[1][1]  # inside the style block, LoRAs in place
    hook = block.register_forward_hook(at_the_second_time) if where == "in the UNet" else None
    with pytest.raises((InterruptProcessingException, RuntimeError), match="broken|^$"):
        sampled(ours, sigmas=THREE_STEPS, callback=None if hook else at_the_second_time)
    if hook:
        hook.remove()
    assert len(seen) == 2
    assert (everything_about(model), everything_about(ours.model_patcher)) == before
    assert torch.equal(sampled(ours, sigmas=THREE_STEPS), usual)
    assert torch.equal(sampled(guider(guide, model, loras, reuse_steps=2), sigmas=THREE_STEPS), usual)


# One LoRA, or a wrong one


def only(loras, image):
    return {"content": None, "style": None, image: loras[image]}


@pytest.mark.parametrize("image", ["content", "style"])
def test_one_image_alone_is_guided(image, guide, pack, loras):
    model, one = comfy_model(), only(loras, image)
    off = sampled(guider(guide, model, one, **OFF), sigmas=TWO_STEPS)
    assert torch.equal(off, sampled(cfg_guider(applied(pack, model, one)), sigmas=TWO_STEPS))
    shared, unshared = shared_and_unshared(guide, pack, model, one)
    assert relative_error(shared, unshared) < 1e-5
    assert relative_error(shared, by_hand(pack, model, one)) < 1e-5


def test_loras_of_different_ranks_layers_and_precisions_are_guided_together(guide, pack, loras):
    def other(part):
        half = {path: lora_file.LoraLayer(down[:2], up[:, :2], 5.0) for path, (down, up, _) in part.items()}
        del half["transformer_blocks.0.attn1.to_k"]
        return {path: layer._replace(up=layer.up.bfloat16()) for path, layer in half.items()}

    parts = {role: other(part) for role, part in loras["style"].parts.items()}
    model, odd = comfy_model(), {**loras, "style": lora_file.ImageLora(parts, {})}
    shared, unshared = shared_and_unshared(guide, pack, model, odd)
    assert relative_error(shared, unshared) < 1e-5
    assert relative_error(shared, by_hand(pack, model, odd)) < 1e-5


def test_no_image_at_all_is_refused_in_words(guide):
    with pytest.raises(ValueError, match="Neither content nor style is connected. Connect Load ConsisLoRA"):
        guider(guide, comfy_model(), {"content": None, "style": None})


@pytest.mark.parametrize("image, other", [("content", "style"), ("style", "content")])
def test_a_lora_without_the_part_that_is_wanted_of_it_is_refused_in_words(image, other, guide, loras):
    lacking = lora_file.ImageLora({other: loras[image].part(other)}, {})
    with pytest.raises(ValueError, match=f"This LoRA has no {image} part, only {other}. Choose a file"):
        guider(guide, comfy_model(), {**loras, image: lacking})


@pytest.mark.parametrize("image, other", [("content", "style"), ("style", "content")])
def test_a_lora_with_only_the_wanted_part_is_guided(image, other, guide, pack, loras):
    half = {**loras, image: lora_file.ImageLora({image: loras[image].part(image)}, {})}
    model = comfy_model()
    ours = sampled(guider(guide, model, half), sigmas=ONE_STEP)
    assert relative_error(ours, by_hand(pack, model, half)) < 1e-5


# Windows and reuse


@pytest.mark.parametrize(
    "window, expected",
    [
        (dict(start_percent=0.0, end_percent=0.5), [6, 6, 6, 2, 2, 2]),
        (dict(start_percent=0.5, end_percent=1.0), [2, 2, 2, 6, 6, 6]),
        (dict(start_percent=0.3, end_percent=0.7), [2, 2, 6, 6, 6, 2]),
        (dict(reuse_steps=3), [6, 2, 2, 6, 2, 2]),
        (dict(reuse_steps=2, start_percent=0.3), [2, 2, 6, 2, 6, 2]),
    ],
)
def test_guidance_rows_are_there_where_they_are_asked_for_only(window, expected, guide, pack, loras):
    model, calls = logging_calls(comfy_model(), pack)
    rows = encoder_rows(model)
    sampled(guider(guide, model, loras, **window))
    assert [len(call.prompts) for call in calls] == expected
    assert rows == [2] * 6


def same_x0(ours, theirs):
    return all(torch.equal(x0, their_x0) for (_, x0), (_, their_x0) in zip(ours, theirs, strict=True))


def test_before_the_window_the_picture_is_plain_and_up_to_its_end_it_is_guided(guide, pack, loras):
    model = comfy_model()
    plain = previews(cfg_guider(applied(pack, model, loras)))
    full, late, early, never = (
        previews(guider(guide, model, loras, **window))
        for window in ({}, dict(start_percent=0.5), dict(end_percent=0.5), dict(start_percent=0.7, end_percent=0.3))
    )
    assert same_x0(late[:3], plain[:3]) and same_x0(early[:3], full[:3]) and same_x0(never, plain)
    assert not same_x0(late[3:4], plain[3:4]) and not same_x0(early[3:4], full[3:4])


def test_a_reused_guidance_is_what_it_was_when_it_was_computed(guide, pack, loras):
    model = comfy_model()
    theirs, scale = applied(pack, model, loras), model.model.latent_format.scale_factor

    def plain_at(x, sigma):
        return scale * sampled(cfg_guider(theirs), sigmas=torch.stack([sigma, 0 * sigma]), start=x / sigma)

    steps = previews(guider(guide, model, loras, reuse_steps=3))
    # Not the first, where ComfyUI scales the noise otherwise.
    second, third, fourth = (x0 - plain_at(x, LOGGED["sigmas"][i]) for i, (x, x0) in enumerate(steps[:4]) if i)
    assert relative_error(third, second) < 1e-3
    assert relative_error(fourth, third) > 1e-1


@THEIR_WARNINGS
def test_with_every_sampler_a_guidance_that_is_not_reused_is_computed_in_every_pass(guide, pack, loras):
    """Some samplers ask twice at one noise level, for two latents."""
    (model, calls), stale = logging_calls(comfy_model(), pack), []
    for sampler in samplers():
        calls.clear()
        by_node(guide, model, loras, latent_of(8), sampler)
        if {len(call.prompts) for call in calls} != {6}:
            stale.append(sampler)
    assert stale == []


def test_a_sampler_that_goes_back_in_noise_gets_its_guidance_anew(guide, pack, loras, monkeypatch):
    import comfy.samplers

    def back_and_forth(model, x, sigmas, extra_args, **_):
        for step in (2, 0, 1):
            x0 = model(x, sigmas[step] * x.new_ones(len(x)), **extra_args)
        return x0

    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda name: comfy.samplers.KSAMPLER(back_and_forth))
    model, calls = logging_calls(comfy_model(), pack)
    sampled(guider(guide, model, loras, reuse_steps=3))
    assert [len(call.prompts) for call in calls] == [6, 6, 2]


@THEIR_WARNINGS
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde"])
def test_guidance_can_be_reused_with_samplers_that_ask_more_than_once_a_step(sampler, guide, pack, loras):
    model, calls = logging_calls(comfy_model(), pack)
    assert sampled(guider(guide, model, loras, reuse_steps=3), sampler=sampler).isfinite().all()
    assert {len(call.prompts) for call in calls} == {2, 6}
