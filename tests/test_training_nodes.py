"""The training nodes on a real ComfyUI model: every kind of SDXL checkpoint trains, and stays exactly as it was."""

import hashlib

import pytest
import torch
from reference import INDEX, comfy_conditioning, comfy_model, run

TENSORS = run("stage1_content")
FEW_STEPS = dict(steps=3, transition_step=2, learning_rate=1e-3, reconstruction_learning_rate=1e-3, rank=2, seed=0)


@pytest.fixture
def nodes(pack):
    return pack.nodes.train


def inputs(**changes):
    """Latent and conditioning as VAE Encode and CLIP Text Encode hand them over: inference tensors."""
    with torch.inference_mode():
        given = dict(
            latent={"samples": (TENSORS["z_0"] / INDEX["vae_scaling_factor"]).clone()},
            positive=comfy_conditioning(TENSORS),
            precision="auto",
        )
    return {**FEW_STEPS, **given, **changes}


def train_image(nodes, model, **changes):
    with torch.inference_mode():
        return nodes.TrainImage.execute(model, **inputs(**changes)).result


def train_style(nodes, model, content_lora, **changes):
    given = {key: value for key, value in inputs(**changes).items() if key not in ("transition_step", "learning_rate")}
    with torch.inference_mode():
        return nodes.TrainStyle.execute(model, content_lora=content_lora, noise_offset=0.03, **given).result


def everything_about(model):
    """All that training could have left behind, in a form that compares."""
    base = model.model
    layers = {}
    for name, module in base.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        plain = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and not torch.is_tensor(value) and not callable(value)
        }
        layers[name] = (type(module), list(module._modules), hooks, plain, module.training)
    tensors = {
        name: (
            id(p),
            p.data_ptr(),
            p.dtype,
            p.requires_grad,
            p.is_inference(),
            p.grad is None,
            hashlib.sha256(p.detach().float().numpy().tobytes()).hexdigest(),
        )
        for name, p in [*base.named_parameters(), *base.named_buffers()]
    }
    patcher = {
        key: (len(value) if hasattr(value, "__len__") else value)
        for key, value in vars(model).items()
        if key
        in (
            "patches",
            "object_patches",
            "injections",
            "wrappers",
            "callbacks",
            "hook_patches",
            "model_options",
            "attachments",
        )
    }
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

    positive = comfy_conditioning(TENSORS)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            torch.ones(1, 4, 16, 16),
            2,
            3.0,
            "euler",
            "normal",
            positive,
            positive,
            torch.zeros(1, 4, 16, 16),
            disable_pbar=True,
            seed=1,
        )


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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_trains_nearly_alike(nodes, comfy, precision):
    expected = train_image(nodes, comfy_model(), precision="fp32")[1]["loss"]
    assert train_image(nodes, comfy_model(), precision=precision)[1]["loss"] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("shape", [(16, 24), (20, 12), (17, 16)])
def test_latents_of_any_size_and_aspect_train(nodes, comfy, shape):
    latent = {"samples": torch.randn(1, 4, *shape, generator=torch.Generator().manual_seed(0))}
    assert len(train_image(nodes, comfy_model(), latent=latent)[1]["loss"]) == 3


def test_size_conditioning_is_the_pictures_own_size_unless_the_conditioning_names_one(pack):
    bridge, model = pack.nodes.bridge, comfy_model()
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


@pytest.mark.parametrize("ending", ["success", "cancel", "failure"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_users_model_is_exactly_as_it_was(nodes, pack, ending, stored, monkeypatch):
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

    monkeypatch.setattr(pack.nodes.bridge.Progress, "show", end_early)
    if ending == "success":
        train_image(nodes, model)
    else:
        stop = RuntimeError if ending == "failure" else comfy.model_management.InterruptProcessingException
        with pytest.raises(stop):
            train_image(nodes, model)
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


def sd15_model():
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=[1, 1],
            channel_mult=[1, 2],
            transformer_depth=[1, 0],
            transformer_depth_output=[1, 1, 0, 0],
            transformer_depth_middle=0,
            context_dim=64,
            use_spatial_transformer=True,
            legacy=False,
        )
    )
    config.unet_config.update(num_heads=2, num_head_channels=-1)
    config.set_inference_dtype(torch.float32, None)
    return comfy.model_patcher.ModelPatcher(config.get_model({}), torch.device("cpu"), torch.device("cpu"))


TEXT, POOLED = TENSORS["prompt_embeds"], {"pooled_output": TENSORS["pooled_prompt_embeds"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent": {"samples": torch.zeros(0, 4, 16, 16)}}, "latent has shape .0, 4, 16, 16..*Connect VAE Encode"),
        (
            {"latent": {"samples": torch.zeros(1, 16, 16, 16)}},
            "latent has shape .1, 16, 16, 16.; this model takes .*4 channels",
        ),
        ({"latent": {"samples": torch.full((1, 4, 16, 16), torch.nan)}}, "latent holds values that are not numbers"),
        ({"positive": []}, "positive holds 0 conditionings; training takes one"),
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
    with pytest.raises(ValueError, match="no attention layers for content in output_blocks.0.1.*SDXL"):
        train_image(nodes, sd15_model())
    with pytest.raises(ValueError, match="ConsisLoRA works on SDXL checkpoints"):
        pack.nodes.lora.Apply.execute(sd15_model(), 1.0, 1.0)


def test_a_lora_of_another_size_is_refused(nodes, pack):
    model = comfy_model()
    lora = train_image(nodes, model)[0]
    wide = lora._replace(
        parts={
            role: {path: layer._replace(down=torch.zeros(2, 640)) for path, layer in part.items()}
            for role, part in lora.parts.items()
        }
    )
    with pytest.raises(
        ValueError, match="content LoRA fits layers of 640 to 128 features where this model has 128 to 128"
    ):
        pack.nodes.lora.Apply.execute(model, 1.0, 1.0, content=wide)
    with pytest.raises(ValueError, match="trained on another architecture"):
        train_style(nodes, model, wide)
    shallow = lora._replace(parts={"content": dict(list(lora.parts["content"].items())[:8])})
    with pytest.raises(ValueError, match="content LoRA has 8 layers where this model has 16"):
        train_style(nodes, model, shallow)


def test_stage_two_without_a_content_part_is_refused(nodes, pack):
    lora = train_image(nodes, comfy_model())[0]
    with pytest.raises(ValueError, match="no content part, only style"):
        train_style(nodes, comfy_model(), lora._replace(parts={"style": lora.parts["style"]}))
