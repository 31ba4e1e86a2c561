"""Spreads a job sheet over several workers, some of which may be lost meanwhile."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from batch.job_runner import ATTEMPTS, JobRunner, Keep, Order, Show, given_up_text, made_by

POLL = 0.5  # seconds between two looks for a job of a lost worker


class WorkerLost(RuntimeError):
    """A worker has ended, or could not start."""


class Scheduler:
    """Runs jobs on `size` workers. start_worker: starts one, as soon as there is room for it. report: takes messages.

    A worker has `get` and `run` of a JobRunner, which raise WorkerLost when it has ended.
    """

    def __init__(
        self, size: int, start_worker: Callable[[], Awaitable[JobRunner]], report: Callable[[str], None] = print
    ):
        self.size, self.start_worker, self.report = size, start_worker, report
        self.idle: list[JobRunner] = []

    async def get(self, path: str, **query: str):
        """The answer of any worker's server: all servers are taken to be alike."""
        if not self.idle:
            self.idle.append(await self.start_worker())
        return await self.idle[0].get(path, **query)

    async def run_all(self, orders: Iterable[Order], keep: Keep, show: Show) -> None:
        """Runs all orders. Raises WorkerLost if no worker is left, and OSError as `made_by` does."""
        self.waiting, self.keep, self.show = list(orders), keep, show
        self.running: dict[int, Order] = {}  # by the worker's number
        self.known: list[set[str]] = [set() for _ in range(self.size)]  # LoRAs that each worker has trained or loaded
        self.losses: Counter[str] = Counter()
        slots = {asyncio.ensure_future(self._keep_working(number)) for number in range(self.size)}
        try:
            while slots and (self.waiting or self.running):
                ended, slots = await asyncio.wait(slots, return_when=asyncio.FIRST_COMPLETED)
                for slot in ended:
                    slot.result()
        finally:
            for slot in slots:  # one may still wait for a worker
                slot.cancel()
        if self.waiting:
            raise WorkerLost(f"No worker is left, and {len(self.waiting)} jobs are.")

    async def _keep_working(self, number: int) -> None:
        """Has one worker work, and after its loss another one."""
        while self.waiting or self.running:
            try:
                worker = self.idle.pop() if self.idle else await self.start_worker()
            except WorkerLost as error:
                self.report(f"Worker {number + 1} cannot start: {error}")
                return
            try:
                await self._work(number, worker)
            except WorkerLost as error:
                self._requeue(self.running.pop(number), f"worker {number + 1} was lost ({error})")

    async def _work(self, number: int, worker: JobRunner) -> None:
        while self.waiting or self.running:
            if not self.waiting:  # but the job of a lost worker may come back
                await asyncio.sleep(POLL)
                continue
            order = self.running[number] = self.waiting.pop(self._choose(number))
            self.known[number] |= order.loras
            self.show(", ".join(order.result.name for order in self.running.values()))
            result, picture = await made_by(worker.run, order)
            self.keep(result, picture)
            del self.running[number]

    def _choose(self, number: int) -> int:
        """The index of the first waiting job with most LoRAs known to this worker and fewest to others."""
        here = self.known[number]
        elsewhere = set().union(*self.known) - here
        gains = [len(order.loras & here) - len(order.loras & elsewhere) for order in self.waiting]
        return gains.index(max(gains))

    def _requeue(self, order: Order, reason: str) -> None:
        name, key = order.result.name, order.result.key
        self.losses[key] += 1
        if self.losses[key] == ATTEMPTS:
            self.keep(replace(order.result, error=given_up_text("worker")), None)
        else:
            self.report(f"{name}: {reason}; the job goes on elsewhere.")
            self.waiting.insert(0, order)
