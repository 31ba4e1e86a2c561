"""What is stated of a LoRA stays with it: in its file, and in every picture made with it."""

import json
import re
import time
from types import SimpleNamespace

import pytest
from in_process import COMFYUI
from PIL import Image
from prompts import quick
from reference import DATA
from safetensors import safe_open

from consislora_core import lora_file
from demo.run import IMAGES
from demo.server import ComfyServer

AUTHORS = DATA / "loras" / "stage2_style.safetensors"
STATED = {"rights": "photo: A. Smith", "permission": "trained with permission"}


@pytest.fixture
def lora():
    return lora_file.read(AUTHORS)


def saved(pack, lora, *inputs):
    name = pack.nodes.lora.Save.execute(lora, "rights", *inputs).result[0]
    return lora_file.read(pack.host.paths.lora_path(name))


def test_a_lora_and_its_files_have_one_hash_and_another_lora_another(pack, lora):
    files = [saved(pack, lora, precision) for precision in ("fp16", "fp32")]
    assert {one.weights_hash for one in (lora, *files)} == {files[0].metadata["consislora.weights"]}
    content = lora_file.ImageLora({"content": lora.part("content")}, {})
    assert content.weights_hash != lora.weights_hash


def test_what_is_stated_is_in_the_file_and_stays_when_nothing_new_is_stated(pack, lora):
    first = saved(pack, lora, "fp16", " photo: A. Smith\n", STATED["permission"])
    again = saved(pack, first, "fp16")
    for file in (first, again):
        assert {name: file.metadata[f"consislora.{name}"] for name in STATED} == STATED


def test_what_is_not_stated_is_not_in_the_file(pack, lora):
    assert not {f"consislora.{name}" for name in STATED} & saved(pack, lora, "fp16").metadata.keys()


def running(prompt: dict, node: str) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, unique_id=node, extra_pnginfo={"workflow": {}})


def stylising(seed: int) -> dict:
    return {
        "1": {"class_type": "ConsisLoRALoad", "inputs": {"lora_name": "style.safetensors"}},
        "2": {"class_type": "ConsisLoRASampler", "inputs": {"style": ["1", 0], "seed": seed}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "a"}},
    }


def test_a_node_that_runs_notes_it_and_one_that_does_not_is_recalled(pack, lora):
    provenance, hidden = pack.host.provenance, running(stylising(1), "2")
    provenance.note(hidden, {"content": None, "style": lora}, {"seed": 1, "content_positive": [["text", {}]]})
    record = {"2": {"style": provenance.describe_lora(lora), "seed": 1}}
    assert hidden.extra_pnginfo == {"workflow": {}, "consislora": record}

    renamed = stylising(1)
    renamed["3"]["inputs"]["filename_prefix"] = "b"
    assert provenance.recall({"prompt": renamed})["extra_data"]["extra_pnginfo"] == {"consislora": record}
    assert provenance.recall({"prompt": stylising(2)})["extra_data"]["extra_pnginfo"] == {}


def queued_again(provenance, prompt: dict, **extra) -> dict:
    return provenance.recall({"prompt": prompt, "extra_data": extra})["extra_data"]


def test_a_workflow_without_a_node_of_ours_is_queued_as_it_came(pack):
    theirs = {"1": stylising(1)["3"]}
    for posted in ({"prompt": theirs}, {"prompt": theirs, "extra_data": {"client_id": "a"}}, {"prompt": [theirs]}, {}):
        assert pack.host.provenance.recall(json.loads(json.dumps(posted))) == posted


def test_a_record_is_found_though_comfyui_has_made_floats_of_whole_numbers(pack):
    provenance, sent, run = pack.host.provenance, stylising(9), stylising(9)
    sent["2"]["inputs"]["cfg"], run["2"]["inputs"]["cfg"] = 5, 5.0
    provenance.note(running(run, "2"), {}, {"cfg": 5.0})
    assert queued_again(provenance, sent)["extra_pnginfo"] == {"consislora": {"2": {"cfg": 5.0}}}


def test_seeds_that_are_equal_as_floats_have_records_of_their_own(pack):
    provenance = pack.host.provenance
    provenance.note(running(stylising(2**60), "2"), {}, {"seed": 2**60})
    assert queued_again(provenance, stylising(2**60 + 1))["extra_pnginfo"] == {}


@pytest.mark.parametrize("theirs", [None, {}, [], "", 0, "text", [["workflow", 1]], {"consislora": "theirs"}], ids=str)
def test_metadata_of_any_kind_is_taken(theirs, pack):
    provenance, prompt = pack.host.provenance, stylising(8)
    hidden = SimpleNamespace(prompt=prompt, unique_id="2", extra_pnginfo=theirs)
    assert provenance.recorded(hidden) == {}
    provenance.note(hidden, {}, {"seed": 8})
    record = {"2": {"seed": 8}}
    takes_entries = isinstance(theirs, dict) or not theirs
    assert provenance.recorded(hidden) == (record if isinstance(theirs, dict) else {})
    assert "prompt" in pack.host.prompt_graph.workflow_texts(hidden)
    again = queued_again(provenance, prompt, extra_pnginfo=theirs)["extra_pnginfo"]
    assert again == ({"consislora": record} if takes_entries else theirs)


def test_queueing_walks_a_long_chain_once(pack):
    """Two thousand nodes in a row, which took minutes when each node walked all before it. A circle ends as well."""
    chain = {str(i): {"class_type": "ConsisLoRAApply", "inputs": {"model": [str(i - 1), 0]}} for i in range(2000)}
    chain["0"]["inputs"]["model"] = ["1999", 0]
    began = time.monotonic()
    queued_again(pack.host.provenance, chain)
    assert time.monotonic() - began < 2


def test_what_is_remembered_has_a_limit(pack, lora, monkeypatch):
    provenance = pack.host.provenance
    monkeypatch.setattr(provenance, "records", {})
    monkeypatch.setattr(provenance, "KEPT", 3)
    for seed in range(5):
        provenance.note(running(stylising(seed), "2"), {}, {"seed": seed})
    assert [record["seed"] for record in provenance.records.values()] == [2, 3, 4]
    for seed in (2, 5):  # the same again is as good as new
        provenance.note(running(stylising(seed), "2"), {}, {"seed": seed})
    assert [record["seed"] for record in provenance.records.values()] == [4, 2, 5]


# ---- in the server


def test_a_saved_picture_tells_its_loras_also_when_sampling_was_remembered(server, trained):
    prompt = quick("dual_guidance_demo", steps=1, content_strength=0.75)
    first = recorded(server, prompt)
    (record,) = first.values()
    assert record["content_strength"] == 0.75
    for image, words in (("content", "A [c]"), ("style", "An image in the style of [v]")):
        path = server.base / "models" / "loras" / "workflows" / f"{image}_00001.safetensors"
        with safe_open(path, "pt") as file:
            weights = file.metadata()["consislora.weights"]
        assert record[image] == {"weights": weights, "prompt": words, **STATED}
    renamed = {**prompt}
    (result,) = [node for node, one in prompt.items() if one["class_type"] == "SaveImage"]
    renamed[result] = {**prompt[result], "inputs": {**prompt[result]["inputs"], "filename_prefix": "renamed"}}
    assert recorded(server, renamed) == first


def test_with_disable_metadata_no_file_tells_of_prompt_rights_or_workflow(tmp_path):
    with ComfyServer(tmp_path, COMFYUI, "--disable-metadata") as server:
        for file in IMAGES.glob("*.png"):
            server.upload(file)
        server.run(quick("train_and_stylise_demo", rights="photo: A. Smith"))
    files = [path for folder in ("models", "output") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {".png", ".safetensors", ".lora"} <= {path.suffix for path in files}
    for path in files:
        assert not re.search(rb"A \[c\]|A\. Smith|image_hash|consislora\.|class_type", path.read_bytes()), path


def recorded(server, prompt: dict) -> dict:
    (file,) = server.images(server.run(prompt))
    with Image.open(file) as image:
        return json.loads(image.text["consislora"])
