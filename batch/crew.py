"""Spreads a job sheet over several workers, some of which may be lost on the way."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from batch.maker import ATTEMPTS, Maker, Order, broke_down
from consislora_core.catalog import Result

LOOK = 0.5  # seconds


class Lost(RuntimeError):
    """A worker is gone, or never came."""


class Crew:
    """size: of the crew. hire: gets a worker, as soon as there is room for one; tell: takes messages for the user.

    A worker has `get` and `make` of a Maker, which raise Lost when it is gone.
    """

    def __init__(self, size: int, hire: Callable[[], Awaitable[Maker]], tell: Callable[[str], None] = print):
        self.size, self.hire, self.tell = size, hire, tell
        self.idle: list[Maker] = []

    async def get(self, path: str, **query: str):
        """What one of the workers answers: they are taken to be alike."""
        if not self.idle:
            self.idle.append(await self.hire())
        return await self.idle[0].get(path, **query)

    async def make_all(
        self, orders: Iterable[Order], keep: Callable[[Result, bytes | None], None], show: Callable[[str], None]
    ) -> None:
        """As a Maker's. Raises Lost if no worker is left."""
        self.waiting, self.keep, self.show = list(orders), keep, show
        self.at_work: dict[int, Order] = {}  # by the place in the crew
        self.known: list[set[str]] = [set() for _ in range(self.size)]  # adapters that were trained or loaded there
        self.losses: Counter[str] = Counter()
        places = {asyncio.ensure_future(self._place(number)) for number in range(self.size)}
        try:
            while places and (self.waiting or self.at_work):
                ended, places = await asyncio.wait(places, return_when=asyncio.FIRST_COMPLETED)
                for place in ended:
                    place.result()
        finally:
            for place in places:  # one may still wait for a worker
                place.cancel()
        if self.waiting:
            raise Lost(f"No worker is left, and {len(self.waiting)} jobs are.")

    async def _place(self, number: int) -> None:
        """Where one worker works, and after its loss another one."""
        while self.waiting or self.at_work:
            try:
                worker = self.idle.pop() if self.idle else await self.hire()
            except Lost as error:
                self.tell(f"Worker {number + 1} cannot start: {error}")
                return
            try:
                await self._work(number, worker)
            except Lost as error:
                self._hand_on(self.at_work.pop(number), f"worker {number + 1} was lost ({error})")

    async def _work(self, number: int, worker: Maker) -> None:
        while self.waiting or self.at_work:
            if not self.waiting:  # yet the job of one who is lost may come back
                await asyncio.sleep(LOOK)
                continue
            order = self.at_work[number] = self.waiting.pop(self._choice(number))
            self.known[number] |= order.adapters
            self.show(", ".join(order.result.name for order in self.at_work.values()))
            result, picture = await worker.make(order, order.read())
            self.keep(result, picture)
            del self.at_work[number]

    def _choice(self, number: int) -> int:
        """Which of the waiting: the first of those for which most is trained here and least elsewhere."""
        here = self.known[number]
        elsewhere = set().union(*self.known) - here
        gains = [len(order.adapters & here) - len(order.adapters & elsewhere) for order in self.waiting]
        return gains.index(max(gains))

    def _hand_on(self, order: Order, why: str) -> None:
        name, key = order.result.name, order.result.key
        self.losses[key] += 1
        if self.losses[key] == ATTEMPTS:
            self.keep(replace(order.result, error=broke_down("worker")), None)
        else:
            self.tell(f"{name}: {why}; the job goes on elsewhere.")
            self.waiting.insert(0, order)
