"""Every input of every node, with values that no widget allows and with what does not fit: refused in a sentence."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from images import IMAGES
from reference import DATA, comfy_model
from test_guidance import conditioning
from test_training_nodes import sd15_model

from consislora_core import lora_file

NAN = float("nan")
LORA = lora_file.read(DATA / "loras" / "stage2_style.safetensors")
# What Python says by itself.
PYTHON = re.compile(r"Error:|object|attribute|subscript|out of range|tensor\(|NoneType|argument|unpack")
# Words that name an input as well as its id does.
NAMES = {"lora_name": "LoRA file"}


def latent(*shape, value=0.5, dtype=torch.float32):
    return {"samples": torch.full(shape, value, dtype=dtype)}


def pictures(*shape, value=0.5):
    return torch.full(shape, value)


def foreign_lora():
    """A LoRA that was trained on a model with wider layers."""
    parts = {
        role: {path: layer._replace(down=torch.zeros(2, 640)) for path, layer in part.items()}
        for role, part in LORA.parts.items()
    }
    return replace(LORA, parts=parts)


def failed_lora(value=NAN):
    """A LoRA whose training has failed, or whose weights fp16 cannot hold."""
    parts = {
        role: {path: layer._replace(up=torch.full_like(layer.up, value)) for path, layer in part.items()}
        for role, part in LORA.parts.items()
    }
    return replace(LORA, parts=parts)


def compiled_model():
    """A MODEL whose layers another node has hidden."""
    model = comfy_model()
    model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="eager")
    return model


def with_text(text=None, **extras):
    ((usual, known),) = conditioning("main")
    return [[usual if text is None else text, {**known, **extras}]]


class Vae:
    """What is asked of a VAE before it decodes."""

    def __init__(self, latent_channels=4):
        self.latent_channels = latent_channels

    def spacial_compression_decode(self):
        return 8


# By socket: what does not fit, each with a name.
BAD_SOCKETS = {
    "MODEL": {"SD 1.5": sd15_model, "compiled": compiled_model},
    "LATENT": {
        "no picture's": dict,
        "empty batch": lambda: latent(0, 4, 16, 16),
        "no area": lambda: latent(1, 4, 0, 16),
        "other channels": lambda: latent(1, 16, 16, 16),
        "a video's": lambda: latent(1, 4, 2, 16, 16),
        "NaN": lambda: latent(1, 4, 16, 16, value=NAN),
        "infinite in fp16": lambda: latent(1, 4, 16, 16, value=float("inf"), dtype=torch.float16),
        "one pixel": lambda: latent(1, 4, 1, 1),
        "empty mask": lambda: {**latent(1, 4, 16, 16), "noise_mask": torch.ones(0, 128, 128)},
        "NaN in its mask": lambda: {**latent(1, 4, 16, 16), "noise_mask": torch.full((1, 128, 128), NAN)},
        "a number too few": lambda: {**latent(2, 4, 16, 16), "batch_index": [0]},
    },
    "CONDITIONING": {
        "empty": list,
        "no text": lambda: [[None, {}]],
        "of SD 1.5": lambda: with_text(torch.zeros(1, 77, 768)),
        "NaN": lambda: with_text(torch.full((1, 77, 64), NAN)),
        "one sentence as 2d": lambda: with_text(torch.zeros(77, 64)),
        "no rows": lambda: with_text(torch.zeros(0, 77, 64)),
        "no tokens": lambda: with_text(torch.zeros(1, 0, 64)),
        "words": lambda: [["a crown", {}]],
        "no pair": lambda: [[torch.zeros(1, 77, 64)]],
        "nothing beside the text": lambda: [[torch.zeros(1, 77, 64), None]],
        "NaN in the pooled vector": lambda: with_text(pooled_output=torch.full((1, 32), NAN)),
        "infinite pooled vector": lambda: with_text(pooled_output=torch.full((1, 32), float("inf"))),
        "empty pooled vector": lambda: with_text(pooled_output=torch.zeros(0, 32)),
        "pooled vector as 1d": lambda: with_text(pooled_output=torch.zeros(32)),
        "no pooled vector": lambda: with_text(pooled_output=None),
        "another pooled vector": lambda: with_text(pooled_output=torch.zeros(1, 1280)),
    },
    "IMAGE": {
        "empty batch": lambda: pictures(0, 16, 16, 3),
        "no area": lambda: pictures(1, 0, 16, 3),
        "five channels": lambda: pictures(1, 16, 16, 5),
        "a mask": lambda: pictures(1, 16, 16),
        "NaN": lambda: pictures(1, 16, 16, 3, value=NAN),
        "infinite": lambda: pictures(1, 16, 16, 3, value=float("inf")),
    },
    "MASK": {
        "empty batch": lambda: torch.ones(0, 16, 16),
        "no area": lambda: torch.ones(1, 16, 0),
        "nothing inside": lambda: torch.zeros(1, 16, 16),
        "NaN": lambda: torch.full((1, 16, 16), NAN),
        "another shape": lambda: torch.ones(1, 16, 64).tril(),
        "too many": lambda: torch.ones(3, 16, 16),
    },
    "CONSISLORA": {
        "another architecture": foreign_lora,
        "NaN": failed_lora,
        "infinite in fp16": lambda: failed_lora(1e6),
    },
    "CONSISLORA_SCORES": {"empty": list, "nothing": lambda: [None], "words": lambda: [{"edges": "high"}]},
    "VAE": {"of another base": lambda: Vae(16)},
}
# Tiny pictures are no fault elsewhere.
MORE = {("ConsisLoRAEvaluate", name): lambda: pictures(1, 7, 16, 3) for name in ("images", "content_image")}
# What nodes do with what is no fault of theirs.
FITS = {
    # Another model's LoRA can be saved, and named in a picture's metadata.
    ("ConsisLoRASave", "consislora", "another architecture"),
    *(("ConsisLoRACatalogSave", one, kind) for one in ("content", "style") for kind in BAD_SOCKETS["CONSISLORA"]),
    # Accept or Reject looks at scores, and puts pictures aside.
    *(("ConsisLoRAGate", "images", kind) for kind in BAD_SOCKETS["IMAGE"] if kind != "empty batch"),
}


@pytest.fixture
def job(pack):
    """A pair of a catalogue, as Load Catalogue gives it."""
    import folder_paths

    for folder, name in (("contents", "crown-flat"), ("styles", "owl-flat")):
        path = Path(folder_paths.get_input_directory(), folder)
        path.mkdir(parents=True, exist_ok=True)
        shutil.copy(IMAGES / f"{name}.png", path)
    inputs = ("contents", "styles", "bad_inputs", "{content}_{style}", "one pair per run", 0)
    return pack.nodes.catalogue.CatalogLoad.execute(*inputs).result[2][0]


def good(node, model, job) -> dict:
    """Inputs that fit, as far as a node looks before it computes; widgets at their defaults."""
    sockets = {
        "MODEL": lambda: model,
        "VAE": Vae,
        "CONSISLORA_JOB": lambda: job,
        "LATENT": lambda: latent(1, 4, 16, 16),
        "CONDITIONING": lambda: conditioning("main"),
        "IMAGE": lambda: pictures(1, 16, 16, 3),
        "MASK": lambda: torch.ones(1, 16, 16),
        "CONSISLORA": lambda: LORA,
        "CONSISLORA_SCORES": lambda: [{"edges": 1.0, "silhouette": 1.0}],
    }
    inputs = node.define_schema().inputs
    values = {one.id: sockets[one.io_type]() for one in inputs if one.io_type in sockets}
    values |= {one.id: first_choice(one) for one in inputs if getattr(one, "options", None)}
    return values | {one.id: one.default for one in inputs if getattr(one, "default", None) is not None}


def first_choice(combo):
    return combo.options[0]


def bad_values(node) -> dict:
    """By input and name: values that the node must refuse."""
    found = {}
    for one in node.define_schema().inputs:
        if hasattr(one, "min"):
            found |= {(one.id, str(value)): value for value in (NAN, float("inf"), one.min - 1, one.max + 1, "a", None)}
            if one.io_type == "INT":
                found[one.id, "a half"] = one.min + 0.5
        elif hasattr(one, "options"):
            found |= {(one.id, "no such choice"): "no such choice", (one.id, "a number"): 5}
        elif one.io_type == "STRING":
            found |= {(one.id, "a number"): 5, (one.id, "nothing"): None}
        elif one.io_type != "BOOLEAN":
            found |= {(one.id, "a word"): "word", (one.id, "a number"): 5}
            if not one.optional:
                found[one.id, "nothing"] = None
            found |= {(one.id, name): make for name, make in BAD_SOCKETS.get(one.io_type, {}).items()}
            if make := MORE.get((node.define_schema().node_id, one.id)):
                found[one.id, "tiny"] = make
    return found


def refused(node, values: dict) -> str | None:
    """The words of the ValueError, or what else came of it."""
    try:
        with torch.inference_mode():
            node.execute(**values)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def test_every_bad_value_of_every_input_is_refused_in_a_sentence_that_names_it(pack, job):
    wrong, model = [], comfy_model()
    for node in pack.nodes.NODES:
        name, usual = node.define_schema().node_id, good(node, model, job)
        for (one, kind), bad in bad_values(node).items():
            if (name, one, kind) in FITS:
                continue
            text = refused(node, {**usual, one: bad() if callable(bad) else bad})
            named = NAMES.get(one, one).replace("_", "[_ ]")
            if not re.search(named, text, re.IGNORECASE) or PYTHON.search(text) or not text.endswith("."):
                wrong.append(f"{name}.{one}, {kind}: {text[:200]}")
    assert not wrong, "\n" + "\n".join(wrong)
