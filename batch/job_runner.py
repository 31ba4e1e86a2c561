"""Makes the pictures of a job sheet at one ComfyUI."""

import errno
import io
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from batch.comfy_client import ComfyClient, Denied, Refused, failure_text
from batch.fill_workflow import INPUTS
from catalogue.api_form import Workflow
from catalogue.sheets import RESULTS, Result, read_results
from consislora_core.files import patiently

ATTEMPTS = 3  # a job during which the server breaks down as often is given up

SAVED = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".tif": "TIFF"}  # what Save Catalogue writes, for Pillow

Made = tuple[Result, bytes | None]  # an entry of the sheet, and the picture's file if there is one
Keep = Callable[[Result, bytes | None], None]  # gets every result as it comes
Show = Callable[[str], None]  # gets what is going on


class Order(NamedTuple):
    """A job as a server gets it.

    result: what is known of it before. folder: of its results on the server. pictures: files by their name on the
    server. loras: names of the LoRAs that are trained or loaded for it.
    """

    result: Result
    workflow: Workflow
    folder: str
    pictures: dict[str, Path]
    loras: frozenset[str]

    def read_pictures(self) -> dict[str, bytes]:
        return {name: patiently(path.read_bytes) for name, path in self.pictures.items()}


async def made_by(run: Callable[..., Awaitable[Made]], order: Order, *more: Callable) -> Made:
    """What `run` makes of an order and its pictures, or the order's failure if a picture is gone.

    Raises OSError if all are, and what `run` raises.
    """
    try:
        pictures = order.read_pictures()
    except (FileNotFoundError, PermissionError) as error:
        check_is_there(Path(error.filename).parent)
        return replace(order.result, error=f"{Path(error.filename).name} cannot be read: {error.strerror}."), None
    return await run(order, pictures, *more)


def check_is_there(folder: Path) -> None:
    """Raises OSError if a folder of pictures is away, or has no files, as where a share was: they are not lost."""
    if not any(path.is_file() for path in folder.iterdir()):
        raise FileNotFoundError(errno.ENOENT, "The folder has no files; perhaps its drive is away", str(folder))


class JobRunner:
    """Runs jobs at one server, one after another. report: takes messages for the user."""

    def __init__(self, client: ComfyClient, report: Callable[[str], None] = print):
        self.client, self.report = client, report
        self.get = client.get

    async def run_all(self, orders: Iterable[Order], keep: Keep, show: Show) -> None:
        """Runs all orders. Raises Unreachable and Denied, and OSError as `made_by` does."""
        for order in orders:
            name = order.result.name
            show(name)

            def on_event(kind: str, data: dict | bytes, name: str = name) -> None:
                if kind == "progress":
                    show(f"{name}, step {data['value']} of {data['max']}")

            keep(*await made_by(self.run, order, on_event))

    async def run(self, order: Order, pictures: dict[str, bytes], on_event: Callable = lambda kind, data: None) -> Made:
        """Runs one order; what the server refuses or a node fails at is in the result.

        Raises Unreachable and Denied.
        """
        started = time.monotonic()
        try:
            result, picture = await self._run(order, pictures, on_event)
        except Refused as error:
            result, picture = replace(order.result, error=str(error)), None
        except Denied as error:
            raise Denied(f"{order.result.name}: {error}") from None
        if result.seconds is None:  # the server counts neither transfers nor other people's jobs
            result = replace(result, seconds=round(time.monotonic() - started, 1))
        return result, picture

    async def results(self, folder: str) -> dict[str, Result]:
        """The results in a folder on the server, by name. Raises ValueError for a damaged sheet."""
        sheet = await self.client.file(RESULTS, folder)
        return read_results(RESULTS, sheet) if sheet else {}

    async def _run(self, order: Order, pictures: dict[str, bytes], on_event: Callable) -> Made:
        await self._upload(pictures)
        for _ in range(ATTEMPTS):
            entry = await self.client.run(order.workflow, on_event)
            error = failure_text(entry) if entry else ""
            was_lost = await self._upload(pictures) if error or not entry else False
            if entry and not error:
                return await self._fetch(order)
            if entry and not was_lost:
                return replace(order.result, error=error), None
            self.report(f"{order.result.name}: the server was restarted; the job is queued again.")
        return replace(order.result, error=given_up_text("server")), None

    async def _upload(self, pictures: dict[str, bytes]) -> bool:
        """Uploads those pictures that the server does not have, or not any more; whether there were any."""
        missing = [name for name, data in pictures.items() if not await self.client.has_upload(data, name, INPUTS)]
        for name in missing:
            await self.client.upload(pictures[name], name, INPUTS)
        return bool(missing)

    async def _fetch(self, order: Order) -> Made:
        """The picture and its entry, under the name that the sheet gave the job; `files` is its name on the server."""
        ours, data = order.result, None
        if sheet := await self.client.file(RESULTS, order.folder):
            theirs = read_results(RESULTS, sheet).get(ours.key, ours)
            suffix = PurePosixPath(theirs.files.partition(";")[0]).suffix
            data = await self.client.file(f"{ours.key}{suffix}", order.folder) if suffix in SAVED else None
        if data is None:
            return replace(ours, error="the workflow ended without a picture. Look into the server's log."), None
        try:
            with Image.open(io.BytesIO(data), formats=[SAVED[suffix]]) as picture:
                picture.verify()
        except (OSError, SyntaxError):  # the second from Pillow for a PNG
            return replace(ours, error="its picture came damaged. The same command fetches it again."), None
        files = f"{ours.key}{suffix}"
        return replace(theirs, name=ours.name, key=ours.key, content=ours.content, style=ours.style, files=files), data


def given_up_text(what: str) -> str:
    return f"the {what} broke down {ATTEMPTS} times during this job. Look into ComfyUI's log."
