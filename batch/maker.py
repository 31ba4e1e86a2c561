"""Makes the pictures of a job sheet at one ComfyUI."""

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from batch.server import Refused, Server, failure
from batch.workflow import INPUTS, Workflow
from consislora_core import catalog
from consislora_core.catalog import Result

ATTEMPTS = 3  # a job at which the server breaks down as often is left

Made = tuple[Result, bytes | None]  # a row of the sheet, and the PNG if there is one


class Order(NamedTuple):
    """A job as a server gets it.

    result: what is known of it before. folder: of its results on the server. pictures: files by the name that they
    have there. adapters: names of what is trained or loaded for it.
    """

    result: Result
    prompt: Workflow
    folder: str
    pictures: dict[str, Path]
    adapters: frozenset[str]

    def read(self) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self.pictures.items()}


class Maker:
    """tell: takes messages for the user."""

    def __init__(self, server: Server, tell: Callable[[str], None] = print):
        self.server, self.tell = server, tell
        self.get = server.get
        self.uploaded: set[str] = set()

    async def make_all(
        self, orders: Iterable[Order], keep: Callable[[Result, bytes | None], None], show: Callable[[str], None]
    ) -> None:
        """keep: is handed every result as it comes. show: takes what is going on. Raises Unreachable."""
        for order in orders:
            name = order.result.name
            show(name)

            def progress(step: int, steps: int, name: str = name) -> None:
                show(f"{name}, step {step} of {steps}")

            keep(*await self.make(order, order.read(), progress))

    async def make(
        self, order: Order, pictures: dict[str, bytes], progress: Callable[[int, int], None] = lambda step, steps: None
    ) -> Made:
        """Raises Unreachable."""
        started = time.monotonic()
        try:
            result, picture = await self._make(order, pictures, progress)
        except Refused as error:
            result, picture = replace(order.result, error=str(error)), None
        return replace(result, seconds=round(time.monotonic() - started, 1)), picture

    async def _make(self, order: Order, pictures: dict[str, bytes], progress: Callable[[int, int], None]) -> Made:
        for name in pictures.keys() - self.uploaded:
            await self.server.upload(pictures[name], name, INPUTS)
            self.uploaded.add(name)
        for _ in range(ATTEMPTS):
            entry = await self.server.run(order.prompt, progress)
            if entry:
                error = failure(entry)
                return (replace(order.result, error=error), None) if error else await self._fetch(order)
            self.tell(f"{order.result.name}: the server was restarted; the job is queued again.")
        return replace(order.result, error=broke_down("server")), None

    async def _fetch(self, order: Order) -> Made:
        """The picture and its row, under the name that we gave the job."""
        ours = order.result
        data = await self.server.file(f"{ours.key}.png", order.folder)
        sheet = await self.server.file(catalog.RESULTS, order.folder)
        if data is None or sheet is None:
            return replace(ours, error="the workflow ended without a picture. Look into the server's log."), None
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()
        row = catalog.read_results(catalog.RESULTS, sheet).get(ours.key, ours)
        return replace(row, name=ours.name, key=ours.key, content=ours.content, style=ours.style, files=""), data


def broke_down(what: str) -> str:
    return f"the {what} broke down at it {ATTEMPTS} times. Look into ComfyUI's log."
