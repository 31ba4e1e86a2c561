"""A real ComfyUI with this pack in it, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine
from pathlib import Path

import psutil
import torch

from batch.comfy_client import ComfyClient, OnEvent, Unreachable, WorkflowError, failure_text, free_port

PACK = Path(__file__).resolve().parent.parent
FOLDERS = ["custom_nodes", "input", "output", "temp", "user"]
MODEL_FOLDERS = ["checkpoints", "clip_vision", "loras", "text_encoders", "unet", "vae"]


class ServerError(RuntimeError):
    """ComfyUI did not start, or ended; the text has the end of its log."""


class ComfyServer:
    """Runs ComfyUI in `base` while the `with` block lasts.

        with ComfyServer(Path("somewhere"), Path("ComfyUI")) as server:
            entry = server.run(prompt)
            pictures = server.images(entry)

    `prompt` is a workflow in API form. Models and input pictures are read from `base`, pictures are written there.
    `options` are more of ComfyUI's own. Raises ServerError if ComfyUI does not start, and whenever it has ended.
    """

    def __init__(self, base: Path, comfyui: Path, *options: str):
        self.base = base.resolve()
        self.comfyui = comfyui
        self.options = options
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = self.base / "comfyui.log"

    def __enter__(self) -> ComfyServer:
        self._make_folders()
        self._process = self._start()
        # In a thread of its own, because the caller's may have a running loop already, such as Playwright's.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._client = self._result(ComfyClient(self.url, 0, lambda text: None).__aenter__())
            self._wait_until_up(timeout=300)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._result(self._client.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        _end(self._process)

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str):
        """The JSON at `path`."""
        return self._result(self._client.get(path))

    def post(self, path: str, body: dict):
        """Posts `body` as JSON; the JSON of the answer, or None."""
        return self._result(self._client.post(path, body))

    def upload(self, picture: Path) -> str:
        """Puts a picture into the input folder; its name there, for a Load Image node."""
        shutil.copy(picture, self.base / "input")
        return picture.name

    def queue(self, prompt: dict) -> str:
        """Queues a workflow; its prompt_id. Raises WorkflowError, naming every bad input, if it is refused."""
        return self._result(self._client.queue(prompt))

    def wait(self, prompt_id: str, timeout: float = 600, on_event: OnEvent = lambda kind, data: None) -> dict:
        """Waits until a workflow has ended, well or not; its history entry.

        on_event: gets messages as `ComfyClient.wait` describes. Raises TimeoutError after `timeout` seconds, and then
        cancels the workflow.
        """
        events: queue.SimpleQueue = queue.SimpleQueue()
        waiting = self._submit(self._client.wait(prompt_id, lambda *event: events.put(event)))
        waiting.add_done_callback(lambda _: events.put(None))
        deadline = time.monotonic() + timeout
        try:
            while event := events.get(timeout=max(0.0, deadline - time.monotonic())):
                on_event(*event)
        except queue.Empty:
            self.cancel()
            raise TimeoutError(f"The workflow had not ended after {timeout:.0f} seconds. {self._log_end()}") from None
        finally:
            waiting.cancel()  # which does nothing once it is done
        return self._checked(waiting)

    def run(self, prompt: dict, timeout: float = 600, on_event: OnEvent = lambda kind, data: None) -> dict:
        """Queues a workflow and waits for it; its history entry. Raises WorkflowError if a node fails or is stopped."""
        entry = self.wait(self.queue(prompt), timeout, on_event)
        if error := failure_text(entry):
            raise WorkflowError(error)
        return entry

    def cancel(self) -> None:
        """Cancels the running workflow."""
        self.post("/interrupt", {})

    def kill(self) -> None:
        """Ends ComfyUI at once, as a power cut would."""
        self._process.kill()

    def images(self, entry: dict) -> list[Path]:
        """The picture files in a history entry."""
        shown = [image for output in entry["outputs"].values() for image in output.get("images", [])]
        return [self.base / image["type"] / image["subfolder"] / image["filename"] for image in shown]

    def _submit(self, coroutine: Coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _result(self, coroutine: Coroutine):
        return self._checked(self._submit(coroutine))

    def _checked(self, future):
        try:
            return future.result()
        except Unreachable:
            raise ServerError(f"ComfyUI does not answer any more. {self._log_end()}") from None

    def _make_folders(self) -> None:
        for folder in [*FOLDERS, *(f"models/{name}" for name in MODEL_FOLDERS)]:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link = self.base / "custom_nodes" / "ComfyUI-ConsisLoRA"
        if os.path.lexists(link):
            link.unlink()
        link_folder(link, PACK)

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
                raise ServerError(f"ComfyUI ended while starting. {self._log_end()}")
            with contextlib.suppress(ServerError):
                self.get("/system_stats")
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} seconds. {self._log_end()}")

    def _log_end(self) -> str:
        return "\n".join([f"The end of {self.log_file}:", *self.log.splitlines()[-30:]])


def link_folder(link: Path, target: Path) -> None:
    """Makes `link` a link to a folder."""
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        # Windows keeps symbolic links for administrators and developers; anyone can make a junction.
        import _winapi

        _winapi.CreateJunction(str(target), str(link))


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started."""
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
