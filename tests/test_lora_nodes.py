"""Save and Load through ComfyUI: what is saved is found again, and what cannot be is said plainly."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import DATA

from batch.comfy_client import WorkflowError
from consislora_core import lora_file
from consislora_core.lora_file import ImageLora

AUTHORS = DATA / "loras" / "stage2_style.safetensors"
WITH_FEED_FORWARD = DATA / "cases" / "lora_kohya_with_feed_forward.safetensors"
TESTS = Path(__file__).resolve().parent


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


def test_a_suffix_in_capitals_is_listed_and_loads(nodes, loras):
    (loras / save(nodes, "capitals")).rename(loras / "CAPITALS.SAFETENSORS")
    assert "CAPITALS.SAFETENSORS" in nodes.Load.INPUT_TYPES()["required"]["lora_name"][1]["options"]
    assert nodes.Load.execute("CAPITALS.SAFETENSORS").result[0].parts


def test_saving_again_never_overwrites(nodes):
    assert [save(nodes, "again") for _ in range(3)] == [f"again_{i:05}.safetensors" for i in (1, 2, 3)]


def test_fp16_halves_the_file(nodes, loras):

    sizes = [(loras / save(nodes, "size", precision)).stat().st_size for precision in ("fp16", "fp32")]
    assert 0.4 < sizes[0] / sizes[1] < 0.65


SAVES = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from in_process import load_comfy, load_pack
load_comfy(Path(sys.argv[3]))
save = load_pack().nodes.lora.Save.execute
from consislora_core import lora_file
lora = lora_file.read(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    save(lora, "clients/shared", "fp16")
"""


def test_two_servers_that_save_under_one_name_lose_nothing(tmp_path):
    command = [sys.executable, "-c", SAVES, str(TESTS), str(TESTS.parent), str(tmp_path), str(AUTHORS)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as one, subprocess.Popen(command, **pipes) as other:
        for process in (one, other):
            while process.stdout.readline() not in ("ready\n", ""):
                pass
        for process in (one, other):
            process.stdin.write("go\n")
            process.stdin.close()
    saved = sorted((tmp_path / "models" / "loras" / "clients").iterdir())
    assert [path.name for path in saved] == [f"shared_{number:05}.safetensors" for number in range(1, 81)]
    assert {lora_file.read(path).weights_hash for path in saved} == {lora_file.read(saved[0]).weights_hash}


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        (" spaced /ends. ", "spaced/ends"),
        ("windows\\folder/name", "windows/folder/name"),
        ("./here", "here"),
        ("what: a <name>?", "what_ a _name__"),
        ("half \ud83d", "half _"),
        ("ends.safetensors ", "ends"),
        ("cafe\u0301 of a Mac", "caf\u00e9 of a Mac"),
    ],
)
def test_a_name_is_made_one_that_every_system_takes(nodes, name, saved):
    assert save(nodes, name) == f"{saved}_00001.safetensors"
    assert nodes.Load.execute(f"{saved}_00001.safetensors").result[0].parts


def test_a_long_name_is_shortened(nodes):
    name = save(nodes, "x" * 300)
    assert name.startswith("x" * 100) and len(name) < 200
    assert nodes.Load.execute(name).result[0].parts


@pytest.mark.skipif(os.name == "nt", reason="links are for administrators there")
def test_a_linked_subfolder_is_written_to_as_it_is_read(nodes, loras, tmp_path):
    (loras / "linked").symlink_to(tmp_path, target_is_directory=True)
    name = save(nodes, "linked/on_another_disk")
    assert name == "linked/on_another_disk_00001.safetensors" and (tmp_path / Path(name).name).exists()
    assert nodes.Load.execute(name).result[0].parts


def test_with_disable_metadata_a_file_holds_weights_alone(pack, nodes, loras, monkeypatch):
    monkeypatch.setattr(pack.host.paths.args, "disable_metadata", True)
    lora = ImageLora(lora_file.read(AUTHORS).parts, {"consislora.prompt": "a secret"})
    for kind in nodes.FORMATS:
        name = nodes.Save.execute(lora, f"plain {kind}", "fp16", "photo: A. Smith", format=kind).result[0]
        assert not {entry for entry in lora_file.read(loras / name).metadata if entry.startswith("consislora.")}
        assert b"secret" not in (loras / name).read_bytes() and b"Smith" not in (loras / name).read_bytes()


def test_a_prompt_with_half_a_character_is_saved(nodes, loras):
    lora = ImageLora(lora_file.read(AUTHORS).parts, {"consislora.prompt": "A [c] \ud83d"})
    name = nodes.Save.execute(lora, "half", "fp16", "\udc00").result[0]
    metadata = lora_file.read(loras / name).metadata
    assert (metadata["consislora.prompt"], metadata["consislora.rights"]) == ("A [c] \\ud83d", "\\udc00")


@pytest.mark.parametrize(
    "name", ["", "  ", "../outside", "/tmp/outside", "a/../../outside", "clients/", "clients/ ", "a/..", "..\\a",
             "C:\\a", "C:a", ".safetensors", "a/.safetensors", "."],
)  # fmt: skip
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


def test_the_node_and_one_log_line_say_what_was_found(server):
    (server.base / "models" / "loras" / "whole_model.safetensors").write_bytes(WITH_FEED_FORWARD.read_bytes())
    events = []
    server.run(loading("whole_model.safetensors"), on_event=lambda kind, data: events.append(data))
    (text,) = [data.decode() for data in events if isinstance(data, bytes) and b"rank 4" in data]
    assert text.startswith("1content: 16 layers, rank 4, alpha 4\nstyle: 16 layers, rank 4, alpha 4\nleft out: ")
    (line,) = [line for line in server.log.splitlines() if "whole_model.safetensors: left out" in line]
    assert "feed-forward layers (1, such as lora_unet_up_blocks_0_attentions_0_transformer_blocks_0_ff_net_2)" in line


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_a_file_name_that_is_no_utf_8_does_not_end_the_queue(server):
    cut = AUTHORS.read_bytes()[:-100]
    for name, content in {b"old archive \xe9": WITH_FEED_FORWARD.read_bytes(), b"cut \xe9": cut}.items():
        file = os.fsdecode(name + b".safetensors")
        (server.base / "models" / "loras" / file).write_bytes(content)
        with pytest.raises(WorkflowError, match=r"ConsisLoRALoad .*\\udce9.*is not UTF-8. Rename the file"):
            server.run(loading(file), timeout=60)
    (server.base / "models" / "loras" / "plain.safetensors").write_bytes(AUTHORS.read_bytes())
    server.run(loading("plain.safetensors"), timeout=60)
