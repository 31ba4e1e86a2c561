"""What the benchmarks share: where they run, what they state of the versions, estimates and tables."""

import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RESAMPLES = 10_000
COLOURS = ("#3f789e", "#c0562b", "#5b8c5a", "#8a6bab")
# What glibc does with freed memory: keep it, as a GPU's allocator does, for allocating it again costs time; or return
# it at once, for otherwise it would count as resident.
KEEP = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def set_up(
    room: str = "benchmarks", packages: tuple[str, ...] = ("torch", "einops", "pytest", "matplotlib", "resvg_py")
) -> None:
    """Goes on in an environment with these packages and ComfyUI. One that has them, with a torch for its GPU, stays.

    room: whose packages are installed otherwise.
    """
    if not ("COMFYUI_PATH" in os.environ and all(map(importlib.util.find_spec, packages))):
        runpy.run_path(str(ROOT / "bootstrap.py"))["enter"](room)


def measure_in_a_process(file: str, *arguments: str, malloc: Mapping[str, str] = {}) -> dict:
    """Runs a benchmark with these arguments in a process of its own; the JSON that it prints last.

    malloc: `KEEP` or `GIVE_BACK`, else what is usual.
    """
    command = [sys.executable, file, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **malloc}, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def comfyui_version() -> str:
    return runpy.run_path(os.environ["COMFYUI_PATH"] + "/comfyui_version.py")["__version__"]


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def estimate(values) -> Estimate:
    """The mean of a tensor of n values, and its bootstrap interval."""
    import torch

    chosen = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    return Estimate(values.mean().item(), *values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist())


def crossed_estimate(grid) -> Estimate:
    """The mean of an array of contents x styles, and its bootstrap interval over both, which pairs share.

    NaN: there is no such pair, or it has no value.
    """
    import numpy as np

    if not np.isfinite(grid).any():
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(0)
    rows, columns = (rng.integers(n, size=(RESAMPLES, n)) for n in grid.shape)
    cells = grid[rows[:, :, None], columns[:, None]]
    counts = np.isfinite(cells).sum((1, 2))
    means = np.nansum(cells, (1, 2))[counts > 0] / counts[counts > 0]
    return Estimate(np.nanmean(grid), *np.quantile(means, [0.025, 0.975]))


def bold(found: Estimate) -> str:
    """In bold if its interval excludes 0; one of a single pair has no width, and says nothing."""
    return f"**{found}**" if found.low < found.high and (found.low > 0 or found.high < 0) else f"{found}"


def table(header: list[str], lines: list[list]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *lines]) + "\n"


def template(name: str) -> list[str]:
    """The sections of templates/NAME.md, with fields that `str.format` fills."""
    text = (ROOT / "benchmarks" / "templates" / f"{name}.md").read_text(encoding="utf-8")
    return re.split(r"(?m)^(?=## )", text)


def joined(sections: list[str]) -> str:
    """Sections as one text, a blank line between them."""
    return "\n\n".join(section.strip() for section in sections) + "\n"


def chart_axes(count: int):
    """A matplotlib figure with `count` square charts side by side, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure((5.5 * count, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(color="lightgray")
    return figure, axes
