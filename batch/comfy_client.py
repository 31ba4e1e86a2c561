"""A client of ComfyUI's HTTP and websocket interface; the server may be restarted at any time."""

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections.abc import Callable

import aiohttp

LIMIT = 500_000_000  # bytes of an answer
BUSY = (429, 502, 503, 504)
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0  # seconds between two tries
LISTENING = 5.0  # seconds without the message that a workflow has ended, after which queue and history are read
PREVIEW_FRAME = 1  # BinaryEventTypes.PREVIEW_IMAGE in ComfyUI's protocol.py

OnEvent = Callable[[str, "dict | bytes"], None]


class Unreachable(RuntimeError):
    """The server did not answer within the client's patience."""


class Refused(RuntimeError):
    """The server answered, and refused the request; the text says why."""


class WorkflowError(Refused):
    """The server refused a workflow, or a node in it failed; the text names the node."""


class ComfyClient:
    """Use as an async context. patience: seconds to wait for a server that does not answer. report: takes messages."""

    def __init__(self, url: str, patience: float = 0, report: Callable[[str], None] = print):
        self.url, self.patience, self.report = url.rstrip("/"), patience, report
        self.client_id = uuid.uuid4().hex
        self.socket: aiohttp.ClientWebSocketResponse | None = None

    async def __aenter__(self) -> "ComfyClient":
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(sock_connect=10, sock_read=120))
        return self

    async def __aexit__(self, *_) -> None:
        if self.socket:
            await self.socket.close()
        await self.session.close()

    async def call(
        self, method: str, path: str, body: Callable[[], object] = lambda: None, **query: str
    ) -> bytes | None:
        """The body of the server's answer; None for status 404.

        body: makes the request's body, anew for each try. Raises Refused, and Unreachable when patience ends.
        """
        deadline, delay = time.monotonic() + self.patience, FIRST_DELAY
        while True:
            try:
                async with self.session.request(
                    method, self.url + path, params=query, data=body(), allow_redirects=False
                ) as response:
                    answer = await self._bounded(response)
                    if response.status == 404:
                        return None
                    if response.status < 300:
                        return answer
                    trouble = f"{response.status} {response.reason}"
                    if response.status not in BUSY:
                        raise Refused(refusal_text(trouble, answer))
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError):
                trouble = "no answer"
            if time.monotonic() + delay > deadline:
                raise Unreachable(f"{self.url} cannot be reached ({trouble}).")
            self.report(f"{self.url} cannot be reached ({trouble}); trying again in {delay:.0f} s.")
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)

    async def _bounded(self, response: aiohttp.ClientResponse) -> bytes:
        answer = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            answer += chunk
            if len(answer) > LIMIT:
                raise Refused(f"the server's answer is larger than {LIMIT // 10**6} MB")
        return bytes(answer)

    async def get(self, path: str, **query: str):
        """The JSON at a path; None for status 404. Raises as `call` does."""
        return self._parsed(await self.call("GET", path, **query))

    async def post(self, path: str, body: dict):
        """Posts JSON; the JSON of the answer, or None. Raises as `call` does."""
        return self._parsed(await self.call("POST", path, lambda: json.dumps(body)))

    def _parsed(self, answer: bytes | None):
        try:
            return json.loads(answer) if answer else None
        except ValueError:
            raise Refused(
                f"{self.url} answers, but not as ComfyUI does. Name ComfyUI's address with --server."
            ) from None

    async def upload(self, data: bytes, name: str, folder: str) -> None:
        """Puts a picture into a folder inside the server's input folder."""

        def form() -> aiohttp.FormData:
            fields = aiohttp.FormData({"subfolder": folder, "overwrite": "true"})
            fields.add_field("image", data, filename=name, content_type="application/octet-stream")
            return fields

        await self.call("POST", "/upload/image", form)

    async def file(self, name: str, folder: str) -> bytes | None:
        """A file in a folder inside the server's output folder; None if there is none."""
        return await self.call("GET", "/view", filename=name, subfolder=folder, type="output")

    async def run(self, prompt: dict, on_event: OnEvent = lambda kind, data: None) -> dict | None:
        """Queues a workflow in API form and waits for it: `queue`, then `wait`."""
        return await self.wait(await self.queue(prompt), on_event)

    async def queue(self, prompt: dict) -> str:
        """Queues a workflow in API form; its prompt_id. Raises WorkflowError that names every bad input."""
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
            await self._connect()  # before the workflow starts, so that its first messages arrive
        body = {"prompt": prompt, "client_id": self.client_id, "prompt_id": str(uuid.uuid4())}
        try:
            return (await self.post("/prompt", body))["prompt_id"]
        except Refused as error:
            raise WorkflowError(str(error)) from None

    async def wait(self, prompt_id: str, on_event: OnEvent = lambda kind, data: None) -> dict | None:
        """The history entry of a workflow once it has ended, well or not; None if the server lost it, as by a restart.

        on_event: gets the type and data of every message that ComfyUI sends meanwhile; a preview picture as "preview"
        and the bytes of the image file. Raises Unreachable.
        """
        while True:
            held = await self._holds(prompt_id)
            entry = (await self.get(f"/history/{uuid.UUID(prompt_id)}")).get(prompt_id)
            if entry or not held:  # in this order: a workflow that ends between the two requests is in the history
                return entry
            await self._listen(prompt_id, on_event)

    async def _holds(self, prompt_id: str) -> bool:
        queue = await self.get("/queue")
        return any(item[1] == prompt_id for item in [*queue["queue_running"], *queue["queue_pending"]])

    async def _connect(self) -> None:
        if self.socket is None or self.socket.closed:
            address = f"{self.url}/ws".replace("http", "ws", 1)
            self.socket = await self.session.ws_connect(address, params={"clientId": self.client_id})

    async def _listen(self, prompt_id: str, on_event: OnEvent) -> None:
        """Passes messages on until one says that the workflow has ended, for `LISTENING` seconds at most."""
        deadline = time.monotonic() + LISTENING
        try:
            await self._connect()
            while (left := deadline - time.monotonic()) > 0:
                message = await self.socket.receive(timeout=left)
                if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                    await asyncio.sleep(FIRST_DELAY)
                    return
                kind, data = _event(message.data)
                on_event(kind, data)
                if kind == "executing" and data["node"] is None and data.get("prompt_id") == prompt_id:
                    return
        except asyncio.TimeoutError:
            return
        except aiohttp.ClientError:
            await asyncio.sleep(FIRST_DELAY)


def _event(message: str | bytes) -> tuple[str, dict | bytes]:
    """The type and data of a websocket message."""
    if isinstance(message, str):
        event = json.loads(message)
        return event["type"], event["data"]
    # A preview is two 32-bit numbers, kind of frame and kind of image, then an image file.
    return "preview" if int.from_bytes(message[:4], "big") == PREVIEW_FRAME else "binary", message[8:]


def refusal_text(status: str, answer: bytes) -> str:
    """Why the server refused a workflow, node by node where its answer says so."""
    try:
        refusal = json.loads(answer)
        lines = [f"{refusal['error']['message']} {refusal['error']['details']}".strip()]
        for node_id, report in refusal["node_errors"].items():
            node = f"{report['class_type']} (node {node_id})"
            lines += [f"{node}: {error['message']}: {error['details']}" for error in report["errors"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"the server answered {status}"
    return "; ".join(lines)


def failure_text(entry: dict) -> str:
    """Why a workflow that has ended failed, by its history entry; empty if it did not."""
    for kind, data in entry["status"]["messages"]:
        if kind in ("execution_error", "execution_interrupted"):
            problem = data["exception_message"].strip() if kind == "execution_error" else "it was cancelled"
            return f"{data['node_type']} (node {data['node_id']}): {problem}"
    return ""


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
