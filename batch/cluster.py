"""Workers on all machines of a Ray cluster, or several on this one: each has a ComfyUI of its own."""

import asyncio
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayTaskError

from batch.crew import Crew, Lost
from batch.maker import Made, Maker, Order
from batch.server import Server, Unreachable

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds for a ComfyUI that runs, but does not answer
FOLDERS = ("input", "output", "temp", "user")  # models and nodes are shared, these are each worker's own
SETTINGS = {  # of the cluster that starts here, if none runs
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to anyone
    "RAY_worker_niceness": "0",  # a ComfyUI runs no slower than one that was started by hand
    # Else the ComfyUI of a worker that is killed would stay, and keep the graphics card.
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
}


@asynccontextmanager
async def crew(size: int, comfyui: list[str], tell: Callable[[str], None]) -> AsyncIterator[Crew]:
    """comfyui: the command that starts ComfyUI on every machine."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    code = {"py_modules": [str(ROOT / "batch"), str(ROOT / "consislora_core")]}
    ray.init(runtime_env=code, log_to_driver=False, logging_level="ERROR")
    graphics = min(1, ray.cluster_resources().get("GPU", 0))
    role = ray.remote(Worker).options(num_cpus=1, num_gpus=graphics, scheduling_strategy="SPREAD")

    hired = []

    async def hire() -> Contract:
        contract = Contract(role.remote(comfyui))
        await contract.start()
        hired.append(contract)
        return contract

    try:
        yield Crew(size, hire, tell)
    finally:
        await asyncio.gather(*(contract.end() for contract in hired), return_exceptions=True)  # some are lost
        ray.shutdown()


class Contract:
    """A worker as seen from here."""

    def __init__(self, actor):
        self.actor = actor

    async def start(self) -> None:
        await self._answer(self.actor.start.remote())

    async def get(self, path: str, **query: str):
        return await self._answer(self.actor.get.remote(path, query))

    async def make(self, order: Order, pictures: dict[str, bytes]) -> Made:
        return await self._answer(self.actor.make.remote(order, pictures))

    async def end(self) -> None:
        await self._answer(self.actor.end.remote())

    async def _answer(self, answer: Awaitable):
        """Raises what the worker raised, and Lost where it ended."""
        try:
            return await answer
        except RayActorError:
            raise Lost("its process ended") from None
        except RayTaskError as error:
            ray.kill(self.actor)
            raise error.cause from None


class Worker:
    """Lives in a process of Ray's. Raises Lost once its ComfyUI has ended or hangs."""

    def __init__(self, comfyui: list[str]):
        self.folder = tempfile.TemporaryDirectory(prefix="consislora_")
        self.log = Path(self.folder.name, "comfyui.log")
        self.port = free_port()
        self.command = [*comfyui, "--port", str(self.port), "--database-url", "sqlite:///:memory:"]
        for kind in FOLDERS:
            Path(self.folder.name, kind).mkdir()
            self.command += [f"--{kind}-directory", str(Path(self.folder.name, kind))]

    async def start(self) -> None:
        """Waits until ComfyUI is up."""
        with self.log.open("wb") as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self.command, stdout=log, stderr=asyncio.subprocess.STDOUT
                )
            except OSError as error:
                raise Lost(f"{self.command[0]} does not run ({error}).") from None
        self.process, self.ended = process, asyncio.ensure_future(process.wait())
        self.server = await Server(f"http://127.0.0.1:{self.port}", 0, lambda text: None).__aenter__()
        await self._while_it_runs(self._up())
        self.server.patience = PATIENCE
        self.maker = Maker(self.server)

    async def _up(self) -> None:
        while True:
            with suppress(Unreachable):
                return await self.server.get("/system_stats")
            await asyncio.sleep(0.2)

    async def get(self, path: str, query: dict[str, str]):
        return await self._while_it_runs(self.server.get(path, **query))

    async def make(self, order: Order, pictures: dict[str, bytes]) -> Made:
        return await self._while_it_runs(self.maker.make(order, pictures))

    async def end(self) -> None:
        self.process.kill()
        await self.ended
        self.folder.cleanup()

    async def _while_it_runs(self, doing: Awaitable):
        task = asyncio.ensure_future(doing)
        await asyncio.wait({task, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        try:
            if task.done():
                return task.result()
            task.cancel()
        except Unreachable:
            self.process.kill()
        last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        raise Lost("\n".join(["ComfyUI ended. Its last words:", *last]))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
