"""Adapters as PEFT and diffusers keep them: what they write reads here, and what is written here they load alike."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from reference import DATA, diffusers_denoiser, diffusers_unet, relative_error, run
from safetensors.torch import load_file, save_file
from torch import nn

from consislora_core import lora_file, peft_format
from consislora_core.adapter_config import ADAPTER_FILE, CONFIG_FILE, HEADER
from consislora_core.adapters import LoraLinear, inserted
from consislora_core.lora_file import ImageLora, LoraLayer

AUTHORS = DATA / "loras" / "stage2_style.safetensors"
BLOCKS = r"up_blocks\.0\.attentions\.[01]\..*\.(to_q|to_k|to_v|to_out\.0)"


def authors_lora(*roles: str) -> ImageLora:
    parts = lora_file.read(AUTHORS).parts
    return ImageLora({role: parts[role] for role in roles}, {"consislora.rights": "photo: A. Smith"})


@pytest.fixture(scope="module")
def ask(host):
    """Asks a diffusers UNet for its prediction."""
    tensors, (_, _, cond) = run("stage1_content"), host

    def ask(unet):
        with torch.no_grad():
            return diffusers_denoiser(unet).denoise(tensors["z_t"][3, None] * 3, torch.tensor([2.0]), cond)

    return ask


def our_answer(ask, lora: ImageLora):
    unet = diffusers_unet()
    with inserted(unet, [lora.parts], (), torch.device("cpu")):
        return ask(unet)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


# What we write


@pytest.mark.parametrize("roles", [("content",), ("style",), ("content", "style")], ids=" and ".join)
def test_peft_loads_our_folder_and_answers_alike(ask, folder, roles):
    from peft import PeftModel

    lora = authors_lora(*roles)
    peft_format.write(lora, folder, torch.float32)
    model = PeftModel.from_pretrained(diffusers_unet(), folder)
    assert relative_error(ask(model.base_model.model), our_answer(ask, lora)) < 1e-5
    assert relative_error(ask(diffusers_unet()), our_answer(ask, lora)) > 1e-3


def test_inject_adapter_in_model_takes_our_config_and_tensors(ask, folder):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    lora = authors_lora("content", "style")
    peft_format.write(lora, folder, torch.float32)
    unet = inject_adapter_in_model(LoraConfig.from_pretrained(folder), diffusers_unet())
    loaded = set_peft_model_state_dict(unet, load_file(folder / ADAPTER_FILE))
    assert not loaded.unexpected_keys
    assert relative_error(ask(unet), our_answer(ask, lora)) < 1e-5


def test_layers_of_other_rank_and_alpha_keep_them(ask, folder):
    from peft import PeftModel

    lora = authors_lora("content", "style")
    layers = lora.parts["style"]
    first, second, *_ = layers
    layers[first] = LoraLayer(layers[first].down[:2], layers[first].up[:, :2], 8.0)
    layers[second] = layers[second]._replace(alpha=1.0)
    peft_format.write(lora, folder, torch.float32)
    again = peft_format.read(folder)
    assert [(again.parts["style"][path].rank, again.parts["style"][path].alpha) for path in (first, second)] == [
        (2, 8.0),
        (4, 1.0),
    ]
    model = PeftModel.from_pretrained(diffusers_unet(), folder)
    assert relative_error(ask(model.base_model.model), our_answer(ask, lora)) < 1e-5


def test_a_folder_reads_back_as_it_was_written(folder):
    lora = authors_lora("content", "style")
    peft_format.write(lora, folder, torch.float32)
    for again in (peft_format.read(folder), peft_format.read(folder / ADAPTER_FILE)):
        assert again.weights_hash == lora.weights_hash
        assert again.metadata["consislora.rights"] == "photo: A. Smith"


def test_a_folder_that_is_there_is_left_as_it_is(folder):
    folder.mkdir()
    with pytest.raises(FileExistsError):
        peft_format.write(authors_lora("style"), folder)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_whole_is_not_there(folder, monkeypatch):
    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lora_file, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        peft_format.write(authors_lora("style"), folder)
    assert not folder.exists()


# What PEFT and diffusers write


@pytest.fixture
def trained_by_peft():
    """A function that gives a diffusers UNet with PEFT's LoRA, of random weights, for fields of its config."""
    from peft import LoraConfig, get_peft_model

    def make(**fields):
        torch.manual_seed(0)
        model = get_peft_model(diffusers_unet(), LoraConfig(target_modules=BLOCKS, **fields))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.1)
        return model

    return make


CONFIGS = [
    dict(r=4, lora_alpha=4),
    dict(r=4, lora_alpha=16),
    dict(r=4, lora_alpha=8, use_rslora=True),
    dict(r=4, lora_alpha=8, alpha_pattern={r"attentions.0.*to_q": 2, "to_k": 16}, rank_pattern={"attn2.to_v": 2}),
]


@pytest.mark.parametrize("fields", CONFIGS, ids=["alpha = rank", "alpha", "rsLoRA", "patterns"])
def test_a_folder_of_peft_reads_at_the_scale_it_was_trained_at(ask, trained_by_peft, folder, fields):
    model = trained_by_peft(**fields)
    model.save_pretrained(folder)
    assert relative_error(our_answer(ask, peft_format.read(folder)), ask(model.base_model.model)) < 1e-5


def test_a_file_of_a_diffusers_pipeline_has_its_scale_in_the_header(ask, trained_by_peft, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from peft import get_peft_model_state_dict

    model = trained_by_peft(r=4, lora_alpha=16)
    state = {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}
    fields = {
        key: list(value) if isinstance(value, set) else value
        for key, value in model.peft_config["default"].to_dict().items()
    }
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=fields)
    (file,) = tmp_path.glob("*.safetensors")
    assert relative_error(our_answer(ask, lora_file.read(file)), ask(model.base_model.model)) < 1e-5


@pytest.mark.parametrize("prefix", ["", "unet."], ids=["of a model", "of a pipeline"])
def test_alpha_in_the_header_gives_the_scale(tmp_path, prefix):
    header = {HEADER: json.dumps({f"{prefix}r": 4, f"{prefix}lora_alpha": 16})}
    save_file(load_file(AUTHORS), tmp_path / "x.safetensors", header)
    for part in lora_file.read(tmp_path / "x.safetensors").parts.values():
        assert {layer.alpha / layer.rank for layer in part.values()} == {4.0}


@pytest.mark.parametrize("header", ["", "null", "{}"])
def test_a_header_that_states_nothing_is_none(tmp_path, header):
    save_file(load_file(AUTHORS), tmp_path / "x.safetensors", {HEADER: header})
    assert lora_file.read(tmp_path / "x.safetensors").parts.keys() == {"content", "style"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "It uses DoRA, which ConsisLoRA cannot hold"),
        ({"peft_type": "LOHA"}, "It uses LOHA"),
        ({"peft_type": "\ud83d"}, r"It uses \\ud83d"),
        ({"bias": "lora_only", "modules_to_save": ["conv_in"]}, "It uses layers trained in full and bias lora_only"),
        ({"r": 8}, "say rank 8 for up_blocks.0.attentions.*which has rank 4"),
        ({"lora_alpha": "16"}, "cannot be read .a rank or alpha is not a finite number"),
        ({"lora_alpha": float("nan")}, "cannot be read .a rank or alpha is not a finite number"),
        ({"lora_alpha": 10**400}, "settings as a PEFT adapter cannot be read"),
        ({"alpha_pattern": {"(": 1}}, "settings as a PEFT adapter cannot be read"),
        ([], "cannot be read .they are no JSON object.. Download or save it again"),
    ],
    ids=str,
)
def test_a_config_that_a_lora_cannot_hold_is_refused_by_name(tmp_path, fields, words):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    shutil.copy(AUTHORS, tmp_path / ADAPTER_FILE)
    with pytest.raises(ValueError, match=f"{ADAPTER_FILE}: .*{words}"):
        peft_format.read(tmp_path)


# Our layer and PEFT's


def test_our_layer_is_pefts_in_forward_and_gradients():
    from peft.tuners.lora import Linear, LoraConfig

    torch.manual_seed(0)
    base, down, up = nn.Linear(24, 16), torch.randn(4, 24), torch.randn(16, 4)
    theirs = Linear(base, "default", LoraConfig(r=4, lora_alpha=8), r=4, lora_alpha=8)
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = down.clone(), up.clone()
    ours = LoraLinear(base, down[None], up[None], alpha=8.0)
    x = torch.randn(3, 5, 24, requires_grad=True)
    grad = torch.randn(3, 5, 16)
    answers = ours(x), theirs(x)
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
    weights = [ours.down, ours.up], [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    gradients = [torch.autograd.grad(y, [x, *params], grad) for y, params in zip(answers, weights, strict=True)]
    for our_gradient, their_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(our_gradient.view_as(their_gradient), their_gradient, rtol=1e-5, atol=1e-5)


# The nodes


def test_save_as_peft_folder_is_listed_and_loads_as_it_was(pack):
    lora = authors_lora("content", "style")
    names = [pack.nodes.lora.Save.execute(lora, "clients/peft", "fp32", format="PEFT folder").result[0] for _ in "12"]
    assert names == [f"clients/peft_0000{number}/{ADAPTER_FILE}" for number in (1, 2)]
    assert set(names) <= set(pack.host.paths.lora_names())
    assert pack.nodes.lora.Load.execute(names[0]).result[0].weights_hash == lora.weights_hash


def test_a_folder_whose_config_has_changed_is_loaded_again(pack):
    Load, lora = pack.nodes.lora.Load, authors_lora("style")
    name = pack.nodes.lora.Save.execute(lora, "config", "fp32", format="PEFT folder").result[0]
    config = pack.host.paths.lora_path(name).with_name(CONFIG_FILE)
    state = Load.fingerprint_inputs(name)
    assert Load.fingerprint_inputs(name) == state
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 8}))
    assert Load.fingerprint_inputs(name) != state


def test_without_peft_a_sentence_says_how_to_get_it_and_nothing_is_left(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"peft is missing.*pip install \"\.\[peft\]\""):
        pack.nodes.lora.Save.execute(authors_lora("style"), "no_peft", "fp16", format="PEFT folder")
    assert not list(Path(pack.host.paths.loras_folder()).glob("no_peft*"))
