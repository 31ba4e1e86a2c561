"""Workers on all machines of a Ray cluster, or several on this one: each has a ComfyUI of its own."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from batch.comfy_client import ComfyClient, Unreachable, free_port
from batch.job_runner import JobRunner, Made, Order
from batch.scheduler import Scheduler, WorkerLost

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds for a ComfyUI that runs, but does not answer
FOLDERS = ("input", "output", "temp", "user")  # each worker has its own; models and nodes are shared
SETTINGS = {  # of the cluster that starts here, if none runs
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # a ComfyUI runs no slower than one that was started by hand
    # Otherwise the ComfyUI of a worker that is killed would stay, and keep the graphics card.
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "true",
}


@asynccontextmanager
async def ray_scheduler(size: int, comfyui: list[str], report: Callable[[str], None]) -> AsyncIterator[Scheduler]:
    """A `Scheduler` of Ray workers. comfyui: the command that starts ComfyUI on every machine."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    code = {"py_modules": [str(ROOT / room) for room in ("batch", "catalogue", "consislora_core")]}
    ray.init(runtime_env=code, log_to_driver=False, logging_level="ERROR")
    gpus = min(1, ray.cluster_resources().get("GPU", 0))
    actor = ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")

    workers = []

    async def start_worker() -> RemoteWorker:
        worker = RemoteWorker(actor.remote(comfyui))
        await worker.start()
        workers.append(worker)
        return worker

    try:
        yield Scheduler(size, start_worker, report)
    finally:
        await asyncio.gather(*(worker.end() for worker in workers), return_exceptions=True)  # some are lost
        ray.shutdown()


class RemoteWorker:
    """A `Worker` as seen from this process."""

    def __init__(self, actor):
        self.actor = actor

    async def start(self) -> None:
        await self._answer(self.actor.start.remote())

    async def get(self, path: str, **query: str):
        return await self._answer(self.actor.get.remote(path, query))

    async def run(self, order: Order, pictures: dict[str, bytes]) -> Made:
        return await self._answer(self.actor.run.remote(order, pictures))

    async def end(self) -> None:
        await self._answer(self.actor.end.remote())

    async def _answer(self, answer: Awaitable):
        """Raises what the worker raised, and WorkerLost if its process has ended or its machine is cut off."""
        try:
            return await answer
        except RayActorError:
            raise WorkerLost("its process ended") from None
        except RayTaskError as error:
            ray.kill(self.actor)
            raise error.cause from None
        except RayError as error:  # the answer was lost on its way
            ray.kill(self.actor)
            raise WorkerLost(f"its answer was lost: {type(error).__name__}") from None


class Worker:
    """Lives in a process of Ray's. Raises WorkerLost once its ComfyUI has ended or hangs."""

    def __init__(self, comfyui: list[str]):
        self.folder = tempfile.TemporaryDirectory(prefix="consislora_", ignore_cleanup_errors=True)
        self.log = Path(self.folder.name, "comfyui.log")
        self.port = free_port()
        self.command = [*comfyui, "--port", str(self.port), "--database-url", "sqlite:///:memory:"]
        for kind in FOLDERS:
            Path(self.folder.name, kind).mkdir()
            self.command += [f"--{kind}-directory", str(Path(self.folder.name, kind))]

    async def start(self) -> None:
        """Starts ComfyUI and waits until it answers."""
        try:
            with self.log.open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *self.command, stdout=log, stderr=asyncio.subprocess.STDOUT
                )
        except OSError as error:
            self.folder.cleanup()
            raise WorkerLost(f"{self.command[0]} does not run ({error}).") from None
        self.process, self.ended = process, asyncio.ensure_future(process.wait())
        self.client = await ComfyClient(f"http://127.0.0.1:{self.port}", 0, lambda text: None).__aenter__()
        await self._while_it_runs(self._wait_until_up())
        self.client.patience = PATIENCE
        self.runner = JobRunner(self.client)

    async def _wait_until_up(self) -> None:
        while True:
            with suppress(Unreachable):
                return await self.client.get("/system_stats")
            await asyncio.sleep(0.2)

    async def get(self, path: str, query: dict[str, str]):
        return await self._while_it_runs(self.client.get(path, **query))

    async def run(self, order: Order, pictures: dict[str, bytes]) -> Made:
        return await self._while_it_runs(self.runner.run(order, pictures))

    async def end(self) -> None:
        """Ends ComfyUI and removes its folders, which stay if Ray kills this process before."""
        with suppress(ProcessLookupError):  # it has ended by itself
            self.process.kill()
        await self.ended
        await self.client.__aexit__()
        self.folder.cleanup()

    async def _while_it_runs(self, request: Awaitable):
        task = asyncio.ensure_future(request)
        await asyncio.wait({task, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        with suppress(Unreachable):
            if task.done():
                return task.result()
            task.cancel()
        end_of_log = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        await self.end()
        raise WorkerLost("\n".join(["ComfyUI ended. The end of its log:", *end_of_log]))
