"""A client of ComfyUI's HTTP and websocket interface; the server may be restarted at any time."""

import asyncio
import contextlib
import html
import json
import re
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import aiohttp

from batch.comfy_answers import as_json, is_comfyuis, read_event

LIMIT = 500_000_000  # bytes of an answer
HEADER = "CONSISLORA_HEADER"  # in the environment
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0  # seconds between two tries
CONNECTING = 10.0  # seconds
LISTENING = 5.0  # seconds without the message that a workflow has ended, after which queue and history are read
REDIRECTS = (301, 302, 303, 307, 308)

OnEvent = Callable[[str, "dict | bytes"], None]


class Unreachable(RuntimeError):
    """The server did not answer within the client's patience."""


class Refused(RuntimeError):
    """The server answered, and refused the request; the text says why."""


class Denied(RuntimeError):
    """The server will refuse every request, or cannot be trusted; the text says what to do."""


class WorkflowError(Refused):
    """The server refused a workflow, or a node in it failed; the text names the node."""


class ComfyClient:
    """Use as an async context.

    url: with a query string, it is sent with every request. patience: seconds to wait for a server that does not
    answer. report: takes messages, which name neither headers nor the query. headers: sent with every request.
    """

    def __init__(
        self,
        url: str,
        patience: float = 0,
        report: Callable[[str], None] = print,
        headers: dict[str, str] | None = None,
    ):
        parts = urlsplit(url)
        self.url = parts._replace(path=parts.path.rstrip("/"), query="", fragment="").geturl()
        self.name = urlsplit(self.url)._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # without a password
        self.query = parse_qsl(parts.query, keep_blank_values=True)
        self.patience, self.report, self.headers = patience, report, headers or {}
        self.client_id = uuid.uuid4().hex
        self.socket: aiohttp.ClientWebSocketResponse | None = None

    async def __aenter__(self) -> "ComfyClient":
        timeout = aiohttp.ClientTimeout(sock_connect=CONNECTING, sock_read=120)
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_stay)
        self.session = aiohttp.ClientSession(timeout=timeout, headers=self.headers, trace_configs=[trace])
        return self

    async def __aexit__(self, *_) -> None:
        if self.socket:
            await self.socket.close()
        await self.session.close()

    async def call(
        self,
        method: str,
        path: str,
        body: Callable[[], object] = lambda: None,
        lacking: bool = False,
        is_done: Callable[[], Awaitable] | None = None,
        headers: dict[str, str] | None = None,
        **query: str,
    ):
        """What ComfyUI answers: JSON, or the bytes of a file. Tries again until patience ends.

        body: makes the request's body, anew for each try. lacking: return None if ComfyUI answers that it has no such
        file; otherwise that is a proxy's word. is_done: asked before another try; if so, return None.
        Raises Refused, Denied, and Unreachable when patience ends.
        """
        deadline, delay, is_sure = time.monotonic() + self.patience, FIRST_DELAY, False
        while True:
            try:
                response, said = await self._ask(method, path, body(), headers, query)
                if is_comfyuis(path, response, said):
                    if response.status < 300:
                        return said
                    raise Refused(refusal_text(f"{response.status} {response.reason}", said))
                self._check_admitted(response)
                if lacking and (response.status == 404 or response.status == 400 and not said):  # 400: a name with ..
                    if is_sure:
                        return None
                    is_sure = is_comfyuis("/queue", *await self._ask("GET", "/queue"))
                    if is_sure:  # that ComfyUI answers; whether that word was its own, the next one tells
                        continue
                trouble = f"answers, but not as ComfyUI does ({self._quoted(response, said)})"
                if path == "/upload/image" and response.status == 500:  # ComfyUI's own word too, which gives no reason
                    trouble = f"took no picture; its disk may be full ({self._quoted(response, said)})"
            except aiohttp.ClientConnectorCertificateError as error:
                reason = error.certificate_error.verify_message
                raise Denied(
                    f"The certificate of {self.name} is not valid: {reason}. Correct the address after --server, "
                    "or the server's certificate."
                ) from None
            except aiohttp.InvalidURL:
                raise
            except (aiohttp.ClientError, asyncio.TimeoutError):
                trouble = "cannot be reached"
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unreachable(f"{self.name} {trouble}.")
            pause = min(delay, left)
            self.report(f"{self.name} {trouble}; trying again in {pause:.0f} s.")
            await asyncio.sleep(pause)
            delay, is_sure = min(2 * delay, LONGEST_DELAY), False
            if is_done and await is_done():
                return None

    async def _ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
    ) -> tuple[aiohttp.ClientResponse, Any]:
        """An answer and what it says: JSON if it is that, otherwise bytes; None if it is empty."""
        params = [*self.query, *(query or {}).items()]
        async with self.session.request(
            method, self.url + path, params=params, data=body, headers=headers, allow_redirects=False
        ) as response:
            answer = await self._bounded(response)
        return response, answer if path == "/view" else as_json(answer, answer or None)

    def _quoted(self, response: aiohttp.ClientResponse, said: object) -> str:
        """The status of an answer and its first words, unless it repeats what we send in confidence."""
        status, sent = f"{response.status} {response.reason}", response.request_info.headers
        confidence = [sent.get(name, "") for name in ("Authorization", *self.headers)] + [v for _, v in self.query]
        page = said.decode(errors="replace") if isinstance(said, bytes) else json.dumps(said, ensure_ascii=False)
        page = html.unescape(page)
        if not said or any(secret in page for secret in re.findall(r"\w+", " ".join(confidence))):
            return status
        words = " ".join(re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", page[:4000]).split())
        return f"{status}: {words[:100]!r}" if words else status

    def _check_admitted(self, response: aiohttp.ClientResponse) -> None:
        """Raises Denied if what answers will let no request through."""
        status = f"{response.status} {response.reason}"
        if response.status in (401, 403, 407):
            raise Denied(
                f"{self.name} wants a key or a password ({status}). Set {HEADER} in the environment, such as "
                "'Authorization: Bearer ...', or ask who runs the server."
            )
        if response.status == 413:
            raise Denied(
                f"{self.name} takes no picture as large as this ({status}). Save it smaller, or raise the limit of the "
                "proxy before ComfyUI, or ComfyUI's own (--max-upload-size)."
            )
        if response.status in REDIRECTS:
            raise Denied(
                f"{self.name} sends elsewhere ({status}), perhaps to sign in. Name the address where ComfyUI itself "
                f"answers with --server, or set {HEADER} in the environment."
            )

    async def _bounded(self, response: aiohttp.ClientResponse) -> bytes:
        answer = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            answer += chunk
            if len(answer) > LIMIT:
                raise Refused(f"the server's answer is larger than {LIMIT // 10**6} MB")
        return bytes(answer)

    async def get(self, path: str, lacking: bool = False, **query: str):
        """The JSON at a path. Raises as `call` does; lacking: see there."""
        return await self.call("GET", path, lacking=lacking, **query)

    async def post(self, path: str, body: dict, is_done: Callable[[], Awaitable] | None = None):
        """Posts JSON; the JSON of the answer, or None. Raises as `call` does; is_done: see there."""
        return await self.call("POST", path, lambda: json.dumps(body), is_done=is_done)

    async def has_upload(self, data: bytes, name: str, folder: str) -> bool:
        """Whether a folder inside the server's input folder has this file, by its name, size and last byte."""
        ranged = {"Range": f"bytes={len(data) - 1}-"}
        try:
            end = await self.call(
                "GET", "/view", lacking=True, headers=ranged, filename=name, subfolder=folder, type="input"
            )
        except Refused:  # it is shorter
            return False
        return bool(end) and data.endswith(end)

    async def upload(self, data: bytes, name: str, folder: str) -> None:
        """Puts a picture into a folder inside the server's input folder."""

        def form() -> aiohttp.FormData:
            fields = aiohttp.FormData({"subfolder": folder, "overwrite": "true"})
            fields.add_field("image", data, filename=name, content_type="application/octet-stream")
            return fields

        await self.call("POST", "/upload/image", form)

    async def file(self, name: str, folder: str) -> bytes | None:
        """A file in a folder inside the server's output folder; None if there is none."""
        return await self.call("GET", "/view", lacking=True, filename=name, subfolder=folder, type="output")

    async def run(self, prompt: dict, on_event: OnEvent = lambda kind, data: None) -> dict | None:
        """Queues a workflow in API form and waits for it: `queue`, then `wait`."""
        return await self.wait(await self.queue(prompt), on_event)

    async def queue(self, prompt: dict) -> str:
        """Queues a workflow in API form; its prompt_id. Raises WorkflowError that names every bad input."""
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
            await self._connect()  # before the workflow starts, so that its first messages arrive
        prompt_id = str(uuid.uuid4())
        body = {"prompt": prompt, "client_id": self.client_id, "prompt_id": prompt_id}
        try:
            # Of an answer that a proxy has lost the server may have queued the workflow.
            answer = await self.post("/prompt", body, lambda: self._knows(prompt_id))
        except Refused as error:
            raise WorkflowError(str(error)) from None
        return answer["prompt_id"] if answer else prompt_id

    async def wait(self, prompt_id: str, on_event: OnEvent = lambda kind, data: None) -> dict | None:
        """The history entry of a workflow once it has ended, well or not; None if the server lost it, as by a restart.

        on_event: gets the type and data of every message that ComfyUI sends meanwhile; a preview picture as "preview"
        and the bytes of the image file. Raises Unreachable.
        """
        while True:
            held = await self._holds(prompt_id)
            entry = await self._entry(prompt_id)
            if entry or not held:  # in this order: a workflow that ends between the two requests is in the history
                return entry
            await self._listen(prompt_id, on_event)

    async def _holds(self, prompt_id: str) -> bool:
        queue = await self.get("/queue")
        return any(item[1] == prompt_id for item in [*queue["queue_running"], *queue["queue_pending"]])

    async def _entry(self, prompt_id: str) -> dict | None:
        return (await self.get(f"/history/{uuid.UUID(prompt_id)}")).get(prompt_id)

    async def _knows(self, prompt_id: str) -> bool:
        return await self._holds(prompt_id) or bool(await self._entry(prompt_id))

    async def _connect(self) -> None:
        if self.socket is None or self.socket.closed:
            address = f"{self.url}/ws".replace("http", "ws", 1)
            params = [*self.query, ("clientId", self.client_id)]
            self.socket = await asyncio.wait_for(self.session.ws_connect(address, params=params), CONNECTING)

    async def _listen(self, prompt_id: str, on_event: OnEvent) -> None:
        """Passes messages on until one says that the workflow has ended, for `LISTENING` seconds at most."""
        deadline = time.monotonic() + LISTENING
        try:
            await self._connect()
            while (left := deadline - time.monotonic()) > 0:
                message = await self.socket.receive(timeout=left)
                if message.type not in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):  # it is closed
                    await asyncio.sleep(FIRST_DELAY)
                    return
                if (event := read_event(message.data)) is None:
                    continue
                kind, data = event
                on_event(kind, data)
                if kind == "executing" and data["node"] is None and data.get("prompt_id") == prompt_id:
                    return
        except asyncio.TimeoutError:
            return
        except aiohttp.ClientError:
            await asyncio.sleep(FIRST_DELAY)


async def _stay(session, context, redirect: aiohttp.TraceRequestRedirectParams) -> None:
    """Keeps the websocket from following a redirect, and our headers from going to another server with it."""
    redirect.response.close()
    raise aiohttp.ClientError("redirected")


def refusal_text(status: str, refusal: object) -> str:
    """Why the server refused a workflow, node by node where its answer says so."""
    try:
        lines = [f"{refusal['error']['message']} {refusal['error']['details']}".strip()]
        for node_id, report in refusal["node_errors"].items():
            node = f"{report['class_type']} (node {node_id})"
            lines += [f"{node}: {error['message']}: {error['details']}" for error in report["errors"]]
    except (KeyError, TypeError, AttributeError):
        return f"the server answered {status}"
    return "; ".join(lines)


def failure_text(entry: dict) -> str:
    """Why a workflow that has ended failed, by its history entry; empty if it did not."""
    for kind, data in entry["status"]["messages"]:
        if kind in ("execution_error", "execution_interrupted"):
            problem = data["exception_message"].strip() if kind == "execution_error" else "it was cancelled"
            return f"{data['node_type']} (node {data['node_id']}): {problem}"
    return ""


def headers_in(text: str) -> dict[str, str]:
    """Headers from lines such as "Authorization: Bearer ...". Raises ValueError, without showing them."""
    headers = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, value = (part.strip() for part in line.partition(":"))
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) or not value:
            raise ValueError(f"{HEADER} holds no header such as 'Authorization: Bearer ...'.")
        headers[name] = value
    return headers


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
