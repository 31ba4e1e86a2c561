"""Save and Load through ComfyUI: what is saved is found again, and what cannot be is said plainly."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import DATA

from batch.comfy_client import WorkflowError
from consislora_core import lora_file

AUTHORS = DATA / "loras" / "stage2_style.safetensors"


@pytest.fixture
def nodes(pack):
    return pack.nodes.lora


@pytest.fixture
def loras(nodes):
    """models/loras of the ComfyUI in this process."""
    import folder_paths

    return Path(folder_paths.get_folder_paths("loras")[0])


def save(nodes, filename, precision="fp32"):
    return nodes.Save.execute(lora_file.read(AUTHORS), filename, precision).result[0]


def test_what_is_saved_is_listed_and_loads_as_it_was(nodes):
    name = save(nodes, "clients/teapot")
    assert name == "clients/teapot_00001.safetensors"
    assert name in nodes.Load.INPUT_TYPES()["required"]["lora_name"][1]["options"]
    loaded = nodes.Load.execute(name).result[0]
    saved = lora_file.to_state_dict(lora_file.read(AUTHORS))
    assert all(torch.equal(tensor, saved[key]) for key, tensor in lora_file.to_state_dict(loaded).items())


def test_saving_again_never_overwrites(nodes):
    assert [save(nodes, "again") for _ in range(3)] == [f"again_{i:05}.safetensors" for i in (1, 2, 3)]


def test_fp16_halves_the_file(nodes, loras):

    sizes = [(loras / save(nodes, "size", precision)).stat().st_size for precision in ("fp16", "fp32")]
    assert 0.4 < sizes[0] / sizes[1] < 0.65


@pytest.mark.parametrize("name", ["", "  ", "../outside", "/tmp/outside", "a/../../outside"])
def test_a_name_that_leads_outside_is_refused(nodes, name):
    with pytest.raises(ValueError, match="filename is .*it must be a name inside models/loras"):
        save(nodes, name)


@pytest.mark.parametrize("name", ["../../input/x.safetensors", "/etc/passwd", "missing.safetensors"])
def test_loading_from_outside_is_refused(nodes, name):
    with pytest.raises(ValueError, match="There is no LoRA file .* in models/loras"):
        nodes.Load.execute(name)


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")])
def test_a_disk_that_refuses_is_named_and_nothing_is_left(nodes, loras, monkeypatch, number, words):

    def refuse(state, path, metadata):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lora_file, "save_file", refuse)
    before = sorted(loras.rglob("*"))
    with pytest.raises(ValueError, match=f"could not be saved to .*{words}.*Free some space or choose a folder"):
        save(nodes, "full")
    assert sorted(loras.rglob("*")) == before


def test_the_prompt_is_found_behind_the_conditioning(pack):
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "A [c]"}},
        "2": {"class_type": "ConsisLoRATrainImage", "inputs": {"positive": ["1", 0]}},
        "3": {"class_type": "ConsisLoRATrainImage", "inputs": {"positive": ["9", 0]}},
    }
    words = [
        pack.host.prompt_graph.text_behind(hidden, "positive")
        for hidden in (*(SimpleNamespace(prompt=graph, unique_id=node) for node in "23"), None)
    ]
    assert words == ["A [c]", "", ""]


def loading(name):
    return {
        "1": {"class_type": "ConsisLoRALoad", "inputs": {"lora_name": name}},
        "2": {
            "class_type": "ConsisLoRASave",
            "inputs": {"consislora": ["1", 0], "filename": "copy", "precision": "fp16"},
        },
    }


def test_the_server_shows_the_reason_and_takes_the_next_job(server):
    loras = server.base / "models" / "loras"
    (loras / "cut.safetensors").write_bytes(AUTHORS.read_bytes()[:-100])
    (loras / "whole.safetensors").write_bytes(AUTHORS.read_bytes())
    with pytest.raises(WorkflowError, match="ConsisLoRALoad .*cut.safetensors is not a whole safetensors file"):
        server.run(loading("cut.safetensors"))
    with pytest.raises(WorkflowError, match="ConsisLoRALoad .*(Value not in list|There is no LoRA file)"):
        server.run(loading("../../../etc/passwd"))
    server.run(loading("whole.safetensors"))
    assert (loras / "copy_00001.safetensors").exists()
