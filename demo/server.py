"""A real ComfyUI with this pack in it, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import websocket

PACK = Path(__file__).resolve().parent.parent
FOLDERS = ["custom_nodes", "input", "output", "temp", "user"]
MODEL_FOLDERS = ["checkpoints", "clip_vision", "loras", "text_encoders", "unet", "vae"]
PREVIEW_FRAME = 1  # BinaryEventTypes.PREVIEW_IMAGE in ComfyUI's protocol.py

OnEvent = Callable[[str, "dict | bytes"], None]


class ServerError(RuntimeError):
    """ComfyUI did not start, or died; the text ends with the end of its log."""


class WorkflowError(RuntimeError):
    """ComfyUI refused a workflow, or a node in it failed; the text names the node."""


class ComfyServer:
    """Runs ComfyUI in `base` while the `with` block lasts.

        with ComfyServer(Path("somewhere"), Path("ComfyUI")) as server:
            entry = server.run(prompt)
            pictures = server.images(entry)

    `prompt` is a workflow in API form. Models and input pictures are read from `base`, pictures
    are written there. `options` are more of ComfyUI's own. Raises ServerError if ComfyUI does not come up.
    """

    def __init__(self, base: Path, comfyui: Path, *options: str):
        self.base = base.resolve()
        self.comfyui = comfyui
        self.options = options
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = self.base / "comfyui.log"
        self._client = uuid.uuid4().hex
        # The server is on this machine: a proxy set for the rest of the world must stay out of it.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def __enter__(self) -> ComfyServer:
        self._lay_out()
        self._process = self._start()
        try:
            self._wait_until_up(timeout=300)
            self._socket = self._connect()
        except BaseException:
            _end(self._process)
            raise
        return self

    def __exit__(self, *_) -> None:
        self._socket.close()
        _end(self._process)

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str):
        """The JSON at `path`."""
        return self._request(self.url + path)

    def post(self, path: str, body: dict):
        """Post `body` as JSON; the JSON that comes back, or None."""
        headers = {"Content-Type": "application/json"}
        return self._request(urllib.request.Request(self.url + path, json.dumps(body).encode(), headers))

    def upload(self, picture: Path) -> str:
        """Put a picture into the input folder; its name there, for a Load Image node."""
        shutil.copy(picture, self.base / "input")
        return picture.name

    def queue(self, prompt: dict) -> str:
        """Queue a workflow; its prompt_id. Raises WorkflowError, naming every bad input, if it is refused."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self._client})["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise WorkflowError(_refusal(json.load(error))) from None

    def wait(self, prompt_id: str, timeout: float = 600, on_event: OnEvent | None = None) -> dict:
        """Follow the queue until a workflow has ended, well or not; its history entry.

        `on_event` gets every message ComfyUI sends meanwhile, as its type and data; a preview
        picture comes as "preview" and the bytes of the image file.
        Raises ServerError if ComfyUI dies, and TimeoutError after `timeout` seconds; that stops the workflow.
        """
        deadline, silences = time.monotonic() + timeout, 0
        while time.monotonic() < deadline:
            kind, data = self._next_event()
            silences = silences + 1 if kind == "silence" else 0
            if on_event and kind != "silence":
                on_event(kind, data)
            # The message that a workflow has ended may have been read while waiting for another one;
            # and a busy machine may be silent for a second between two messages.
            if silences >= 2 or (kind == "executing" and data["node"] is None):
                try:
                    entry = self.get(f"/history/{prompt_id}").get(prompt_id)
                except OSError:
                    raise self._hung_up() from None
                if entry:
                    return entry
        self.interrupt()
        raise TimeoutError(f"The workflow had not ended after {timeout:.0f} seconds. {self._last_words()}")

    def run(self, prompt: dict, timeout: float = 600, on_event: OnEvent | None = None) -> dict:
        """Queue a workflow and wait for it; its history entry. Raises WorkflowError if a node fails or is stopped."""
        entry = self.wait(self.queue(prompt), timeout, on_event)
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_error":
                raise WorkflowError(f"{_node(data)}: {data['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise WorkflowError(f"{_node(data)}: interrupted")
        return entry

    def interrupt(self) -> None:
        """Stop the running workflow at the next point where ComfyUI looks."""
        self.post("/interrupt", {})

    def kill(self) -> None:
        """End ComfyUI at once, as a power cut would."""
        self._process.kill()

    def images(self, entry: dict) -> list[Path]:
        """The picture files a history entry tells of."""
        shown = [image for output in entry["outputs"].values() for image in output.get("images", [])]
        return [self.base / image["type"] / image["subfolder"] / image["filename"] for image in shown]

    def _lay_out(self) -> None:
        for folder in [*FOLDERS, *(f"models/{name}" for name in MODEL_FOLDERS)]:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / "ComfyUI-ConsisLoRA"
        if os.path.lexists(link):
            link.unlink()
        _link(link, PACK)

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, str(self.comfyui / "main.py"), "--base-directory", str(self.base)]
        command += ["--port", str(self.port), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--use-pytorch-cross-attention", *self.options]
        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            command.append("--cpu")
        with self.log_file.open("wb") as log:
            environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
            return subprocess.Popen(command, cwd=self.comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def _wait_until_up(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended while starting. {self._last_words()}")
            with contextlib.suppress(urllib.error.URLError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} seconds. {self._last_words()}")

    def _connect(self) -> websocket.WebSocket:
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self._client}"
        # With a socket of our own it asks no proxy; its own setting for that is lost on the way (1.9.2).
        connection = websocket.create_connection(address, socket=socket.create_connection(("127.0.0.1", self.port)))
        connection.settimeout(1)
        return connection

    def _next_event(self) -> tuple[str, dict | bytes]:
        """The next message; "silence" when a second passes without one."""
        try:
            message = self._socket.recv()
        except websocket.WebSocketTimeoutException:
            return "silence", {}
        except (websocket.WebSocketConnectionClosedException, ConnectionError):
            raise self._hung_up() from None
        if isinstance(message, str):
            event = json.loads(message)
            return event["type"], event["data"]
        # A preview is two 32-bit numbers, kind of frame and kind of image, then an image file.
        kind = "preview" if int.from_bytes(message[:4], "big") == PREVIEW_FRAME else "binary"
        return kind, message[8:]

    def _request(self, request):
        with self._open(request, timeout=60) as response:
            body = response.read()
        return json.loads(body) if body else None

    def _hung_up(self) -> ServerError:
        return ServerError(f"ComfyUI hung up. {self._last_words()}")

    def _last_words(self) -> str:
        return "\n".join([f"The end of {self.log_file}:", *self.log.splitlines()[-30:]])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _link(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        # Windows keeps symbolic links for administrators and developers; a junction anyone may make.
        import _winapi

        _winapi.CreateJunction(str(target), str(link))


def _end(process: subprocess.Popen) -> None:
    """End a process and whatever it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        tree = [*root.children(recursive=True), root]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        _, stubborn = psutil.wait_procs(tree, timeout=10)
        for member in stubborn:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def _node(data: dict) -> str:
    return f"{data['node_type']} (node {data['node_id']})"


def _refusal(answer: dict) -> str:
    lines = [f"ComfyUI refused the workflow: {answer['error']['message']} {answer['error']['details']}".strip()]
    for node_id, report in answer["node_errors"].items():
        for error in report["errors"]:
            lines.append(f"{report['class_type']} (node {node_id}): {error['message']}: {error['details']}")
    return "\n".join(lines)
