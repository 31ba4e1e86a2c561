"""What every stage of the recipe shares: its time, its optimiser, its averaged weights, its files."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

from consislora_core.files import written_whole
from consislora_core.muon import Muon

LARGEST_FILE = 15 * 2**20  # bytes: a checkpoint is a few files that go anywhere
WARM_UP, FALLS_FROM = 100, 0.5  # steps until the full rate; the share of a stage after which the rate falls to 0


class Clock:
    """The seconds spent so far, in earlier runs too, of the minutes that the recipe is given."""

    def __init__(self, state: Path, minutes: float):
        self.file, self.total, self.started = state / "clock.json", 60 * minutes, time.time()
        self.before = json.loads(self.file.read_text(encoding="utf-8"))["seconds"] if self.file.exists() else 0.0

    def seconds(self) -> float:
        return self.before + time.time() - self.started

    def share(self) -> float:
        return self.seconds() / self.total

    def save(self) -> None:
        self.file.write_text(json.dumps({"seconds": round(self.seconds(), 1)}), encoding="utf-8")


class Optimiser:
    """Muon for matrices and convolutions, AdamW for the rest; gradients are clipped."""

    def __init__(self, module: nn.Module, rate: float, apart: tuple[str, ...] = ()):
        """apart: parts of names of matrices that are no maps from features to features, such as embeddings."""
        matrices, others = [], []
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                is_map = weight.ndim >= 2 and not any(part in name for part in apart)
                (matrices if is_map else others).append(weight)
        self.flat = [(weight, nn.Parameter(_matrix(weight.detach()))) for weight in matrices]  # share their storage
        self.weights, self.rate = matrices + others, rate
        self.both = [
            Muon([flat for _, flat in self.flat], rate, weight_decay=0.01),
            torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        ]

    def step(self, loss: Tensor, share: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for weight, flat in self.flat:
            if weight.grad is not None:
                flat.grad = weight.grad.movedim(1, -1).reshape(len(weight), -1)
        for optimizer in self.both:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * share
            optimizer.step()
        for weight in self.weights:
            weight.grad = None


def _matrix(weight: Tensor) -> Tensor:
    """A linear layer's weight, or a channels-last convolution's: a row for each feature it gives. A view."""
    return weight.movedim(1, -1).view(len(weight), -1)


class Run:
    """A module that learns within a share of the recipe's time: rate, average, speed, checkpoints that resume.

    A checkpoint holds weights and their average in fp16. The optimiser's momenta are left out, as they would treble
    it: after a resume the rate warms up again.
    """

    def __init__(self, name: str, module: nn.Module, optimiser: Optimiser, clock: Clock, state: Path, until: float):
        """until: the share of the recipe's time at which this stage ends."""
        self.name, self.module, self.optimiser, self.clock, self.state = name, module, optimiser, clock, state
        self.weights = {key: value for key, value in module.named_parameters() if value.requires_grad}
        self.average = {key: value.detach().clone() for key, value in self.weights.items()}
        self.begun, self.until = clock.share(), until
        if kept := load_shards(state, name):
            self.begun = kept["begun"].item() if "begun" in kept else self.begun
            with torch.no_grad():
                for key, value in self.weights.items():
                    value.copy_(kept[f"module/{key}"])
                    self.average[key].copy_(kept[f"average/{key}"])
        self.steps, self.seen, self.since, self.losses = 0, 0, time.time(), []
        self.next_report = self.next_sheet = 0.0

    def progress(self) -> float:
        """0 at the stage's beginning, 1 at its end."""
        return (self.clock.share() - self.begun) / max(self.until - self.begun, 1e-9)

    def goes_on(self) -> bool:
        return self.clock.share() < self.until

    def step(self, loss: Tensor, batch: int) -> None:
        falling = min(1.0, max(0.0, (1 - self.progress()) / (1 - FALLS_FROM)))
        self.optimiser.step(loss, min(1.0, (self.steps + 1) / WARM_UP) * falling)
        self.steps, self.seen = self.steps + 1, self.seen + batch
        decay = min(0.999, 1 - 10 / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)
        self.losses.append(loss.detach())

    def report(self, every: float = 15.0) -> None:
        if time.time() < self.next_report:
            return
        loss = torch.stack(self.losses).mean().item() if self.losses else float("nan")
        speed = self.seen / (time.time() - self.since)
        print(
            f"{self.clock.seconds():6.0f} s  {self.name}: {self.progress():4.0%}  {self.steps} steps  loss {loss:.4f}  "
            f"{speed:.0f} images/s",
            flush=True,
        )
        self.losses, self.next_report = [], time.time() + every

    def due(self, every: float = 60.0) -> bool:
        """Whether it is time for a checkpoint and a sheet."""
        is_due = time.time() >= self.next_sheet
        if is_due:
            self.next_sheet = time.time() + every
        return is_due

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Saves a checkpoint at the end, also when Ctrl-C or an error is the end."""
        try:
            yield
        finally:
            self.save()

    def save(self) -> None:
        save_checkpoint(self.state, self.name, self.weights, self.average, self.begun)
        self.clock.save()


def save_checkpoint(state: Path, stage: str, weights: dict, average: dict, begun: float | None) -> None:
    """begun: the share of the time at which the stage began; None where it has not."""
    tensors = {f"module/{key}": value for key, value in weights.items()}
    tensors |= {f"average/{key}": value for key, value in average.items()}
    save_shards(state, stage, tensors if begun is None else {**tensors, "begun": torch.tensor(begun)})


def save_shards(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """`name-0.safetensors` and on, each of at most LARGEST_FILE, in fp16."""
    shards, room = [{}], LARGEST_FILE
    for key, value in tensors.items():
        half = value.detach().half() if value.ndim else value.detach().float()
        size = half.numel() * half.element_size()
        if size > room:
            shards.append({})
            room = LARGEST_FILE
        shards[-1][key] = half.cpu().contiguous()
        room -= size
    for i, shard in enumerate(shards):
        with written_whole(folder / f"{name}-{i}.safetensors") as unfinished:
            unfinished.write_bytes(save(shard))


def load_shards(folder: Path, name: str) -> dict[str, Tensor]:
    shards = [load_file(file) for file in sorted(folder.glob(f"{name}-*.safetensors"))]
    return {key: value for shard in shards for key, value in shard.items()}


def sheet(images: Tensor, path: Path, columns: int) -> None:
    """images: n 3 h w, -1 to 1."""
    save_image(make_grid(images.float().cpu() / 2 + 0.5, nrow=columns, padding=2).clamp(0, 1), path)
