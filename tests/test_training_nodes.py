"""The training nodes on a real ComfyUI model: every kind of SDXL checkpoint trains, and stays exactly as it was."""

import hashlib
import itertools
import logging
import shutil
import time
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from reference import DATA, INDEX, comfy_conditioning, comfy_model, flat, relative_error, run

from consislora_core import lora_file
from consislora_core.schedule import image_stage
from consislora_core.trainer import StepEvent

TENSORS = run("stage1_content")
FEW_STEPS = dict(steps=3, transition_step=2, learning_rate=1e-3, reconstruction_learning_rate=1e-3, rank=2, seed=0)


pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def nodes(pack):
    return pack.nodes.train


def inputs(**changes):
    """Latent and conditioning as VAE Encode and CLIP Text Encode hand them over: inference tensors."""
    with torch.inference_mode():
        others = dict(
            latent={"samples": (TENSORS["z_0"] / INDEX["vae_scaling_factor"]).clone()},
            positive=comfy_conditioning(TENSORS),
            precision="auto",
        )
    return {**FEW_STEPS, **others, **changes}


def train_image(nodes, model, **changes):
    with torch.inference_mode():
        return nodes.TrainImage.execute(model, **inputs(**changes)).result


def train_style(nodes, model, content_lora, **changes):
    settings = inputs(**changes)
    del settings["transition_step"], settings["learning_rate"]
    with torch.inference_mode():
        return nodes.TrainStyle.execute(model, content_lora=content_lora, noise_offset=0.03, **settings).result


PATCHER = ("patches", "object_patches", "injections", "wrappers", "callbacks", "hook_patches", "model_options",
           "attachments")  # fmt: skip


def everything_about(model):
    """All that training could have left behind, in a form that compares."""
    base, layers = model.model, {}
    for name, module in base.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        plain = {key: v for key, v in vars(module).items() if not key.startswith("_") and not torch.is_tensor(v)}
        layers[name] = (type(module), list(module._modules), hooks, plain, module.training)
    tensors = {}
    for name, p in [*base.named_parameters(), *base.named_buffers()]:
        digest = hashlib.sha256(p.detach().float().numpy().tobytes()).hexdigest()
        tensors[name] = (id(p), p.data_ptr(), p.dtype, p.requires_grad, p.is_inference(), p.grad is None, digest)
    patcher = {key: len(v) if hasattr(v, "__len__") else v for key, v in vars(model).items() if key in PATCHER}
    return layers, tensors, patcher, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def loaded_model(**kind):
    """A model that ComfyUI has already loaded, which notes on it where its weights are."""
    import comfy.model_management

    model = comfy_model(**kind)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    return model


def picture(model):
    import comfy.sample

    prompts, latent = [comfy_conditioning(TENSORS)] * 2, torch.zeros(1, 4, 16, 16)
    how = 2, 3.0, "euler", "normal"
    with torch.inference_mode():
        return comfy.sample.sample(model, latent + 1, *how, *prompts, latent, disable_pbar=True, seed=1)


def test_a_pair_is_trained(nodes):
    model = comfy_model()
    lora, loss_map, lora_model = train_image(nodes, model)
    assert {role: len(part) for role, part in lora.parts.items()} == {"content": 16, "style": 16}
    assert len(loss_map["loss"]) == 3
    assert len(lora_model) == 3 * 32
    assert lora.metadata["consislora.steps"] == "3"
    style, loss_map, _ = train_style(nodes, model, lora)
    assert len(loss_map["loss"]) == 3
    assert torch.equal(
        style.parts["content"]["transformer_blocks.0.attn1.to_q"].up,
        lora.parts["content"]["transformer_blocks.0.attn1.to_q"].up,
    )
    assert not torch.equal(
        style.parts["style"]["transformer_blocks.0.attn1.to_q"].up,
        lora.parts["style"]["transformer_blocks.0.attn1.to_q"].up,
    )


def test_a_model_with_loras_applied_trains_with_them_on(nodes, pack):
    model = comfy_model()
    lora, plain, _ = train_image(nodes, model)
    with torch.inference_mode():
        applied = pack.nodes.lora.Apply.execute(model, 8.0, 8.0, content=lora, style=lora).result[0]
    _, on_top, _ = train_image(nodes, applied)
    assert on_top["loss"][0] != plain["loss"][0]


@pytest.mark.parametrize("prediction", ["eps", "v", "edm"])
@pytest.mark.parametrize(
    ("stored", "cast"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float16, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
    ],
    ids=["fp32", "bf16", "fp16", "fp16 cast to fp32", "fp8 cast to fp32"],
)
def test_every_kind_of_checkpoint_trains(nodes, comfy, prediction, stored, cast):
    lora, loss_map, _ = train_image(nodes, comfy_model(prediction, stored, cast))
    assert all(torch.tensor(loss_map["loss"]).isfinite())
    assert all(
        layer.up.any() and layer.up.dtype == torch.float32 for part in lora.parts.values() for layer in part.values()
    )


@pytest.mark.parametrize(("fast_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_what_the_model_samples_in_but_never_fp16(pack, comfy, monkeypatch, fast_bf16, dtype):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device: fast_bf16)
    models = comfy_model(dtype=torch.float16), comfy_model(dtype=torch.bfloat16), comfy_model(manual_cast=torch.float16)
    chosen = [pack.host.training_model.training_dtype(model, "auto") for model in models]
    assert chosen == [dtype, torch.bfloat16, dtype]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_nearly_alike(nodes, comfy, precision):
    expected = train_image(nodes, comfy_model(), precision="fp32")[1]["loss"]
    assert train_image(nodes, comfy_model(), precision=precision)[1]["loss"] == pytest.approx(expected, rel=0.1)


def test_a_torch_without_onednn_trains_alike(nodes, pack, store, monkeypatch):
    expected = train_image(nodes, comfy_model(), precision="fp32")[1]["loss"]
    shutil.rmtree(store.folder)
    monkeypatch.setattr(pack.host.frozen_unet, "_uses_onednn", lambda *_: False)
    assert train_image(nodes, comfy_model(), precision="fp32")[1]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_lean_trains_the_same_bits_as_fast_and_saves_fewer_tensors_for_backward(nodes, comfy, store, precision):
    model, trained, kept = comfy_model(), {}, {}
    for memory in ("fast", "lean"):
        sizes = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            lora, loss_map, _ = train_image(nodes, model, precision=precision, memory=memory)
        trained[memory], kept[memory] = (bits(lora), loss_map), sum(sizes)
        shutil.rmtree(store.folder)
    assert trained["lean"] == trained["fast"]
    assert kept["lean"] < kept["fast"] / 2


def test_lean_trains_a_model_with_loras_applied_as_fast_does(nodes, pack, store):
    model = comfy_model()
    lora, *_ = train_image(nodes, model)
    with torch.inference_mode():
        applied = pack.nodes.lora.Apply.execute(model, 8.0, 8.0, content=lora, style=lora).result[0]
    fast, *_ = train_image(nodes, applied, memory="fast")
    shutil.rmtree(store.folder)
    lean, *_ = train_image(nodes, applied, memory="lean")
    assert bits(lean) == bits(fast)


def test_auto_trains_lean_where_memory_is_short_and_says_so(nodes, comfy, store, monkeypatch, caplog):
    import comfy.model_management

    caplog.set_level(logging.INFO)
    lora, *_ = train_image(nodes, comfy_model())
    assert "memory auto trains fast" in caplog.text
    shutil.rmtree(store.folder)

    def little(device=None, torch_free_too=False):  # enough for lean
        return (6e6, 6e6) if torch_free_too else 6e6

    monkeypatch.setattr(comfy.model_management, "get_free_memory", little)
    assert bits(train_image(nodes, comfy_model())[0]) == bits(lora)
    assert "memory auto trains lean" in caplog.text


def test_a_training_has_the_room_of_its_activations_and_other_models_leave(nodes, comfy, store, monkeypatch):
    import comfy.model_management

    management, required = comfy.model_management, []
    other, load = loaded_model(), management.load_models_gpu

    def spy(models, memory_required=0, **settings):
        required.append(memory_required)
        load(models, memory_required=memory_required, **settings)

    monkeypatch.setattr(management, "load_models_gpu", spy)
    for memory in ("fast", "lean"):
        shutil.rmtree(store.folder, ignore_errors=True)
        train_image(nodes, comfy_model(), memory=memory)
    train_each(nodes, comfy_model(), 1, 2, memory="fast")
    assert required[0] > required[1] > 0 and required[2] == 2 * required[0]
    assert all(loaded.model is not other for loaded in management.current_loaded_models)


def test_comfyuis_flag_for_training_is_up_while_a_training_runs(nodes, comfy, monkeypatch):
    import comfy.model_management

    model, flags = comfy_model(), []
    apply_model = model.model.apply_model

    def spy(*args, **kwargs):
        flags.append(comfy.model_management.in_training)
        return apply_model(*args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "in_training", False, raising=False)
    monkeypatch.setattr(model.model, "apply_model", spy)
    train_image(nodes, model)
    assert flags == [True] * 3 and comfy.model_management.in_training is False


def without_backward(users, q, *args, **kwargs):
    """As the kernels of SageAttention and flash-attention."""
    with torch.no_grad():
        return users(q, *args, **kwargs)


@pytest.mark.parametrize("way", ["flag", "node"])
def test_training_has_an_attention_with_a_backward_pass_whatever_the_user_chose(nodes, comfy, store, monkeypatch, way):
    import comfy.ldm.modules.attention as attention

    usual, called = train_image(nodes, comfy_model())[0], []
    shutil.rmtree(store.folder)
    model, own = comfy_model(), attention.optimized_attention

    def chosen(*args, **kwargs):
        called.append(1)
        return without_backward(own, *args, **kwargs)

    if way == "flag":
        for name in ("optimized_attention", "optimized_attention_masked"):
            monkeypatch.setattr(attention, name, attention.wrap_attn(chosen))
    else:
        model.model_options["transformer_options"]["optimized_attention_override"] = without_backward
    assert bits(train_image(nodes, model)[0]) == bits(usual)
    assert not called
    picture(model)
    assert called or way == "node"


def test_the_choice_of_an_attention_kernel_trains_nothing_again(nodes, comfy):
    model = comfy_model()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda users, *a, **k: users(*a, **k)
    assert key(nodes, model) == key(nodes, comfy_model())


@pytest.mark.parametrize("fused", [True, False])
def test_no_scores_of_attention_are_kept_for_backward(nodes, pack, comfy, monkeypatch, fused):
    import comfy.ldm.modules.attention as attention

    if not fused:  # as torch's attention is on MPS and on older AMD cards

        def storing(q, k, v, heads, **_):
            q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
            scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            return (scores @ v).transpose(1, 2).flatten(2)

        monkeypatch.setattr(attention, "attention_pytorch", storing)
        monkeypatch.setattr(pack.host.training_model, "attention_pytorch", storing)
        monkeypatch.setattr(pack.host.training_model, "has_fused_attention", lambda device: False)
    largest = []

    def note(tensor):
        largest.append(tensor.numel())
        return tensor

    latent = {"samples": torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        train_image(nodes, comfy_model(), latent=latent)
    heads, pixels = 2, 16 * 16
    assert max(largest) < heads * pixels**2


@pytest.mark.parametrize("shape", [(16, 24), (20, 12), (17, 16), (2, 520)])
def test_latents_of_any_size_and_aspect_train(nodes, comfy, shape):
    latent = {"samples": torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(0))}
    assert len(train_image(nodes, comfy_model(), latent=latent)[1]["loss"]) == 3


def test_size_conditioning_is_the_pictures_own_size_unless_the_conditioning_names_one(pack):
    bridge, model = pack.host.training_model, comfy_model()
    z_0 = torch.zeros(1, 4, 16, 24)
    pooled = {"pooled_output": TENSORS["pooled_prompt_embeds"]}
    named = {**pooled, "width": 192, "height": 128, "crop_w": 0, "crop_h": 0, "target_width": 192, "target_height": 128}
    other = {**named, "width": 512}
    own, same, different = (
        bridge.encoded_conditioning(model, [[TENSORS["prompt_embeds"], extras]], z_0)["y"]
        for extras in (pooled, named, other)
    )
    assert torch.equal(own, same)
    assert not torch.equal(own, different)


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("ending", ["success", "cancel", "failure"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_users_model_is_exactly_as_it_was(nodes, pack, ending, stored, memory, monkeypatch):
    import comfy.model_management

    model = loaded_model(dtype=stored, manual_cast=torch.float32)
    before_picture, before = picture(model), everything_about(model)
    steps_seen = []

    def end_early(progress, event):
        steps_seen.append(event.step)
        if len(steps_seen) == 2 and ending == "cancel":
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
        if len(steps_seen) == 2 and ending == "failure":
            raise RuntimeError("injected")

    monkeypatch.setattr(pack.host.progress.Progress, "show", end_early)
    if ending == "success":
        train_image(nodes, model, memory=memory)
    else:
        stop = RuntimeError if ending == "failure" else comfy.model_management.InterruptProcessingException
        with pytest.raises(stop):
            train_image(nodes, model, memory=memory)
        assert steps_seen == [1, 2]
    assert everything_about(model) == before
    assert torch.equal(picture(model), before_picture)


def test_cancel_in_the_middle_of_a_forward_pass_leaves_the_model_as_it_was(nodes, comfy):
    import comfy.model_management

    model = loaded_model()
    before = everything_about(model)

    def stop(*_):
        raise comfy.model_management.InterruptProcessingException

    handle = model.model.diffusion_model.output_blocks[4][0].register_forward_pre_hook(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train_image(nodes, model)
    handle.remove()
    assert everything_about(model) == before


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_code_that_other_nodes_put_into_layers_acts_in_training_and_stays(nodes, comfy, memory):
    model, called = loaded_model(), set()
    for name, layer in model.model.diffusion_model.output_blocks.named_modules():
        if type(layer).__name__ in ("Linear", "Conv2d", "GEGLU", "BasicTransformerBlock", "ResBlock"):

            def forward(*args, own=layer.forward, name=name, **kwargs):
                called.add(name)
                return own(*args, **kwargs)

            layer.forward = forward
    before = everything_about(model)
    train_image(nodes, model, memory=memory)
    assert everything_about(model) == before
    assert called == {
        name for name, layer in model.model.diffusion_model.output_blocks.named_modules() if "forward" in vars(layer)
    }


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_lora_in_bypass_mode_acts_in_training_as_a_weight_patch_does(nodes, comfy, tmp_path, memory):
    pytest.importorskip("comfy.weight_adapter.bypass", reason="newer ComfyUI has it")
    import comfy.sd
    import comfy.utils

    lora_file.write(lora_file.read(DATA / "loras" / "stage1_style.safetensors"), tmp_path / "x.safetensors")
    with torch.inference_mode():
        lora = comfy.utils.load_torch_file(str(tmp_path / "x.safetensors"))
        patched = comfy.sd.load_lora_for_models(comfy_model(), None, lora, 2.0, 0.0)[0]
        bypassed = comfy.sd.load_bypass_lora_for_models(comfy_model(), None, lora, 2.0, 0.0)[0]
    wanted, losses, plain = (
        train_image(nodes, model, memory=memory)[1]["loss"] for model in (patched, bypassed, comfy_model())
    )
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert losses != pytest.approx(plain, rel=1e-3)


def sd15_model():
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(dict(
        image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[1, 0], transformer_depth_output=[1, 1, 0, 0], transformer_depth_middle=0, context_dim=64,
        use_spatial_transformer=True, legacy=False,
    ))  # fmt: skip
    config.unet_config.update(num_heads=2, num_head_channels=-1)
    config.set_inference_dtype(torch.float32, None)
    return comfy.model_patcher.ModelPatcher(config.get_model({}), torch.device("cpu"), torch.device("cpu"))


TEXT, POOLED = TENSORS["prompt_embeds"], {"pooled_output": TENSORS["pooled_prompt_embeds"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent": {"samples": torch.zeros(0, 4, 16, 16)}}, "latent has shape .0, 4, 16, 16..*Connect VAE Encode"),
        (
            {"latent": {"samples": torch.ones(1, 16, 16, 16)}},
            "latent has shape .1, 16, 16, 16.; this model takes .*4 channels",
        ),
        ({"latent": {"samples": torch.full((1, 4, 16, 16), torch.nan)}}, "latent holds values that are not numbers"),
        ({"latent": {"samples": torch.zeros(1, 4, 16, 16)}}, "Training needs a picture, and latent is empty"),
        ({"positive": []}, "positive holds no text"),
        ({"positive": 2 * [[TEXT, POOLED]]}, "positive holds 2 texts; training takes one"),
        (
            {"positive": [[torch.zeros(1, 77, 768), POOLED]]},
            "text features of width 768, this model takes 64.*CLIP of another base model",
        ),
        ({"positive": [[TEXT, {}]]}, "positive has no pooled text vector"),
        ({"positive": [[TEXT, {"pooled_output": torch.zeros(1, 1280)}]]}, "pooled vector of width 1280"),
        ({"steps": 0}, "steps is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"transition_step": 4}, "transition_step is 4; .* from 0 to steps .3."),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_named_and_the_model_stays_as_it_was(nodes, comfy, changes, words):
    model = loaded_model()
    before = everything_about(model)
    with pytest.raises(ValueError, match=words):
        train_image(nodes, model, **changes)
    assert everything_about(model) == before
    assert len(train_image(nodes, model)[1]["loss"]) == 3


def test_a_model_without_the_roles_is_refused(nodes, pack):
    with pytest.raises(
        ValueError, match="^model is no SDXL model.*choose an SDXL checkpoint.*content in output_blocks.0.1"
    ):
        train_image(nodes, sd15_model())
    with pytest.raises(ValueError, match="^model is no SDXL model"):
        pack.nodes.lora.Apply.execute(sd15_model(), 1.0, 1.0)


def test_a_lora_of_another_size_is_refused(nodes, pack):
    model = comfy_model()
    lora = train_image(nodes, model)[0]
    wide = replace(
        lora,
        parts={
            role: {path: layer._replace(down=torch.zeros(2, 640)) for path, layer in part.items()}
            for role, part in lora.parts.items()
        },
    )
    with pytest.raises(
        ValueError, match="content LoRA fits layers of 640 to 128 features where this model has 128 to 128"
    ):
        pack.nodes.lora.Apply.execute(model, 1.0, 1.0, content=wide)
    with pytest.raises(ValueError, match="trained on another architecture"):
        train_style(nodes, model, wide)
    shallow = replace(lora, parts={"content": dict(list(lora.parts["content"].items())[:8])})
    with pytest.raises(ValueError, match="content LoRA has 8 layers where this model has 16"):
        train_style(nodes, model, shallow)


def test_stage_two_without_a_content_part_is_refused(nodes, pack):
    lora = train_image(nodes, comfy_model())[0]
    with pytest.raises(ValueError, match="no content part, only style"):
        train_style(nodes, comfy_model(), replace(lora, parts={"style": lora.parts["style"]}))


# The store


def bits(lora):
    return {
        (role, path): (layer.down.numpy().tobytes(), layer.up.numpy().tobytes(), layer.alpha)
        for role, part in lora.parts.items()
        for path, layer in part.items()
    }, lora.metadata


@pytest.fixture
def steps(pack, monkeypatch):
    """The steps that are trained; `steps.cancel_at` is where the user presses cancel."""
    import comfy.model_management

    class Steps(list):
        cancel_at = None

    steps, show = Steps(), pack.host.progress.Progress.show

    def spy(progress, event):
        steps.append(event.step)
        steps.losses = progress.losses
        if event.step == steps.cancel_at:
            comfy.model_management.interrupt_current_processing()
        show(progress, event)

    monkeypatch.setattr(pack.host.progress.Progress, "show", spy)
    return steps


def test_the_same_training_is_done_once(nodes, comfy, steps, caplog):
    caplog.set_level(logging.INFO)
    lora, loss_map, lora_model = train_image(nodes, comfy_model())
    again, again_loss_map, again_model = train_image(nodes, comfy_model())
    assert steps == [1, 2, 3]
    assert caplog.text.count("image stage: trained before, taken from ") == 1
    assert bits(again) == bits(lora)
    assert again_loss_map == loss_map
    assert again_model.keys() == lora_model.keys()
    style, *_ = train_style(nodes, comfy_model(), lora)
    assert bits(train_style(nodes, comfy_model(), again)[0]) == bits(style)
    assert steps == [1, 2, 3, 1, 2, 3]


def other_latent():
    latent = {"samples": (TENSORS["z_0"] / INDEX["vae_scaling_factor"]).clone()}
    latent["samples"][0, 0, 0, 0] += 1e-6
    return latent


CHANGES = [
    {"steps": 4}, {"transition_step": 1}, {"learning_rate": 1.1e-3}, {"reconstruction_learning_rate": 1.1e-3},
    {"rank": 3}, {"seed": 1}, {"precision": "bf16"}, {"preset": "quality"}, {"preset": "fast"}, {"preset": "draft"},
    {"latent": other_latent()}, {"positive": [[TEXT + 1e-6, POOLED]]},
    {"positive": [[TEXT, {"pooled_output": POOLED["pooled_output"] + 1e-6}]]}, {"positive": [[TEXT, POOLED]]},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes)))
def test_a_changed_setting_trains_anew(nodes, comfy, steps, changes):
    train_image(nodes, comfy_model())
    steps.clear()
    train_image(nodes, comfy_model(), **changes)
    assert steps


def test_what_only_a_sampler_reads_of_the_text_trains_nothing_anew_and_is_logged(nodes, comfy, steps, caplog):
    from nodes import ConditioningSetArea, ConditioningSetMask

    caplog.set_level(logging.INFO)
    plain = comfy_conditioning(TENSORS)
    lora, *_ = train_image(nodes, comfy_model(), positive=plain)
    in_place = ConditioningSetMask().append(plain, torch.ones(1, 128, 128).tril(), "default", 0.5)[0]
    in_place = ConditioningSetArea().append(in_place, 64, 64, 0, 0, 0.5)[0]
    in_place[0][1]["control"] = object()  # which has no lasting name
    again, *_ = train_image(nodes, comfy_model(), positive=in_place)
    assert steps == [1, 2, 3] and bits(again) == bits(lora)
    assert "positive has area, control, mask, mask_strength" in caplog.text


def compiled(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(clone, backend="eager")
    return clone


def cached(model, node="EasyCacheNode"):
    from comfy_extras import nodes_easycache

    settings = dict(reuse_threshold=0.2, start_percent=0.1, end_percent=0.95, verbose=False)
    return getattr(nodes_easycache, node).execute(model, **settings)[0]


@pytest.mark.parametrize("faster", [compiled, cached, partial(cached, node="LazyCacheNode")])
def test_what_makes_sampling_faster_has_no_part_in_training(nodes, comfy, steps, store, faster):
    lora, *_ = train_image(nodes, faster(comfy_model()))
    assert steps == [1, 2, 3]
    assert bits(train_image(nodes, comfy_model())[0]) == bits(lora) and steps == [1, 2, 3]  # from the store


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_model_whose_values_are_changed_in_place_is_refused_in_words(nodes, comfy, memory):
    from comfy_extras.nodes_freelunch import FreeU_V2

    model = FreeU_V2().patch(comfy_model(), 1.3, 1.4, 0.9, 0.2)[0]
    with pytest.raises(ValueError, match="in place, as FreeU_V2 does.* Connect the model from before that node"):
        train_image(nodes, model, memory=memory)


def test_another_content_part_trains_stage_two_anew(nodes, comfy, steps):
    model = comfy_model()
    one, other = (train_image(nodes, model, seed=seed)[0] for seed in (0, 1))
    train_style(nodes, model, one)
    steps.clear()
    train_style(nodes, model, other)
    assert steps == [1, 2, 3]


def key(nodes, model, precision="fp32"):
    latent, positive = (inputs()[name] for name in ("latent", "positive"))
    stage = nodes.image_stage(3, 2, 1e-3, 1e-3, rank=2)
    return nodes.TrainingRequest.from_inputs(model, latent, positive, stage, precision).key


def with_lora(lora_model, strength, model=None):
    """As ComfyUI's own Load LoRA does it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model or comfy_model(), None, lora_model, strength, 0)[0]


def with_one_layer_changed(name):
    model = comfy_model()
    with torch.inference_mode():
        model.model.diffusion_model.get_parameter(name).mul_(1.01)
    return model


def merged(ratio):
    """As ComfyUI's ModelMergeSimple does it."""
    model, other = comfy_model(), with_one_layer_changed("input_blocks.1.0.in_layers.2.weight")
    for name, patch in other.get_key_patches("diffusion_model.").items():
        model.add_patches({name: patch}, 1 - ratio, ratio)
    return model


def with_other_sampling():
    """As ComfyUI's ModelSamplingDiscrete does it."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(comfy_model(), "v_prediction", True)[0]


def test_models_that_differ_anywhere_have_keys_of_their_own(nodes, comfy):
    lora_model, other_lora_model = (train_image(nodes, comfy_model(), seed=seed)[2] for seed in (0, 1))
    models = [
        comfy_model(), comfy_model("v"), comfy_model("edm"), comfy_model(dtype=torch.float16),
        with_one_layer_changed("input_blocks.0.0.weight"), with_one_layer_changed("out.2.bias"),
        with_one_layer_changed("middle_block.1.norm.weight"), with_lora(lora_model, 1.0), with_lora(lora_model, 0.5),
        with_lora(other_lora_model, 1.0), with_lora(lora_model, 1.0, with_lora(lora_model, 1.0)), merged(0.5),
        merged(0.25), with_other_sampling(),
    ]  # fmt: skip
    keys = [key(nodes, model) for model in models]
    assert None not in keys
    for (i, one), (j, other) in itertools.combinations(enumerate(keys), 2):
        assert one != other, (i, j)
    assert keys == [key(nodes, model) for model in models]
    assert key(nodes, with_lora(lora_model, 1.0)) == keys[7]
    assert key(nodes, merged(0.5)) == keys[11]


def test_a_model_has_the_same_key_whatever_is_loaded(nodes, comfy):
    """ComfyUI lays a LoRA into the weights of the very model that all clones share."""
    import comfy.model_management

    plain = comfy_model()
    lora_model = train_image(nodes, plain)[2]
    patched = with_lora(lora_model, 1.0, plain)
    keys = key(nodes, plain), key(nodes, patched)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patched])
    assert (key(nodes, plain), key(nodes, patched)) == keys


def test_a_model_that_other_nodes_wrap_in_code_is_trained_without_the_store(nodes, pack, steps, store, caplog):
    caplog.set_level(logging.INFO)
    model = comfy_model()
    model.set_model_attn1_patch(lambda q, k, v, extra_options: (q, k, v))
    first, *_ = train_image(nodes, model)
    assert bits(train_image(nodes, model)[0]) == bits(first)
    assert steps == [1, 2, 3, 1, 2, 3]
    assert "not looked up in the store" in caplog.text
    assert not store.folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.add_weight_wrapper("diffusion_model.middle_block.1.proj_in.weight", lambda weight: weight),
        lambda model: model.add_object_patch("diffusion_model.out.2", torch.nn.Identity()),
        lambda model: model.add_callback("on_pre_run", lambda patcher: None),
        lambda model: model.set_injections("theirs", [object()]),
    ],
    ids=["weights", "layer", "callback", "injection"],
)
def test_a_model_that_code_of_other_nodes_changes_has_no_key(nodes, comfy, change):
    model = comfy_model()
    change(model)
    assert key(nodes, model) is None


@pytest.mark.parametrize("mask", [None, torch.ones(1, 128, 128).tril()], ids=["everything", "masked"])
def test_cancel_and_queue_again_goes_on_and_ends_with_the_same_bits(nodes, comfy, steps, store, caplog, mask):
    import comfy.model_management

    caplog.set_level(logging.INFO)
    whole, loss_map, _ = train_image(nodes, comfy_model(), steps=6, mask=mask)
    shutil.rmtree(store.folder)
    steps.clear()
    steps.cancel_at = 4
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train_image(nodes, comfy_model(), steps=6, mask=mask)
    steps.cancel_at = None
    lora, again_loss_map, _ = train_image(nodes, comfy_model(), steps=6, mask=mask)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert "image stage: goes on from step 4" in caplog.text
    assert bits(lora) == bits(whole)
    assert again_loss_map == loss_map == {"loss": steps.losses}


def test_cancel_in_the_first_step_leaves_no_checkpoint(nodes, comfy, steps, store, caplog):
    import comfy.model_management

    model = comfy_model()
    first_layer = model.model.diffusion_model.time_embed[0]
    handle = first_layer.register_forward_pre_hook(lambda *_: comfy.model_management.interrupt_current_processing())
    with pytest.raises(comfy.model_management.InterruptProcessingException):  # from the layer itself
        train_image(nodes, model)
    handle.remove()
    train_image(nodes, model)
    assert steps == [1, 2, 3]
    assert "damaged" not in caplog.text


def test_the_preview_of_a_very_wide_picture_has_a_height(nodes, comfy, monkeypatch):
    import comfy.utils

    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: shown.append(preview))
    train_image(nodes, comfy_model(), latent={"samples": torch.randn(1, 4, 2, 520)})
    assert shown[0][1].size == (256, 1)


def images(*shifts):
    z_0 = inputs()["latent"]["samples"]
    return {"samples": torch.cat([z_0.roll(shift, -1) for shift in shifts])}


def train_each(nodes, model, *shifts, **changes):
    defaults = {"latent": images(*shifts), "learning_rate": 2e-4, "reconstruction_learning_rate": 1e-4, "at_once": 2}
    with torch.inference_mode():
        return nodes.TrainImages.execute(model, **inputs(**{**defaults, **changes})).result[0]


def test_the_time_left_is_that_of_all_steps_to_go_and_at_the_end_the_least_memory_is_told(pack, comfy, monkeypatch):
    import comfy.model_management

    stage, captions = image_stage(100, 50), []
    progress = pack.host.progress.Progress(comfy_model(), stage, None, run=(1, 3))
    for second, (step, free) in enumerate([(11, 9e9), (21, 2e9), (100, 4e9)]):
        monkeypatch.setattr(time, "monotonic", lambda now=10.0 * second: now)
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device, free=free: free)
        progress.show(StepEvent(step, "image", "noise", (1.0,), 1e-4, 1.0, torch.zeros(1, 4, 8, 8)))
        captions.append(progress.time_and_memory(step))
    assert captions == ["9.0 GB free", "2:59 left, 2.0 GB free", "took 0:20, at least 2.0 GB free"]


def test_each_image_gets_the_lora_it_would_get_alone_and_is_never_trained_again(nodes, comfy, steps, store):
    rates = dict(learning_rate=2e-4, reconstruction_learning_rate=1e-4)
    model = comfy_model()
    alone, losses, _ = zip(
        *(train_image(nodes, model, latent=images(shift), **rates) for shift in (0, 1, 2)), strict=True
    )
    shutil.rmtree(store.folder)
    train_image(nodes, model, latent=images(1), **rates)
    steps.clear()
    each = train_each(nodes, model, 0, 1, 2, 0)
    assert steps == [1, 2, 3]
    for ours, theirs in zip(each, [*alone, alone[0]], strict=True):
        assert relative_error(flat(ours.parts), flat(theirs.parts)) < 1e-4
        assert ours.metadata == theirs.metadata
    assert len({lora.metadata["consislora.image_hash"] for lora in each}) == 3
    train_each(nodes, model, 2, 1, 0)
    _, again, _ = train_image(nodes, model, latent=images(2), **rates)
    assert again["loss"] == pytest.approx(losses[2]["loss"], rel=1e-4)
    assert steps == [1, 2, 3]


def test_the_bar_goes_on_from_one_image_to_the_next(nodes, comfy, monkeypatch):
    import comfy.utils

    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: shown.append((done, total)))
    train_each(nodes, comfy_model(), 0, 1, at_once=1)
    done, totals = zip(*shown, strict=True)  # newer ComfyUI shows ten a second at most
    assert list(done) == sorted(set(done)) and done[-1] == 6
    assert set(totals) == {6}


def test_cancel_among_several_images_keeps_what_is_done_and_goes_on(nodes, comfy, steps, store):
    import comfy.model_management

    whole = train_each(nodes, comfy_model(), 0, 1, 2, 3, 4)
    shutil.rmtree(store.folder)
    steps.clear()
    steps.cancel_at = 2

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train_each(nodes, comfy_model(), 0, 1, 2, 3, 4)
    assert steps == [1, 2]
    steps.cancel_at = None
    again = train_each(nodes, comfy_model(), 0, 1, 2, 3, 4)
    assert steps == [1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert [bits(lora) for lora in again] == [bits(lora) for lora in whole]
    assert not list(store.folder.glob("*.checkpoint"))


def test_images_of_no_latent_are_refused(nodes, comfy):
    with pytest.raises(ValueError, match="latent has shape"):
        train_each(nodes, comfy_model(), 0, latent={"samples": torch.zeros(0, 4, 16, 16)})


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(nodes, pack, comfy, steps, store, monkeypatch):
    monkeypatch.setattr(pack.host.training_run, "CHECKPOINT_EVERY", 2)
    whole, *_ = train_image(nodes, comfy_model(), steps=6)
    shutil.rmtree(store.folder)
    steps.clear()
    model = comfy_model()
    apply_model = model.model.apply_model

    def breaking(*args, **kwargs):
        return apply_model(*args, **kwargs) * (torch.nan if steps == [1, 2, 3] else 1)

    with monkeypatch.context() as broken:
        broken.setattr(model.model, "apply_model", breaking)
        with pytest.raises(FloatingPointError, match="The loss became nan in step 4 of 6.*Lower the learning rate"):
            train_image(nodes, model, steps=6)
    lora, *_ = train_image(nodes, model, steps=6)
    assert steps == [1, 2, 3, 3, 4, 5, 6]
    assert bits(lora) == bits(whole)


OUT_OF_MEMORY = {
    "CUDA": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CUDA, reported later": torch.AcceleratorError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1.5 MB)"),
    "DirectML": RuntimeError("Could not allocate tensor with 1 bytes. There is not enough GPU video memory available!"),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
    "Python": MemoryError(),
}


@pytest.mark.parametrize(
    "words",
    [
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "Invalid buffer size: 20.00 GiB",
        "Failed to allocate private MTLBuffer for size 9437184",
        "hipErrorOutOfMemory",
        "unable to mmap 5 bytes from file: Cannot allocate memory (12)",
        "bad allocation",
        "std::bad_alloc",
    ],
)
def test_other_words_for_out_of_memory_are_known(pack, words):
    assert pack.host.training_run.is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize("words", ["CUDA error: an illegal memory access was encountered", "The size of tensor a (2)"])
def test_other_errors_are_not_taken_for_it(pack, words):
    assert not pack.host.training_run.is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_is_reported_with_advice_and_frees_all_and_the_next_training_works(
    nodes, pack, comfy, steps, store, monkeypatch, kind
):
    monkeypatch.setattr(pack.host.training_run, "CHECKPOINT_EVERY", 2)
    whole, *_ = train_image(nodes, comfy_model(), steps=6)
    shutil.rmtree(store.folder)
    steps.clear()
    model = loaded_model()
    before, apply_model, held = everything_about(model), model.model.apply_model, []

    def exhausted(*args, **kwargs):
        answer = apply_model(*args, **kwargs)
        if steps == [1, 2, 3]:
            held.append(weakref.ref(answer))
            raise type(OUT_OF_MEMORY[kind])(*OUT_OF_MEMORY[kind].args)  # a new one: it holds the frames it passes
        return answer

    with monkeypatch.context() as broken:
        broken.setattr(model.model, "apply_model", exhausted)
        with pytest.raises(
            comfy.model_management.OOM_EXCEPTION, match="128 x 128 pixels.*Close what else uses"
        ) as caught:
            train_image(nodes, model, steps=6)
    assert [one() for one in held] == [None]
    assert caught.value.__context__ is None
    assert everything_about(model) == before
    lora, *_ = train_image(nodes, model, steps=6)
    assert steps == [1, 2, 3, 3, 4, 5, 6]
    assert bits(lora) == bits(whole)


def test_where_saving_takes_long_it_is_done_seldom(nodes, pack, comfy, store, monkeypatch):
    monkeypatch.setattr(pack.host.training_run, "CHECKPOINT_EVERY", 1)
    saved = []

    def slow(self, *_):
        saved.append(1)
        time.sleep(0.2)

    monkeypatch.setattr(type(store), "save_checkpoint", slow)
    train_image(nodes, comfy_model(), steps=6)
    assert saved == [1]


def test_a_folder_that_cannot_be_written_is_reported_once_and_the_lora_still_comes_out(
    nodes, pack, comfy, steps, store, monkeypatch, caplog
):
    monkeypatch.setattr(pack.host.training_run, "CHECKPOINT_EVERY", 1)
    store.folder.parent.mkdir(exist_ok=True)
    store.folder.write_bytes(b"")
    try:
        lora, *_ = train_image(nodes, comfy_model())
        assert bits(train_image(nodes, comfy_model())[0]) == bits(lora)
    finally:
        store.folder.unlink()
    assert steps == [1, 2, 3, 1, 2, 3]
    assert caplog.text.count("Free some space, or make the folder writable") == 2  # once a training


def test_a_limit_that_is_no_number_is_refused_in_words(pack, monkeypatch):
    monkeypatch.setenv("CONSISLORA_STORE_GB", "20 GB")
    with pytest.raises(ValueError, match="CONSISLORA_STORE_GB is '20 GB'; it must be a number of gigabytes"):
        pack.host.paths.training_store()
