"""Checkpoints of other kinds than plain weights with noise of variance-exploding form: trained, or refused in words."""

import gc
import logging
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_process import COMFYUI, ROOT
from odd_models import gguf_like, quantised, with_layers
from PIL import Image
from reference import INDEX, comfy_model, flat, relative_error
from test_training_nodes import FEW_STEPS, bits, inputs, key, picture, train_image

from batch.comfy_client import WorkflowError
from consislora_core import foreach
from consislora_core.losses import add_noise, noise_from_x0, noise_loss, reconstruction_loss
from demo.server import ComfyServer

pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def nodes(pack):
    return pack.nodes.train


def weights(model) -> list:
    """Every weight of the UNet: the object, and what is stored in it."""
    found = []
    for p in model.model.diffusion_model.parameters():
        parts = [getattr(p, name) for name in p.__tensor_flatten__()[0]] if hasattr(p, "__tensor_flatten__") else [p]
        stored = [part.detach().as_subclass(torch.Tensor).contiguous().reshape(-1) for part in parts]
        found.append((id(p), [part.view(torch.uint8).numpy().tobytes() for part in stored]))
    return found


ODD = {
    "fp8": lambda model: quantised(model, "float8_e4m3fn"),
    "int8": lambda model: quantised(model, "int8_tensorwise"),
    "GGUF": gguf_like,
}


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ODD)
def test_quantised_weights_train_nearly_the_lora_of_plain_ones_and_stay(nodes, comfy, kind, precision, memory):
    import comfy.model_management
    import comfy.quant_ops

    if kind == "int8" and "int8_tensorwise" not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI does not know int8")
    plain = train_image(nodes, comfy_model())[0]
    model = ODD[kind](comfy_model())
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    before, drawn = weights(model), picture(model)
    lora = train_image(nodes, model, precision=precision, memory=memory)[0]
    assert 0 < relative_error(flat(lora.parts), flat(plain.parts)) < 0.02
    assert weights(model) == before
    assert torch.equal(picture(model), drawn)


@pytest.mark.parametrize("kind", ODD)
def test_the_weights_of_quantised_layers_are_not_kept_for_backward(nodes, comfy, kind):
    import comfy.quant_ops

    if kind == "int8" and "int8_tensorwise" not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI does not know int8")
    kept = {}
    for name, model in {"plain": comfy_model(), kind: ODD[kind](comfy_model())}.items():
        sizes = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        first = model.model.diffusion_model.time_embed[0]
        first.register_forward_pre_hook(lambda *_, sizes=sizes: sizes.clear())  # not what the check before it keeps
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            train_image(nodes, model, steps=1, transition_step=1)
        kept[name] = sum(sizes)
    of_weights = sum(p.numel() for p in comfy_model().model.diffusion_model.output_blocks.parameters())
    assert kept[kind] - kept["plain"] < of_weights / 2


def test_layers_without_a_gradient_are_refused_in_one_sentence_and_stay(nodes, comfy):
    model = gguf_like(comfy_model(), differentiable=False)
    before = weights(model)
    with pytest.raises(ValueError, match=r"time_embed\.0 .Blocks weights. gives no gradient.*in fp16, bf16 or fp8"):
        train_image(nodes, model)
    assert weights(model) == before


class NoBackward(torch.nn.Module):
    """A layer that says in its own way that it has no backward pass."""

    comfy_cast_weights, error = True, None

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias  # which ComfyUI 0.33 reads of every layer
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x):
        if self.error and x.requires_grad:
            raise self.error("for inference only")
        return self.layer(x)


@pytest.mark.parametrize("error", [AssertionError, AttributeError, KeyError, IndexError, NotImplementedError])
def test_a_layer_that_raises_what_it_likes_in_training_is_refused_in_words(nodes, comfy, monkeypatch, error):
    monkeypatch.setattr(NoBackward, "error", error)
    model = with_layers(comfy_model(), lambda layer: NoBackward(layer) if is_query(layer) else None)
    with pytest.raises(ValueError, match=r"to_q .*NoBackward. gives no gradient.*in fp16, bf16 or fp8"):
        train_image(nodes, model)


def test_a_cancel_while_layers_are_checked_is_a_cancel(nodes, comfy):
    import comfy.model_management

    model = ODD["fp8"](comfy_model())
    first = model.model.diffusion_model.time_embed[0]
    first.register_forward_pre_hook(lambda *_: comfy.model_management.interrupt_current_processing())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train_image(nodes, model)


def test_attention_layers_that_do_not_say_their_size_are_refused_in_words(nodes, pack, comfy):
    def convert(layer):
        if not is_query(layer):
            return None
        new = NoBackward(layer)
        del new.in_features
        return new

    model, words = with_layers(comfy_model(), convert), "NoBackward. does not say how many features it takes"
    with pytest.raises(ValueError, match=words):
        train_image(nodes, model)
    with pytest.raises(ValueError, match=f"style does not fit the model.*{words}"):
        pack.host.model_inputs.check_lora(model, train_image(nodes, comfy_model())[0], "style")


def is_query(layer):
    """Whether it is of the size of the attention layers, and not of those for text."""
    return isinstance(layer, torch.nn.Linear) and layer.bias is None and layer.in_features == layer.out_features


def test_quantised_models_that_differ_have_keys_of_their_own(nodes, comfy):
    keys = [
        key(nodes, change(comfy_model(prediction))) for change in (ODD["fp8"], gguf_like) for prediction in ("eps", "v")
    ]
    assert None not in keys
    assert len(set(keys)) == 4
    assert key(nodes, gguf_like(comfy_model())) == keys[2]


def test_layers_for_fast_fp8_train_as_layers_that_cast(nodes, comfy, store):
    import comfy.ops

    def fp8(linear):
        model = comfy_model(dtype=torch.float8_e4m3fn, manual_cast=torch.float32)
        for layer in model.model.diffusion_model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.__class__ = linear
                layer.scale_weight = layer.scale_input = None
        return model

    losses = []
    for linear in (comfy.ops.manual_cast.Linear, comfy.ops.fp8_ops.Linear):
        losses.append(train_image(nodes, fp8(linear))[1])
        shutil.rmtree(store.folder)
    assert losses[0] == losses[1]


def test_weights_that_the_next_layer_overwrites_train_the_same(nodes, pack, comfy, store, monkeypatch):
    """As with dynamic VRAM: a layer's weights are in a buffer, and gone when the next layer has run."""
    import comfy.ops

    expected, cast, buffers = train_image(nodes, comfy_model())[0], comfy.ops.cast_bias_weight, {}

    def cast_into_buffer(layer, *args, **kwargs):
        weight, bias, *stream = cast(layer, *args, **kwargs)
        for buffer in buffers.values():
            buffer.fill_(torch.nan)
        for tensor in (weight, bias):
            if tensor is not None:
                buffers.setdefault((tensor is bias, tensor.shape), torch.empty_like(tensor)).copy_(tensor)
        found = (None if t is None else buffers[t is bias, t.shape] for t in (weight, bias))
        return *found, *stream

    shutil.rmtree(store.folder)
    model = comfy_model()
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = True
    monkeypatch.setattr(pack.host.frozen_unet, "_is_elsewhere", lambda *_: True)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_into_buffer)
    lora = train_image(nodes, model)[0]
    assert relative_error(flat(lora.parts), flat(expected.parts)) < 1e-4


def test_what_comfyui_notes_on_weights_is_there_in_training(nodes, comfy):
    """Newer ComfyUI reads in which dtype to load a weight from the weight itself."""
    model, seen = comfy_model(), []
    layer = model.model.diffusion_model.output_blocks[0][0].in_layers[2]
    layer.weight._model_dtype = torch.float16
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(vars(layer.weight).get("_model_dtype")))
    train_image(nodes, model)
    handle.remove()
    assert set(seen) == {torch.float16}


# Noise of other forms


def with_sampling(node, *settings):
    import comfy_extras.nodes_model_advanced as advanced

    return getattr(advanced, node)().patch(comfy_model(), *settings)[0]


def test_in_flow_matching_the_losses_are_of_its_own_noise():
    z_0, noise, z_0_hat = torch.randn(3, 1, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor(0.25, dtype=torch.float64).view(1, 1, 1, 1)
    x = add_noise(z_0, noise, sigma, flow=True)
    torch.testing.assert_close(x, 0.75 * z_0 + 0.25 * noise)
    torch.testing.assert_close(noise_from_x0(x, z_0, sigma, flow=True), noise)
    scores = [loss(z_0, z_0_hat, noise, sigma, True) for loss in (noise_loss, reconstruction_loss)]
    torch.testing.assert_close(scores[1], (0.25 / 0.75) ** 2 * scores[0])


@pytest.mark.parametrize("node", ["ModelSamplingSD3", "ModelSamplingFlux", "ModelSamplingAuraFlow"])
def test_a_model_of_flow_matching_is_trained_on_what_its_sampler_would_give_it(nodes, comfy, monkeypatch, node):
    model = with_sampling(node, *([1.15, 0.5, 1024, 1024] if node == "ModelSamplingFlux" else [3.0]))
    given, apply_model = [], model.model.apply_model
    monkeypatch.setattr(
        model.model, "apply_model", lambda x, sigma, **k: given.append((x, sigma)) or apply_model(x, sigma, **k)
    )
    losses = train_image(nodes, model)[1]["loss"]
    z_0 = model.model.process_latent_in(inputs()["latent"]["samples"])
    sampling = model.get_model_object("model_sampling")
    for x, sigma in given:
        noise = (x - (1 - sigma.view(-1, 1, 1, 1)) * z_0) / sigma.view(-1, 1, 1, 1)
        torch.testing.assert_close(sampling.noise_scaling(sigma, noise, z_0.clone()), x)
        assert noise.std() == pytest.approx(1, abs=0.1)
    assert all(torch.tensor(losses).isfinite())


def test_a_model_of_flow_matching_is_not_taken_for_the_same_trained_as_noise(nodes, pack, comfy, monkeypatch):
    """The store may hold LoRAs from before flow matching was known."""
    model = with_sampling("ModelSamplingSD3", 3.0)
    now = key(nodes, model)
    monkeypatch.setattr(pack.host.training_key, "is_flow", lambda model: False)
    assert key(nodes, model) != now


def test_a_model_sampled_in_an_unknown_way_is_refused(nodes, comfy):
    import comfy.model_sampling

    if not hasattr(comfy.model_sampling, "IMG_TO_IMG_FLOW"):
        pytest.skip("this ComfyUI does not have one")
    with pytest.raises(ValueError, match="sampled in a way that ConsisLoRA does not know .*IMG_TO_IMG_FLOW"):
        train_image(nodes, with_sampling("ModelSamplingDiscrete", "img_to_img_flow", False))


@pytest.mark.parametrize(
    ("node", "settings", "words"),
    [
        ("ModelSamplingDiscrete", ("lcm", False), "ModelSamplingDiscreteDistilled, LCM"),
        ("ModelSamplingDiscrete", ("x0", False), "ModelSamplingDiscrete, X0"),
        ("ModelSamplingContinuousEDM", ("eps", 120.0, 0.002), "ModelSamplingContinuousEDM, EPS"),
    ],
    ids=["LCM", "one-step", "EDM"],
)
def test_a_distilled_model_trains_and_the_log_says_what_is_assumed(nodes, comfy, caplog, node, settings, words):
    caplog.set_level(logging.INFO)
    assert all(torch.tensor(train_image(nodes, with_sampling(node, *settings))[1]["loss"]).isfinite())
    assert f"another node has set this model's sampling ({words}). Training assumes that" in caplog.text
    caplog.clear()
    train_image(nodes, comfy_model())
    assert "sampling" not in caplog.text


def test_structure_lock_in_flow_matching_begins_with_what_the_sampler_turns_back(pack, comfy):
    import comfy.samplers

    model = with_sampling("ModelSamplingSD3", 1.0)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(inputs()["positive"], inputs()["positive"])
    guider.set_cfg(1.0)
    latent, sampling = inputs()["latent"], pack.host.sampling
    with torch.inference_mode():
        sigmas = sampling.ksampler_sigmas(model, 100, "euler", "simple", 0.5)
        inverted = sampling.invert(guider, latent, sigmas)
        back = sampling.sample(guider, inverted, 0, "euler", sigmas, noise=0)
        assert relative_error(back["samples"], latent["samples"]) < 0.1
        with pytest.raises(ValueError, match="structure_lock cannot begin at denoise 1 with a model of flow matching"):
            sampling.invert(guider, latent, sampling.ksampler_sigmas(model, 10, "euler", "simple", 1.0))


def test_structure_lock_in_flow_matching_without_denoising_gives_the_picture_itself(pack, comfy):
    import comfy.samplers

    model = with_sampling("ModelSamplingSD3", 1.0)
    guider, latent, sampling = comfy.samplers.CFGGuider(model), inputs()["latent"], pack.host.sampling
    guider.set_conds(inputs()["positive"], inputs()["positive"])
    sigmas = sampling.ksampler_sigmas(model, 10, "euler", "simple", denoise=0.0)
    with torch.inference_mode():
        assert relative_error(sampling.invert(guider, latent, sigmas)["samples"], latent["samples"]) < 1e-6


# Through a real server


@pytest.fixture(scope="module")
def odd_server(tmp_path_factory):
    """A ComfyServer whose node OddModel makes such models of the demo model."""
    base = tmp_path_factory.mktemp("odd")
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).parent / "odd_models.py", base / "custom_nodes")
    with ComfyServer(base, COMFYUI) as server:
        server.upload(ROOT / "demo" / "images" / "crown-flat.png")
        yield server


def jobs(kind: str) -> tuple[dict, dict, dict]:
    """Workflows: a model of this kind draws, is trained, and draws the same once more."""
    odd = ("OddModel", dict(model=["demo", 0], kind=kind))
    flow = ("ModelSamplingSD3", dict(model=["demo", 0], shift=3.0))
    shared = {
        "demo": ("ConsisLoRADemoModel", {}),
        "base": flow if kind == "flow matching" else odd,
        "text": ("CLIPTextEncode", dict(text="A crown", clip=["demo", 1])),
        "image": ("LoadImage", dict(image="crown-flat.png")),
        "latent": ("VAEEncode", dict(pixels=["image", 0], vae=["demo", 2])),
    }
    train = {
        "train": ("ConsisLoRATrainImage", dict(
            model=["base", 0], latent=["latent", 0], positive=["text", 0], **FEW_STEPS, precision="auto")),
        "save": ("ConsisLoRASave", dict(consislora=["train", 0], filename="odd", precision="fp16")),
    }  # fmt: skip

    def draw(end):  # any number above 1: ComfyUI would not run the same job again
        return {
            "draw": ("KSamplerAdvanced", dict(
                model=["base", 0], add_noise="enable", noise_seed=1, steps=1, cfg=1.0, sampler_name="euler",
                scheduler="normal", positive=["text", 0], negative=["text", 0], latent_image=["latent", 0],
                start_at_step=0, end_at_step=end, return_with_leftover_noise="disable")),
            "decode": ("VAEDecode", dict(samples=["draw", 0], vae=["demo", 2])),
            "picture": ("SaveImage", dict(images=["decode", 0], filename_prefix="odd")),
        }  # fmt: skip

    return tuple(
        {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in {**shared, **own}.items()}
        for own in (draw(1000), train, draw(999))
    )


@pytest.mark.parametrize("kind", ["fp8 quantised", "int8 quantised", "GGUF", "flow matching", "fp8"])
def test_a_server_trains_such_a_model_and_leaves_it_as_it_was(odd_server, comfy, kind):
    import comfy.quant_ops

    if kind == "int8 quantised" and "int8_tensorwise" not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip("this ComfyUI does not know int8")
    before, train, after = jobs(kind)
    pictures = [odd_server.images(odd_server.run(before))]
    odd_server.run(train)
    pictures.append(odd_server.images(odd_server.run(after)))
    first, second = (Image.open(picture).tobytes() for (picture,) in pictures)
    assert first == second


def test_a_server_that_has_refused_such_a_model_does_the_next_job(odd_server):
    before, train, after = jobs("GGUF without a gradient")
    with pytest.raises(WorkflowError, match="gives no gradient"):
        odd_server.run(train)
    assert odd_server.images(odd_server.run(after))


# Relatives of SDXL that get a picture beside the latent, or none


def random_model(kind="SDXL", **changes):
    """A tiny MODEL of random weights, with changes to the UNet's config."""
    import comfy.model_patcher
    import comfy.supported_models

    with torch.inference_mode():
        torch.manual_seed(0)
        config = getattr(comfy.supported_models, kind)({**INDEX["unet_config_comfyui"], **changes})
        config.unet_config["num_head_channels"] = INDEX["unet_config_comfyui"]["num_head_channels"]
        config.set_inference_dtype(torch.float32, None)
        base = config.get_model({})
        for parameter in base.parameters():
            parameter.normal_(0, 0.05)
        return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "channels"), [("SDXL", 9), ("SDXL_instructpix2pix", 8)], ids=["inpainting", "edits"])
def test_a_model_that_paints_in_a_picture_trains_on_what_sampling_gives_it(
    nodes, store, comfy, monkeypatch, kind, channels
):
    model = random_model(kind, in_channels=channels)
    given, apply_model = [], model.model.apply_model
    monkeypatch.setattr(
        model.model, "apply_model", lambda x, *a, **k: given.append(k["c_concat"]) or apply_model(x, *a, **k)
    )
    picture(model)
    losses = []
    for memory in ("fast", "lean"):
        losses.append(train_image(nodes, model, memory=memory)[1]["loss"])
        shutil.rmtree(store.folder)
    assert losses[0] == pytest.approx(losses[1])
    assert torch.equal(given[-1], given[0][:1]) and given[0].shape[1] == channels - 4
    assert all(torch.tensor(train_image(nodes, model, precision="bf16")[1]["loss"]).isfinite())


def test_images_train_together_on_an_inpainting_model_as_each_would_alone(nodes, store, comfy):
    model, latent = random_model(in_channels=9), inputs()["latent"]["samples"]
    both = torch.cat([latent, latent.roll(1, -1)])
    with torch.inference_mode():
        together = nodes.TrainImages.execute(model, **inputs(latent={"samples": both}), at_once=2).result[0]
    shutil.rmtree(store.folder)
    for lora, one in zip(together, both.split(1), strict=True):
        alone = train_image(nodes, model, latent={"samples": one})[0]
        assert relative_error(flat(lora.parts), flat(alone.parts)) < 1e-4


def test_one_picture_to_paint_in_is_taken_and_no_more(nodes, comfy):
    ((text, extras),) = inputs()["positive"]
    picture_in = {"concat_latent_image": torch.randn(1, 4, 16, 16), "concat_mask": torch.ones(1, 1, 16, 16)}
    model = random_model(in_channels=9)
    losses = [
        train_image(nodes, model, positive=[[text, {**extras, **beside}]])[1]["loss"] for beside in ({}, picture_in)
    ]
    assert losses[0] != losses[1]
    picture_in["concat_latent_image"] = torch.randn(2, 4, 16, 16)
    with pytest.raises(ValueError, match="positive holds 2 texts; training takes one"):
        train_image(nodes, model, positive=[[text, {**extras, **picture_in}]])


# Smaller relatives of SDXL, at a tiny size; test_full_size.py has them whole


@pytest.mark.parametrize(
    "changes",
    [
        dict(transformer_depth=[0, 0, 1, 1, 1, 1], transformer_depth_middle=-1),
        dict(num_res_blocks=[1, 1, 1], transformer_depth=[0, 1, 2], transformer_depth_middle=-2,
             transformer_depth_output=[0, 0, 1, 1, 2, 2]),
    ],
    ids=["SSD-1B and Vega", "KOALA"],
)  # fmt: skip
def test_models_of_fewer_layers_train_and_are_guided(nodes, pack, comfy, changes):
    model = random_model(**changes)
    lora = train_image(nodes, model)[0]
    prompt, settings = inputs()["positive"], pack.host.guider.GuidanceSettings()
    pictures = []
    for share in (True, False):
        guider = pack.host.guider.build_dual_guider(model, prompt, prompt, lora, lora, settings, share_encoder=share)
        with torch.inference_mode():
            sigmas = pack.host.sampling.ksampler_sigmas(model, 2, "euler", "normal", 1.0)
            pictures.append(pack.host.sampling.sample(guider, inputs()["latent"], 0, "euler", sigmas)["samples"])
    assert relative_error(*pictures) < 1e-4


# Accelerations


class Moved:
    """Of torch, where a private name has gone."""

    def __getattr__(self, name):
        raise KeyError(name)


@pytest.fixture
def without_private_functions(pack, monkeypatch):
    """torch without what training knows by private names."""
    accelerations = pack.host.accelerations
    found = accelerations.onednn_linear, accelerations.gelu_backward, accelerations.group_norm_backward
    own = SimpleNamespace(ones=torch.ones, ops=SimpleNamespace(mkldnn=Moved(), aten=Moved()), float32=torch.float32)
    monkeypatch.setattr(accelerations, "torch", own)
    for name in ("norm", "div_", "copy_", "lerp", "lerp_", "mul_", "sub_"):
        monkeypatch.delattr(torch, f"_foreach_{name}")
    caches = *found, foreach._log_missing, pack.host.fused_geglu._kernels
    for function in caches:
        function.cache_clear()
    yield found
    for function in caches:
        function.cache_clear()


def test_accelerations_whose_private_functions_have_moved_stay_off_and_are_logged(
    pack, caplog, without_private_functions
):
    caplog.set_level(logging.INFO)
    assert [find() for find in without_private_functions] == [None, None, None]
    words = ["oneDNN's linear layer", "the fused GEGLU", "the split group norm"]
    if not torch.cuda.is_available():  # where torch's compiler of kernels raises what it likes
        assert pack.host.fused_geglu._kernels() is None
        words.append("the fused GEGLU kernels")
    for what in words:
        assert f"{what} cannot be used here" in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("preset", ["paper", "quality"])
def test_training_goes_on_without_them(pack, nodes, store, comfy, request, monkeypatch, caplog, preset, precision):
    """Also where the kernels would run that are for NVIDIA."""
    frozen_unet = pack.host.frozen_unet
    monkeypatch.setattr(frozen_unet, "has_measured_kernels", lambda device: True)
    monkeypatch.setattr(frozen_unet, "LARGE", 1)
    usual = train_image(nodes, comfy_model(), preset=preset, precision=precision)[1]["loss"]
    shutil.rmtree(store.folder)
    caplog.set_level(logging.INFO)
    request.getfixturevalue("without_private_functions")
    losses = train_image(nodes, comfy_model(), preset=preset, precision=precision)[1]["loss"]
    assert losses == pytest.approx(usual, rel=1e-4 if precision == "fp32" else 1e-2)
    assert caplog.text.count("norm runs tensor by tensor here") == 1


@pytest.mark.parametrize(("cuda", "fast", "own"), [("13.0", set(), True), (None, set(), False), (None, {"all"}, True)])
def test_kernels_that_were_measured_on_nvidia_run_elsewhere_only_when_asked_for(pack, monkeypatch, cuda, fast, own):
    accelerations = pack.host.accelerations
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(accelerations.args, "fast", fast)
    assert accelerations.has_measured_kernels(torch.device("cuda", 0)) is own
    for device in ("cpu", "mps", "xpu"):
        assert not accelerations.has_measured_kernels(torch.device(device))


def with_an_option(model):
    """As with a node that acts on attention."""
    model.model_options["transformer_options"] = {"patches": {}}
    return model


def with_a_weight_wrapper(model):
    """As with a node whose code computes a weight."""
    model.add_weight_wrapper("diffusion_model.middle_block.1.proj_in.weight", lambda weight: weight)
    return model


@pytest.mark.parametrize(
    ("change", "nvidia", "on_card", "words"),
    [
        (lambda model: model, True, False, "moves weights to the card in each step"),
        (lambda model: model, False, True, "measured on NVIDIA only"),
        (gguf_like, True, True, "this model's weights are quantised"),
        (with_an_option, True, True, "other nodes act on this model"),
        (with_a_weight_wrapper, True, True, "other nodes act on this model"),
    ],
    ids=["dynamic VRAM", "AMD", "quantised", "other nodes", "weights of other nodes"],
)
def test_the_log_says_why_steps_are_not_recorded(pack, comfy, monkeypatch, caplog, change, nvidia, on_card, words):
    training_model = pack.host.training_model
    model = change(comfy_model().clone())
    model.load_device = torch.device("cuda", 0)
    monkeypatch.setattr(training_model, "has_measured_kernels", lambda device: nvidia)
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as card:
        card.setattr(torch.Tensor, "is_cuda", on_card)
        assert not training_model._can_be_recorded(model)
    assert re.search(f"trains without recorded steps, which is slower: .*{words}", caplog.text)


def test_plain_weights_that_stay_on_the_card_are_recorded(pack, comfy, monkeypatch):
    training_model, model = pack.host.training_model, comfy_model().clone()
    model.load_device = torch.device("cuda", 0)
    monkeypatch.setattr(training_model, "has_measured_kernels", lambda device: True)
    with monkeypatch.context() as card:
        card.setattr(torch.Tensor, "is_cuda", True)
        assert training_model._can_be_recorded(model)


@pytest.fixture
def dynamic_model(comfy):
    """A MODEL that says it fetches its weights in every step; `copies` holds weak references to those that stay."""
    import comfy.model_patcher

    class Dynamic(comfy.model_patcher.ModelPatcher):
        copies = []
        is_registered = True

        def is_dynamic(self):
            return True

        def clone(self, disable_dynamic=False):
            if not disable_dynamic:
                return super().clone()
            if not self.is_registered:
                raise RuntimeError("Cannot create non-dynamic delegate: cached_patcher_init is not initialized.")
            copy = comfy_model()
            self.copies.append(weakref.ref(copy.model))
            return copy

    model = comfy_model()
    return Dynamic(model.model, model.load_device, model.offload_device)


def test_with_dynamic_vram_a_copy_trains_whose_weights_stay_and_is_gone_afterwards(
    pack, nodes, comfy, store, dynamic_model, monkeypatch, caplog
):
    import comfy.model_management

    monkeypatch.setattr(pack.host.training_model, "_obstacle", lambda model: None)
    caplog.set_level(logging.INFO)
    expected = train_image(nodes, comfy_model())[0]
    shutil.rmtree(store.folder)
    before = weights(dynamic_model)
    assert bits(train_image(nodes, dynamic_model)[0]) == bits(expected)
    assert "its weights stay on the card" in caplog.text
    assert weights(dynamic_model) == before
    (copy,) = dynamic_model.copies
    gc.collect()
    assert copy() is None
    assert not comfy.model_management.current_loaded_models


@pytest.mark.parametrize("reason", ["card", "memory", "loader", "no recording"])
def test_with_dynamic_vram_and_no_copy_to_be_had_the_model_itself_trains(
    pack, nodes, comfy, store, dynamic_model, monkeypatch, caplog, reason
):
    import comfy.model_management

    expected = train_image(nodes, comfy_model())[0]
    shutil.rmtree(store.folder)
    caplog.set_level(logging.INFO)
    free = comfy.model_management.get_free_memory

    def little(device=None, torch_free_too=False):
        is_short = (device == torch.device("cpu")) is (reason == "memory")
        return (1e6, 1e6) if is_short and torch_free_too else 1e6 if is_short else free(device, torch_free_too)

    if reason != "no recording":
        monkeypatch.setattr(pack.host.training_model, "_obstacle", lambda model: None)
    if reason == "loader":
        monkeypatch.setattr(type(dynamic_model), "is_registered", False)
    elif reason in ("card", "memory"):
        dynamic_model.load_device = torch.device("cpu", 0)  # another than the one that stands for memory
        monkeypatch.setattr(comfy.model_management, "get_free_memory", little)
    assert bits(train_image(nodes, dynamic_model)[0]) == bits(expected)
    assert not dynamic_model.copies
    assert "its weights stay" not in caplog.text
