"""The pictures that the demo's workflows name, into ComfyUI's input folder for who opens one."""

import asyncio
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from aiohttp import web

from ..consislora_core.files import escape_text, written_whole
from .paths import input_folder
from .progress import running_server

PICTURES = Path(__file__).resolve().parent.parent / "demo" / "images"


def add_route() -> None:
    """Adds what web/js/demo_pictures.js asks for to ComfyUI's server, if there is one."""
    if server := running_server():
        server.routes.post("/consislora/demo_pictures")(bring)


async def bring(request: web.Request) -> web.Response:
    """Takes the names that a workflow has, and answers with those of them that the input folder lacked and has now."""
    names = await request.json()
    try:
        return web.json_response(await asyncio.to_thread(copy_missing, names, input_folder()))
    except OSError as error:
        logging.warning("ConsisLoRA: the demo's pictures are not in %s: %s", escape_text(input_folder()), error)
        return web.json_response([])


def copy_missing(names: Iterable[str], folder: Path) -> list[str]:
    """Copies those of the demo's pictures into a folder in which no file has their name. Returns their names."""
    ours = {path.name: path for path in PICTURES.iterdir() if path.suffix != ".md"}
    missing = [name for name in sorted(ours.keys() & names) if not (folder / name).exists()]
    for name in missing:
        with written_whole(folder / name, new=True) as unfinished:
            shutil.copyfile(ours[name], unfinished)
    return missing
