"""LoRA files: every spelling in, one spelling out, and the same picture in every program that reads it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from reference import DATA, comfy_conditioning, comfy_model, diffusers_denoiser, diffusers_unet, relative_error, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from consislora_core import lora_file
from consislora_core.adapter_config import HEADER
from consislora_core.adapters import inserted
from consislora_core.lora_file import ImageLora, LoraLayer
from consislora_core.lora_summary import summarise, summarise_left_out

AUTHORS = DATA / "loras" / "stage2_style.safetensors"
SGM_BLOCK = {"up_blocks_0_attentions_0": "output_blocks_0_1", "up_blocks_0_attentions_1": "output_blocks_1_1"}


def kohya(key):
    return "lora_" + re.sub(r"\.(?=.*\.lora\.)", "_", key).replace(".lora.", ".lora_")


def sgm(key):
    return re.sub("up_blocks_0_attentions_[01]", lambda block: SGM_BLOCK[block[0]], kohya(key))


def omi(key):
    return key.removeprefix("unet.").replace(".lora.", ".lora_")


def peft(key):
    return key.replace("lora.down", "lora_A").replace("lora.up", "lora_B")


SPELLINGS = {
    "diffusers": str,
    "B-LoRA": lambda key: "unet." + key,
    "PEFT": peft,
    "PEFT with adapter name": lambda key: peft(key).replace(".weight", ".default.weight"),
    "kohya": kohya,
    "kohya sgm": sgm,
    "ComfyUI": lambda key: "diffusion_model." + sgm(key).removeprefix("lora_unet_"),
    "PEFT's own": lambda key: "base_model.model." + peft(key).removeprefix("unet."),
    "PEFT with a name chosen": lambda key: peft(key).replace(".weight", ".my-style_2.weight"),
    "PEFT of a pipeline": lambda key: "base_model.model." + peft(key),
    "diffusers before 0.22": lambda key: re.sub(r"\.(to_\w+)(?:\.0)?\.lora\.", r".processor.\1_lora.", key),
    "diffusers 0.22": lambda key: key.replace(".lora.", ".lora_linear_layer."),
    "LyCORIS": lambda key: kohya(key).replace("lora_unet_", "lycoris_"),
    "LyCORIS with unet": lambda key: kohya(key).replace("lora_unet_", "lycoris_unet_"),
    "OneTrainer": lambda key: "lora_" + key.replace(".lora.", ".lora_"),
    "OneTrainer OMI": lambda key: (
        "unet." + re.sub(r"up_blocks\.0\.attentions\.([01])", r"output_blocks.\1.1", omi(key))
    ),
    "checkpoint": lambda key: f"model.diffusion_model.{sgm(key).removeprefix('lora_unet_')}",
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_every_published_spelling_reads_as_the_same_parts(spell, tmp_path):
    authors = load_file(AUTHORS)
    save_file({spell(key): value for key, value in authors.items()}, tmp_path / "x.safetensors")
    read = lora_file.read(tmp_path / "x.safetensors").parts
    assert {role: len(part) for role, part in read.items()} == {"content": 16, "style": 16}
    layer = read["style"]["transformer_blocks.1.attn2.to_out.0"]
    name = "unet.up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_out.0.lora"
    assert torch.equal(layer.down, authors[f"{name}.down.weight"]) and torch.equal(
        layer.up, authors[f"{name}.up.weight"]
    )
    assert layer.alpha == layer.rank == 4


def test_a_file_reads_back_as_it_was_written(tmp_path):
    lora = ImageLora(lora_file.read(AUTHORS).parts, {"consislora.stage": "style"})
    lora.parts["style"]["transformer_blocks.0.attn1.to_q"] = lora.parts["style"][
        "transformer_blocks.0.attn1.to_q"
    ]._replace(alpha=2.0)
    lora_file.write(lora, tmp_path / "x.safetensors", torch.float32)
    again = lora_file.read(tmp_path / "x.safetensors")
    assert lora_file.to_state_dict(again).keys() == lora_file.to_state_dict(lora).keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(lora_file.to_state_dict(again).values(), lora_file.to_state_dict(lora).values(), strict=True)
    )
    assert again.metadata["consislora.stage"] == "style"


def test_the_same_content_is_the_same_bytes(tmp_path):
    lora = replace(lora_file.read(AUTHORS), metadata={f"consislora.{n}": f"{n} \u732b" for n in range(20)})
    for name in "ab":
        (tmp_path / name).mkdir()
        lora_file.write(lora, tmp_path / name / "x.safetensors")
    assert (tmp_path / "a" / "x.safetensors").read_bytes() == (tmp_path / "b" / "x.safetensors").read_bytes()
    metadata = lora_file.read(tmp_path / "a" / "x.safetensors").metadata
    assert lora.metadata.items() <= metadata.items()
    # By which loaders know tensors of torch, and model managers what the file is.
    assert (metadata["format"], metadata["modelspec.title"]) == ("pt", "x")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_keys_are_kohyas_with_diffusers_block_names():
    lora = ImageLora(
        {"style": {"transformer_blocks.0.attn1.to_out.0": LoraLayer(torch.zeros(2, 3), torch.zeros(4, 2), 2.0)}}, {}
    )
    assert set(lora_file.to_state_dict(lora)) == {
        f"lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0.{end}"
        for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }


def test_a_block_number_is_matched_whole():
    with pytest.raises(ValueError, match="attentions_10"):
        lora_file.from_state_dict(
            {"lora_unet_up_blocks_0_attentions_10_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.zeros(2, 2)}
        )


# Files that people have


CASES = DATA / "cases"


def plain_parts():
    return lora_file.read(CASES / "lora_plain.safetensors").parts


def equal_parts(parts, others):
    return all(
        torch.equal(layer.down, others[role][path].down) and torch.equal(layer.up, others[role][path].up)
        for role, part in parts.items()
        for path, layer in part.items()
    ) and {role: part.keys() for role, part in parts.items()} == {role: part.keys() for role, part in others.items()}


@pytest.mark.parametrize(
    ("name", "scale"),
    [("plain", 1), ("alpha_in_header", 4), ("peft_prefix", 1), ("kohya_with_feed_forward", 1)],
)
def test_a_file_that_people_have_is_read_at_its_scale(name, scale):
    lora = lora_file.read(CASES / f"lora_{name}.safetensors")
    assert equal_parts(lora.parts, plain_parts())
    assert {role: len(part) for role, part in lora.parts.items()} == {"content": 16, "style": 16}
    assert {layer.alpha / layer.rank for part in lora.parts.values() for layer in part.values()} == {scale}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("with_magnitudes", r"It is a DoRA \(in the content part, for example at transformer_blocks\.0\.attn1\.to_k"),
        ("nan", r"content part is damaged at transformer_blocks\.0\.attn1\.to_k: its up .* not finite \(NaN"),
    ],
)
def test_a_file_that_people_have_is_refused_by_its_true_name(name, words):
    with pytest.raises(ValueError, match=f"lora_{name}.safetensors: .*{words}"):
        lora_file.read(CASES / f"lora_{name}.safetensors")


@pytest.mark.parametrize(
    ("spelled", "alpha"),
    [
        (lambda key: key, ".alpha"),
        (lambda key: key, ".lora.alpha"),
        (lambda key: key.replace(".lora.", ".lora_linear_layer."), ".lora_linear_layer.alpha"),
        (lambda key: re.sub(r"\.(to_[a-z]+)(\.0)?\.lora\.", r".processor.\1_lora.", key), "_lora.alpha"),
        (lambda key: "module." + key, ".lora.alpha"),
        (lambda key: key.replace("unet.", "unet._orig_mod."), ".lora_alpha"),
    ],
    ids=["diffusers", "at lora", "at lora_linear_layer", "at the processor", "of DDP", "compiled"],
)
def test_alpha_is_found_wherever_it_stands(spelled, alpha, tmp_path):
    state = {spelled(key): tensor for key, tensor in load_file(AUTHORS).items()}
    modules = {re.split(r"[._]lora(?:_linear_layer)?\.", key)[0] for key in state}
    save_file(state | {f"{module}{alpha}": torch.tensor(8.0) for module in modules}, tmp_path / "x.safetensors")
    lora = lora_file.read(tmp_path / "x.safetensors")
    assert equal_parts(lora.parts, lora_file.read(AUTHORS).parts) and not lora.left_out
    assert {layer.alpha for part in lora.parts.values() for layer in part.values()} == {8.0}


ELSEWHERE = {
    "feed-forward layers": "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_ff_net_2",
    "proj_in and proj_out": "lora_unet_output_blocks_1_1_proj_in",
    "other layers of the two blocks": "unet.up_blocks.0.attentions.1.norm",
    "other blocks of the UNet": "lora_unet_down_blocks_0_resnets_0_conv1",
    "text encoders": "lora_te1_text_model_encoder_layers_0_self_attn_k_proj",
}


@pytest.mark.parametrize(("words", "module"), ELSEWHERE.items())
def test_layers_elsewhere_are_left_out_and_named(words, module, tmp_path):
    ends = {"lora_down.weight": (2, 8, 3, 3), "lora_up.weight": (8, 2, 1, 1), "alpha": ()}
    elsewhere = {f"{module}.{end}": torch.zeros(shape) for end, shape in ends.items()}
    save_file(load_file(CASES / "lora_plain.safetensors") | elsewhere, tmp_path / "x.safetensors")
    lora = lora_file.read(tmp_path / "x.safetensors")
    assert equal_parts(lora.parts, plain_parts())
    assert f"left out: {words} (1, such as {module})" in summarise(lora)


@pytest.mark.parametrize(
    "module",
    ["text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "clip_g.transformer.text_model", "lora_te2_text"],
)
def test_every_spelling_of_a_text_encoder_is_called_that(module):
    assert summarise_left_out([module]).startswith("text encoders (1, ")


def test_what_was_found_is_said():
    lora = lora_file.read(CASES / "lora_alpha_in_header.safetensors")
    metadata = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "consislora.prompt": "A [c]"}
    assert summarise(replace(lora, metadata=metadata)) == [
        "content: 16 layers, rank 4, alpha 16",
        "style: 16 layers, rank 4, alpha 16",
        "base model: stable-diffusion-xl-v1-base",
        "trained with: A [c]",
    ]
    assert summarise(lora)[-2:] == ["base model: not stated", "trained with: not stated"]


@pytest.mark.parametrize("shape", [(1, 1), (1,)], ids=["2d", "1d"])
def test_weights_of_1_x_1_convolutions_are_those_of_linear_layers(shape, tmp_path):
    state = load_file(CASES / "lora_plain.safetensors")
    state = {key: tensor.reshape(*tensor.shape, *shape) if tensor.ndim else tensor for key, tensor in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    assert equal_parts(lora_file.read(tmp_path / "x.safetensors").parts, plain_parts())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_every_precision_are_read(dtype, tmp_path):
    state = {key: tensor.to(dtype) for key, tensor in load_file(CASES / "lora_plain.safetensors").items()}
    save_file(state, tmp_path / "x.safetensors")
    read = lora_file.to_state_dict(lora_file.read(tmp_path / "x.safetensors"))
    assert all(torch.equal(read[key].float(), tensor.float()) for key, tensor in state.items())


def test_what_a_file_says_of_its_own_tensors_does_not_go_into_another(tmp_path):
    with safe_open(CASES / "lora_alpha_in_header.safetensors", "pt") as file:
        metadata = file.metadata() | dict.fromkeys(
            ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"], "1a"
        )
    save_file(load_file(CASES / "lora_alpha_in_header.safetensors"), tmp_path / "x.safetensors", metadata)
    lora_file.write(lora_file.read(tmp_path / "x.safetensors"), tmp_path / "y.safetensors")
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert HEADER in metadata and "1a" not in file.metadata().values() and HEADER not in file.metadata()


def broken_files():
    whole = load_file(CASES / "lora_plain.safetensors")
    one = next(iter(whole)).partition(".")[0]
    at = r"content part.* at transformer_blocks\.0\.attn1\.to_k"
    layer = {key: tensor for key, tensor in whole.items() if key.startswith(f"{one}.")}
    rest = {key: tensor for key, tensor in whole.items() if key not in layer}
    for kind, ends in {
        "DoRA": ["dora_scale", "lora.dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"],
        "AdaLoRA": ["lora_E", "lora_E.default"],
        "LoHa": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
        "LoKr": ["lokr_w1", "lokr_w2_a", "lokr_w2_b"],
        "OFT": ["oft_blocks"],
        "IA3": ["ia3_l.default"],
        "VeRA": ["vera_lambda_b.default"],
        "LoRA with a third weight": ["lora_mid.weight"],
        "GLoRA": ["a1.weight", "b2.weight"],
        "LoRA with a bias": ["lora_B.bias"],
        "layer trained in full": ["diff", "diff_b", "set_weight"],
    }.items():
        for end in ends:
            other = {f"{one}.alpha": torch.tensor(4.0), f"{one}.{end}": torch.ones(4, 4)}
            yield f"{kind}, {end}", {**rest, **other}, f"It is an? {kind} .in the {at}"
    yield "LoKr elsewhere alone", {"lora_te1_x.lokr_w1": torch.ones(2)}, "no LoRA weights .* LoKr, .*lora_te1_x"
    down, up, alpha = (f"{one}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    yield "rank 0", {**whole, down: whole[down][:0], up: whole[up][:, :0]}, f"{at}.* has rank 0"
    for bad in (float("inf"), float("-inf"), float("nan")):
        yield f"weight {bad}", {**whole, down: torch.full_like(whole[down], bad)}, f"{at}: its down .* not finite"
        yield f"alpha {bad}", {**whole, alpha: torch.tensor(bad)}, f"{at}: its alpha .* not finite"
    yield "large weight", {**whole, up: whole[up].float() * 0 - 1e30}, f"{at}: its up holds 1e\\+30"
    yield "large alpha", {**whole, alpha: torch.tensor(1e30)}, f"{at}: its alpha holds 1e\\+30"
    yield "int8", {**whole, down: whole[down].to(torch.int8)}, f"{at}: its down is torch.int8"
    yield "fp4", {**whole, down: torch.zeros(4, 64, dtype=torch.float4_e2m1fn_x2)}, f"{at}: its down is torch.float4"
    yield "many alphas", {**whole, alpha: torch.ones(2)}, "damaged"
    yield "a kernel of 3 x 3", {**whole, down: torch.zeros(4, 128, 3, 3)}, "damaged.*128, 3, 3"
    yield "two adapters", {**whole, f"{one}.lora_A.b.weight": whole[down].clone()}, f"two LoRAs for the {at}.*own"
    yield "SD 1.5", {"lora_unet_up_blocks_1_attentions_0_x.lora_up.weight": whole[up]}, "for another architecture"
    whole = load_file(AUTHORS)
    one = next(iter(whole))
    yield (
        "half a layer",
        {key: value for key, value in whole.items() if key != one},
        "content part is damaged at transformer_blocks.0.attn1.to_k",
    )
    yield "shapes at odds", {**whole, one: torch.zeros(3, 128)}, "damaged"
    yield "nothing", {}, "no LoRA weights"


@pytest.mark.parametrize(
    ("state", "words"), [case[1:] for case in broken_files()], ids=[case[0] for case in broken_files()]
)
def test_a_file_that_cannot_be_used_says_why(state, words, tmp_path):
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=f"broken.safetensors: .*{words}"):
        lora_file.read(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("content", [AUTHORS.read_bytes()[:-100], b"not a LoRA", b""], ids=["cut off", "text", "empty"])
def test_a_file_that_is_no_safetensors_says_so(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors is not a whole safetensors file"):
        lora_file.read(tmp_path / "x.safetensors")


def test_a_tensor_that_no_lora_needs_is_refused_before_it_takes_memory(tmp_path):
    key = "lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    header = json.dumps({key: {"dtype": "I8", "shape": [2**13, 2**12], "data_offsets": [0, 2**25]}}).encode()
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**25)
    with pytest.raises(
        ValueError, match=r"huge.safetensors: .*lora_down.weight has shape \(8192, 4096\), which is more"
    ):
        lora_file.read(tmp_path / "huge.safetensors")


def test_a_missing_part_is_named():
    style_only = ImageLora({"style": lora_file.read(AUTHORS).parts["style"]}, {})
    with pytest.raises(ValueError, match="no content part, only style"):
        style_only.part("content")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    lora = lora_file.read(AUTHORS)
    lora_file.write(lora, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()

    def full_disk(state, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_file, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        lora_file.write(lora, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_bytes() == before


# The same file in every program


@pytest.fixture(scope="module")
def question(host):
    """(x, sigma, cond, tensors) to ask every UNet."""
    tensors, (_, _, cond) = run("stage1_content"), host
    return tensors["z_t"][3, None] * 3, torch.tensor([2.0]), cond, tensors


@pytest.fixture(scope="module")
def ours(question):
    """What our adapters make of the authors' file, in diffusers' UNet."""
    unet = diffusers_unet()
    x, sigma, cond, _ = question
    with inserted(unet, [lora_file.read(AUTHORS).parts], (), torch.device("cpu")), torch.no_grad():
        return diffusers_denoiser(unet).denoise(x, sigma, cond)


@pytest.fixture
def our_file(tmp_path):
    lora_file.write(lora_file.read(AUTHORS), tmp_path / "ours.safetensors", torch.float32)
    return tmp_path / "ours.safetensors"


def comfy_answer(pack, model, question):
    import comfy.model_management

    x, sigma, _, tensors = question
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode():
        cond = pack.host.training_model.encoded_conditioning(model, comfy_conditioning(tensors), x)
        # ComfyUI's samplers hand a model's wrappers over in this way.
        return model.model.apply_model(x, sigma, transformer_options={"wrappers": model.wrappers}, **cond)


def test_the_lora_changes_the_answer(question, ours):
    x, sigma, cond, _ = question
    with torch.no_grad():
        assert relative_error(diffusers_denoiser(diffusers_unet()).denoise(x, sigma, cond), ours) > 1e-2


def test_diffusers_reads_our_file_alike(question, ours, our_file):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = diffusers_unet()
    pipeline = StableDiffusionXLPipeline(None, None, None, None, None, unet, EulerDiscreteScheduler())
    pipeline.load_lora_weights(our_file)
    x, sigma, cond, _ = question
    with torch.no_grad():
        assert relative_error(diffusers_denoiser(unet).denoise(x, sigma, cond), ours) < 1e-4


def test_comfyuis_own_loader_reads_our_file_alike(pack, question, ours, our_file):
    import comfy.sd
    import comfy.utils

    patched, _ = comfy.sd.load_lora_for_models(comfy_model(), None, comfy.utils.load_torch_file(str(our_file)), 1.0, 0)
    assert relative_error(comfy_answer(pack, patched, question), ours) < 1e-4


def test_apply_consislora_gives_the_same_answer(pack, question, ours, our_file):
    lora = lora_file.read(our_file)
    patched = pack.nodes.lora.Apply.execute(comfy_model(), 1.0, 1.0, content=lora, style=lora).result[0]
    assert relative_error(comfy_answer(pack, patched, question), ours) < 1e-4


def test_a_part_acts_at_its_strength_times_alpha_by_rank_and_below_0_the_other_way_round(pack, question, our_file):
    lora = lora_file.read(our_file)
    turned = {path: LoraLayer(layer.down, -layer.up, 2.0 * layer.alpha) for path, layer in lora.part("style").items()}
    answers = [
        comfy_answer(pack, pack.nodes.lora.Apply.execute(comfy_model(), 1.0, *inputs).result[0], question)
        for inputs in ((-0.5, lora, lora), (0.25, lora, ImageLora({"style": turned}, {})))
    ]
    assert relative_error(*answers) < 1e-5


def test_apply_takes_each_role_from_its_own_image(pack, question):
    content, style = (
        lora_file.read(DATA / "loras" / f"{name}.safetensors") for name in ("stage1_content", "stage2_style")
    )
    both = pack.nodes.lora.Apply.execute(comfy_model(), 1.0, 1.0, content=content, style=style).result[0]
    unet = diffusers_unet()
    x, sigma, cond, _ = question
    with (
        inserted(unet, [{"content": content.parts["content"], "style": style.parts["style"]}], (), torch.device("cpu")),
        torch.no_grad(),
    ):
        expected = diffusers_denoiser(unet).denoise(x, sigma, cond)
    assert relative_error(comfy_answer(pack, both, question), expected) < 1e-4


def test_a_lora_of_some_layers_in_every_transformer_block_acts_as_if_the_others_were_zero(pack, question):
    style = lora_file.read(AUTHORS).part("style")
    some = {path: layer for path, layer in style.items() if ".attn2." in path}
    silent = {path: layer if path in some else layer._replace(up=layer.up * 0) for path, layer in style.items()}
    x, sigma, cond, _ = question
    answers = []
    for part in (some, silent):
        unet = diffusers_unet()
        with inserted(unet, [{"style": part}], (), torch.device("cpu")), torch.no_grad():
            answers.append(diffusers_denoiser(unet).denoise(x, sigma, cond))
    assert torch.equal(*answers)
    patched = pack.nodes.lora.Apply.execute(comfy_model(), 1.0, 1.0, style=ImageLora({"style": some}, {})).result[0]
    assert relative_error(comfy_answer(pack, patched, question), answers[0]) < 1e-4
