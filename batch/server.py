"""A ComfyUI over HTTP, which may be restarted at any time."""

import asyncio
import json
import time
import uuid
from collections.abc import Callable

import aiohttp

LIMIT = 500_000_000  # bytes of an answer
BUSY = (429, 502, 503, 504)
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0  # seconds between two tries
LISTENING = 5.0  # seconds, after which the server is asked even if it tells nothing


class Unreachable(RuntimeError):
    """The server did not answer for as long as anyone was willing to wait."""


class Refused(RuntimeError):
    """The server answered, and will not do it."""


class Server:
    """Use as a context. patience: seconds in which a server that does not answer may come back."""

    def __init__(self, url: str, patience: float, tell: Callable[[str], None] = print):
        self.url, self.patience, self.tell = url.rstrip("/"), patience, tell
        self.client = uuid.uuid4().hex
        self.socket: aiohttp.ClientWebSocketResponse | None = None

    async def __aenter__(self) -> "Server":
        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(sock_connect=10, sock_read=120))
        return self

    async def __aexit__(self, *_) -> None:
        if self.socket:
            await self.socket.close()
        await self.session.close()

    async def call(
        self, method: str, path: str, body: Callable[[], object] = lambda: None, **query: str
    ) -> bytes | None:
        """What the server answers; None where there is nothing (404).

        body: makes what is sent, anew for each try. Raises Refused, and Unreachable once patience ends.
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
                        raise Refused(refusal(trouble, answer))
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError):
                trouble = "no answer"
            if time.monotonic() + delay > deadline:
                raise Unreachable(f"{self.url} cannot be reached ({trouble}).")
            self.tell(f"{self.url} cannot be reached ({trouble}); trying again in {delay:.0f} s.")
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
        """JSON; None where there is nothing."""
        answer = await self.call("GET", path, **query)
        try:
            return None if answer is None else json.loads(answer)
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
        """A file in a folder inside the server's output folder."""
        return await self.call("GET", "/view", filename=name, subfolder=folder, type="output")

    async def run(self, prompt: dict, progress: Callable[[int, int], None]) -> dict | None:
        """The history entry of a workflow once it has ended; None if the server lost it, as by a restart.

        progress: is told step and steps of the node at work.
        """
        prompt_id = str(uuid.uuid4())
        body = json.dumps({"prompt": prompt, "client_id": self.client, "prompt_id": prompt_id})
        queued = json.loads(await self.call("POST", "/prompt", lambda: body))
        prompt_id = queued["prompt_id"]
        while True:
            held = await self._holds(prompt_id)
            entry = (await self.get(f"/history/{uuid.UUID(prompt_id)}")).get(prompt_id)
            if entry or not held:  # in this order: what ends between the two questions is in the history
                return entry
            await self._listen(prompt_id, progress)

    async def _holds(self, prompt_id: str) -> bool:
        queue = await self.get("/queue")
        return any(item[1] == prompt_id for item in [*queue["queue_running"], *queue["queue_pending"]])

    async def _listen(self, prompt_id: str, progress: Callable[[int, int], None]) -> None:
        """Passes progress on for a while, or until the workflow has ended. That it ended, others find out."""
        deadline = time.monotonic() + LISTENING
        try:
            if self.socket is None or self.socket.closed:
                address = f"{self.url}/ws".replace("http", "ws", 1)
                self.socket = await self.session.ws_connect(address, params={"clientId": self.client})
            while (left := deadline - time.monotonic()) > 0:
                message = await self.socket.receive(timeout=left)
                if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                    await asyncio.sleep(FIRST_DELAY)
                    return
                event = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
                data = event.get("data", {})
                if event.get("type") == "progress":
                    progress(data["value"], data["max"])
                if event.get("type") == "executing" and data["node"] is None and data.get("prompt_id") == prompt_id:
                    return
        except asyncio.TimeoutError:
            return
        except aiohttp.ClientError:
            await asyncio.sleep(FIRST_DELAY)


def refusal(trouble: str, answer: bytes) -> str:
    """Why the server refused a workflow, node by node where it says so."""
    try:
        told = json.loads(answer)
        lines = [f"{told['error']['message']} {told['error']['details']}".strip()]
        for report in told["node_errors"].values():
            lines += [f"{report['class_type']}: {error['message']}: {error['details']}" for error in report["errors"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"the server answered {trouble}"
    return "; ".join(lines)


def failure(entry: dict) -> str:
    """Why a workflow that has ended failed, by its history entry; empty if it did not."""
    for kind, data in entry["status"]["messages"]:
        if kind == "execution_error":
            return f"{data['node_type']}: {data['exception_message'].strip()}"
        if kind == "execution_interrupted":
            return "it was cancelled on the server"
    return ""
