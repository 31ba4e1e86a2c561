"""The pack in a real ComfyUI, and the class that drives it."""

import psutil
import pytest

from batch.comfy_client import WorkflowError
from demo.server import ComfyServer, ServerError

BLANK = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}


def save(source: str) -> dict:
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": "test"}}


def test_comfyui_imports_the_pack(server):
    report = server.log.split("Import times for custom nodes:")[1]
    (line,) = [line for line in report.splitlines() if line.endswith("ComfyUI-ConsisLoRA")]
    assert "IMPORT FAILED" not in line


def test_a_workflow_runs_and_its_pictures_are_found(server):
    events = []
    large = {**BLANK, "inputs": {**BLANK["inputs"], "width": 4096, "height": 4096}}  # not done before we listen
    entry = server.run({"1": large, "2": save("1")}, on_event=lambda kind, data: events.append(kind))
    (picture,) = server.images(entry)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "execution_success" in events


def test_workflows_may_be_awaited_in_any_order(server):
    ids = [server.queue({"1": {**BLANK, "inputs": {**BLANK["inputs"], "color": n}}, "2": save("1")}) for n in (1, 2, 3)]
    for prompt_id in reversed(ids):
        assert server.images(server.wait(prompt_id, timeout=30))


def test_a_refused_workflow_names_node_and_input(server):
    with pytest.raises(WorkflowError, match=r"EmptyImage \(node 1\): .*width"):
        server.queue({"1": {**BLANK, "inputs": {**BLANK["inputs"], "width": "wide"}}, "2": save("1")})


def test_a_failing_node_is_named(server):
    broken = {"class_type": "RegexReplace", "inputs": {"string": "a", "regex_pattern": "(", "replace": ""}}
    show = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    with pytest.raises(WorkflowError, match=r"RegexReplace \(node 1\): .*unterminated"):
        server.run({"1": broken, "2": show})


def test_a_server_that_dies_says_why_and_leaves_nothing_running(tmp_path):
    comfyui = tmp_path / "comfyui"
    comfyui.mkdir()
    (comfyui / "main.py").write_text("raise SystemExit('no room for models')")
    with pytest.raises(ServerError, match="no room for models"), ComfyServer(tmp_path / "base", comfyui):
        pass
    assert not [child for child in psutil.Process().children() if str(comfyui) in " ".join(child.cmdline())]
