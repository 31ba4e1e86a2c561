"""The demo's main job."""

import contextlib
import time
from pathlib import Path

from demo.server import ComfyServer


def main(comfyui: Path, output: Path, serve: bool) -> None:
    """Start ComfyUI with the pack; with `serve`, keep it up until Ctrl-C."""
    with ComfyServer(output / "comfyui", comfyui) as server:
        print(f"ComfyUI runs at {server.url}")
        if serve:
            print("Press Ctrl-C to stop it.")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
