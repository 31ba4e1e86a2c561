"""LoRA files: every spelling in, one spelling out, and the same picture in every program that reads it."""

import json
import re
from dataclasses import replace

import pytest
import torch
from reference import DATA, comfy_conditioning, comfy_model, diffusers_denoiser, diffusers_unet, relative_error, run
from safetensors.torch import load_file, save_file

from consislora_core import lora_file
from consislora_core.adapters import inserted
from consislora_core.lora_file import ImageLora, LoraLayer

AUTHORS = DATA / "loras" / "stage2_style.safetensors"
SGM_BLOCK = {"up_blocks_0_attentions_0": "output_blocks_0_1", "up_blocks_0_attentions_1": "output_blocks_1_1"}


def kohya(key):
    return "lora_" + re.sub(r"\.(?=.*\.lora\.)", "_", key).replace(".lora.", ".lora_")


def sgm(key):
    return re.sub("up_blocks_0_attentions_[01]", lambda block: SGM_BLOCK[block[0]], kohya(key))


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
    assert lora.metadata.items() <= lora_file.read(tmp_path / "a" / "x.safetensors").metadata.items()


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


def broken_files():
    whole = load_file(AUTHORS)
    one = next(iter(whole))
    yield (
        "foreign key",
        {**whole, "lora_te1_text_model_encoder_layers_0.lora_up.weight": torch.zeros(2, 2)},
        "1 of 65 keys.*lora_te1_text_model",
    )
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
