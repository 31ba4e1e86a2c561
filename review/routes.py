"""The review page: its files, and what it reads and writes, as routes of ComfyUI's server."""

import asyncio
import hashlib
import io
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from ..catalogue import handover, retry, review
from ..catalogue.pictures import open_cut_out
from ..catalogue.summary import summarise
from ..consislora_core.files import escape_text
from ..host.paths import input_folder, output_folder
from ..host.progress import running_server

PAGE = Path(__file__).resolve().parent / "page"
ROOT = "/consislora/review"
SIZES = (192, 1600)  # pixels of the longer side in which pictures are sent, besides their own
SHOWN_BY_BROWSERS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif"}
LONGEST_BODY = 10_000  # bytes
PATIENCE = 20.0  # seconds for which a decision waits for other programs that write the sheet
# A picture is only that, whatever its bytes are; and no other site may show the page inside its own.
SAFE = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "SAMEORIGIN", "Cache-Control": "no-cache"}
POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Busy(Exception):
    """Another program holds the sheet."""


class Refused(Exception):
    """A status and a text for people."""


def add_routes() -> None:
    """Adds the review page to ComfyUI's server, if there is one."""
    if server := running_server():
        routes = server.routes
        routes.get(ROOT)(show_page)
        routes.static(f"{ROOT}/page", PAGE)
        routes.get(f"{ROOT}/catalogues")(answered(send_catalogues))
        routes.get(f"{ROOT}/results")(answered(send_results))
        routes.get(f"{ROOT}/summary")(answered(send_summary))
        routes.get(f"{ROOT}/picture")(answered(send_picture))
        routes.get(f"{ROOT}/retry")(answered(send_retry))
        routes.post(f"{ROOT}/decision")(answered(take_decision))
        routes.post(f"{ROOT}/accepted")(answered(copy_accepted))


def answered(handler: Handler) -> Handler:
    """The handler, with errors as JSON: `error` is for people."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except (ValueError, RecursionError) as error:  # the second for JSON that is nested deep
            return refusal(400, str(error))
        except review.Changed:
            return refusal(409, "It has changed meanwhile. Look at it again.")
        except Refused as refused:
            return refusal(*refused.args)
        except Busy:
            return refusal(503, "Another program writes results.csv. Try again.")
        except OSError as error:
            advice = "Free some space, or close the catalogue's sheets in other programs."
            return refusal(500, f"{error.strerror or error}. {advice}")

    return answer


def refusal(status: int, text: str) -> web.Response:
    return web.json_response({"error": escape_text(text)}, status=status, headers=SAFE)


async def show_page(request: web.Request) -> web.StreamResponse:
    return web.FileResponse(PAGE / "page.html", headers={**SAFE, "Content-Security-Policy": POLICY})


async def send_catalogues(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(review.find_catalogues, output_folder()), headers=SAFE)


async def send_results(request: web.Request) -> web.Response:
    """The results of a catalogue and its summary; 304 if the page has them already."""

    def read() -> bytes:
        sheet = review.open_catalogue(output_folder(), request.query.get("catalogue", ""))
        results = review.read_results(sheet).values()
        changed = review.changed_results(sheet.path.parent, results)
        summary = summarise(results, changed)
        return json.dumps({"results": review.describe_results(sheet, changed), "summary": summary}).encode()

    body = await asyncio.to_thread(read)
    return unless_known(request, hashlib.sha256(body).hexdigest(), body, "application/json")


async def send_summary(request: web.Request) -> web.Response:
    def read() -> dict:
        sheet = review.open_catalogue(output_folder(), request.query.get("catalogue", ""))
        results = review.read_results(sheet).values()
        return summarise(results, review.changed_results(sheet.path.parent, results))

    return web.json_response(await asyncio.to_thread(read), headers=SAFE)


async def send_picture(request: web.Request) -> web.StreamResponse:
    """A picture of a result, or its content or style image; `size` is one of SIZES or 0 for its own."""
    query = request.query
    path = await asyncio.to_thread(picture_path, query)
    size = whole_number(query.get("size", "0"))
    if size == 0 and path.suffix.lower() in SHOWN_BY_BROWSERS:
        return web.FileResponse(path, headers=SAFE)
    if size not in (0, *SIZES):
        raise ValueError(f"There are pictures of the sizes {SIZES}.")
    state = path.stat()
    tag = f"{state.st_mtime_ns:x}-{state.st_size:x}-{size}"
    if is_known(request, tag):
        return unless_known(request, tag, b"", "")
    return unless_known(request, tag, *await asyncio.to_thread(as_shown, path, size))


def picture_path(query: Mapping[str, str]) -> Path:
    """The file that a page asks for, by names in a sheet alone. Raises ValueError if it may not have it."""
    sheet = review.open_catalogue(output_folder(), query.get("catalogue", ""))
    result = review.find_result(sheet, query.get("name", ""))
    files = review.picture_files(sheet.path.parent, result.files)
    of = query.get("of", "result")
    if of == "result":
        return files[whole_number(query.get("number", "0")) % len(files)]
    content, style = retry.sources_of(input_folder(), files[0], result)
    path = {"content": content, "style": style}.get(of)
    if path is None:
        raise ValueError("The picture is not in the input folder any more.")
    return path


def whole_number(text: str) -> int:
    """Raises ValueError for what is none."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError("A whole number was expected.")
    return int(text)


def as_shown(path: Path, size: int) -> tuple[bytes, str]:
    """A picture at a longer side of `size` pixels at most, if that is not 0, and its type; a cut-out stays one.

    Raises ValueError if it does not open.
    """
    opened, file = open_cut_out(path), io.BytesIO()
    if size:
        opened.thumbnail((size, size))
    kind = "JPEG" if opened.mode == "RGB" else "PNG"
    opened.save(file, kind, quality=92, subsampling=0, compress_level=1)  # this one for PNG
    return file.getvalue(), f"image/{kind.lower()}"


def is_known(request: web.Request, tag: str) -> bool:
    return f'"{tag}"' in request.headers.get("If-None-Match", "")


def unless_known(request: web.Request, tag: str, body: bytes, kind: str) -> web.Response:
    headers = {**SAFE, "ETag": f'"{tag}"'}
    if is_known(request, tag):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type=kind, headers=headers)


async def send_retry(request: web.Request) -> web.Response:
    """What the page posts to /prompt to have a result made again."""

    def read() -> dict:
        name = request.query.get("catalogue", "")
        sheet = review.open_catalogue(output_folder(), name)
        result = review.find_result(sheet, request.query.get("name", ""))
        (first, *_) = review.picture_files(sheet.path.parent, result.files)
        return retry.retry_workflow(input_folder(), name, first, result)

    return web.json_response(await asyncio.to_thread(read), headers=SAFE)


async def take_decision(request: web.Request) -> web.Response:
    """Writes a decision: JSON with catalogue, name, version, decision, reason and by."""
    posted = await posted_texts(request, ("catalogue", "name", "version", "decision", "reason", "by"))
    verdict = review.Verdict(posted["decision"], posted["reason"], posted["by"])

    def write() -> str:
        sheet = review.open_catalogue(output_folder(), posted["catalogue"])
        return review.decide(sheet, posted["name"], posted["version"], verdict, busy_after(PATIENCE))

    return web.json_response({"version": await asyncio.to_thread(write)}, headers=SAFE)


async def copy_accepted(request: web.Request) -> web.Response:
    """Copies what is accepted into a folder of its own: JSON with catalogue."""
    posted = await posted_texts(request, ("catalogue",))

    def copy() -> dict:
        sheet = review.open_catalogue(output_folder(), posted["catalogue"])
        return handover.copy_accepted(sheet, busy_after(PATIENCE))._asdict()

    return web.json_response(await asyncio.to_thread(copy), headers=SAFE)


def busy_after(seconds: float) -> Callable[[], None]:
    """Raises Busy when it is called later than that."""
    deadline = time.monotonic() + seconds

    def waiting() -> None:
        if time.monotonic() > deadline:
            raise Busy

    return waiting


async def posted_texts(request: web.Request, names: Sequence[str]) -> Mapping[str, str]:
    """The texts of these names in JSON that the page posts.

    Raises Refused for what another site posts or is too long, and ValueError for what is no such JSON.
    """
    if is_foreign(request.headers):
        raise Refused(403, "Only the review page of this server may do that. A proxy has to pass on the header Host.")
    body = await bounded_body(request)
    if body is None:
        raise Refused(413, "That is too long. Say it shorter.")
    posted = json.loads(body) if request.content_type == "application/json" else None
    if not isinstance(posted, dict) or not all(isinstance(posted.get(name), str) for name in names):
        raise ValueError(f"JSON with the texts {', '.join(names)} was expected.")
    return posted


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether another site's page sends this. ComfyUI's own check is off with --enable-cors-header, and elsewhere only
    for servers on the browser's machine."""
    if site := headers.get("Sec-Fetch-Site"):
        return site != "same-origin"
    origin = headers.get("Origin")  # browsers leave the other out where a server has no certificate
    return origin is not None and urlsplit(origin).netloc.lower() != headers.get("Host", "").lower()


async def bounded_body(request: web.Request) -> bytes | None:
    """The body, or None if it is longer than a decision can be."""
    body = bytearray()
    async for chunk in request.content.iter_chunked(LONGEST_BODY):
        body += chunk
        if len(body) > LONGEST_BODY:
            return None
    return bytes(body)
