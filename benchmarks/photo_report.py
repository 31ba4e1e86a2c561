"""The report of photos.py: its tables and its two sheets of pictures."""

import json
import shlex
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from benchmarks.common import bold, crossed_estimate, joined, table, template
from benchmarks.photo_graphs import CONTENDERS, VAE, Graphs, Plan, Task
from benchmarks.picture_scores import ssim
from catalogue.sheets import Result
from consislora_core.files import written_whole
from consislora_core.metrics import structure_scores
from demo.sheet import Cell, sheet

REPORT, SHEET, OWN_SHEET = "photos.md", "photos_sheet.png", "photos_own.png"
COMPARED = 256  # pixels of a side at which a picture drawn again is compared
SHOWN = 8  # lines of a sheet
SCORES = ("content (DINO)", "style (CLIP)", "content (CLIP)", "leakage (DINO)", "outlines")
OWN_SCORES = ("outlines", "SSIM")
PUBLISHED = {  # of the first three of SCORES
    "ConsisLoRA": (0.629, 0.659, 0.671),
    "B-LoRA": (0.536, 0.654, 0.643),
    "ZipLoRA": (0.488, 0.643, 0.668),
    "StyleAligned": (0.441, 0.645, 0.647),
    "StyleID": (0.679, 0.638, 0.693),
}
DIFFERENCES = (("paper", "b-lora"), ("paper", "plain"), ("both", "paper"), ("both", "quality"), ("quality", "paper"),
               ("fast", "paper"), ("both locked", "paper"), ("both locked", "both"), ("fast locked", "paper"),
               ("muon", "paper"), ("recolourings", "paper"), ("quality", "muon"),
               ("quality", "recolourings"))  # fmt: skip
INTRODUCTION, SCORES_TEXT, DIFFERENCES_TEXT, OWN_TEXT, SHEET_TEXT = template("photos")


class Report:
    """made: what has been made of the plan so far. machine: the server's /system_stats."""

    def __init__(self, plan: Plan, graphs: Graphs, work: Path, machine: dict):
        self.plan, self.graphs, self.work, self.machine = plan, graphs, work, machine
        self.made: dict[Task, Result] = {}

    def write(self) -> str:
        """The report on the contenders that have pictures, in `work` beside its sheets."""
        made = {task.contender for task in self.made if task.style}
        names = [name for name in self.plan.contenders if name in made]
        sections = [
            self._introduction(), self._scores(names), self._differences(names), self._own(names), self._sheet(names)
        ]  # fmt: skip
        text = joined(sections)
        with written_whole(self.work / REPORT) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
        return text

    def _introduction(self) -> str:
        plan, base = self.plan, self.graphs.base
        return INTRODUCTION.format(
            date=date.today(),
            options=shlex.join(["", *sys.argv[1:]]).removeprefix("''"),
            comfyui=self.machine["system"]["comfyui_version"],
            torch=self.machine["system"]["pytorch_version"],
            device=self.machine["devices"][0]["name"],
            contents=len(plan.contents),
            styles=len(plan.styles),
            seeds=plan.seeds,
            side=base.side,
            scale=self.graphs.scale,
            sampler=base.sampler_name,
            scheduler=base.scheduler,
            steps=base.steps,
            cfg=base.cfg,
        )

    def _scores(self, names: list[str]) -> str:
        lines = [
            [name, CONTENDERS[name].label, *(crossed_estimate(self._grid(name, score)) for score in SCORES)]
            for name in names
        ]
        published = [[method, *scores] for method, scores in PUBLISHED.items()]
        return SCORES_TEXT.format(
            table=table(["", "contender", *SCORES], lines), published=table(["published", *SCORES[:3]], published)
        )

    def _differences(self, names: list[str]) -> str:
        lines = [
            [f"{one} - {other}", *(bold(crossed_estimate(self._grid(one, s) - self._grid(other, s))) for s in SCORES)]
            for one, other in DIFFERENCES
            if {one, other} <= set(names)
        ]
        ours, other = (PUBLISHED[name] for name in ("ConsisLoRA", "B-LoRA"))
        published = [f"{a - b:.3f}" for a, b in zip(ours, other, strict=True)]
        lines.append(["published: ConsisLoRA - B-LoRA", *published, "", ""])
        return DIFFERENCES_TEXT.format(table=table(["", *SCORES], lines))

    def _grid(self, contender: str, score: str) -> np.ndarray:
        """A score by content and style image, the mean over seeds; NaN where there is no picture."""
        plan, values = self.plan, {}
        for task, result in self.made.items():
            if task.contender == contender and task.style:
                place = plan.contents.index(task.content), plan.styles.index(task.style)
                values.setdefault(place, []).append(scores_of(result)[score])
        grid = np.full((len(plan.contents), len(plan.styles)), np.nan)
        for place, found in values.items():
            grid[place] = np.mean(found)
        return grid

    def _own(self, names: list[str]) -> str:
        labels = {VAE: "the VAE alone", **{name: CONTENDERS[name].label for name in names if self.plan.own(name)}}
        lines = []
        for name, label in labels.items():
            values = np.array([self._own_scores(task) for task in self.plan.own(name)])
            grid = values.reshape(len(self.plan.contents), -1, len(OWN_SCORES)).mean(1)  # over seeds
            lines.append([name, label, *(crossed_estimate(column[:, None]) for column in grid.T)])
        rows = [[("content image", content), *self._cells(labels, content)] for content in self.plan.contents[:SHOWN]]
        save_sheet(rows, self.work / OWN_SHEET)
        return OWN_TEXT.format(side=COMPARED, table=table(["", "contender", *OWN_SCORES], lines), file=OWN_SHEET)

    def _own_scores(self, task: Task) -> tuple[float, ...]:
        if task not in self.made:
            return (np.nan,) * len(OWN_SCORES)
        again, picture = loaded(self._file(task)), loaded(task.content)
        return structure_scores(again, picture)["edges"].item(), ssim(again, picture).item()

    def _sheet(self, names: list[str]) -> str:
        contents, styles = self.plan.contents, self.plan.styles
        pairs = [(contents[i % len(contents)], styles[i % len(styles)]) for i in range(max(len(contents), len(styles)))]
        rows = [
            [("content image", content), ("style image", style), *self._cells(names, content, style)]
            for content, style in pairs[:SHOWN]
        ]
        save_sheet(rows, self.work / SHEET)
        key = ", ".join(f"{name}: {CONTENDERS[name].label}" for name in names)
        return SHEET_TEXT.format(key=key, file=SHEET)

    def _cells(self, names: Iterable[str], content: Path, style: Path | None = None) -> list[Cell]:
        tasks = [Task(name, content, style, 0) for name in names]
        return [(task.contender, self._file(task)) for task in tasks if task in self.made]

    def _file(self, task: Task) -> Path:
        return self.work / self.made[task].files


def scores_of(result: Result) -> dict[str, float]:
    """The scores of a picture by the names in SCORES, from what both Evaluate nodes reported."""
    clip, dino = (report["mean"] for report in json.loads(f"[{result.scores}]"))
    return dict(
        zip(SCORES, (dino["content"], clip["style"], clip["content"], dino["leakage"], dino["edges"]), strict=True)
    )


def loaded(file: Path) -> Tensor:
    """A picture at COMPARED pixels: 1 3 h w, 0 to 1."""
    with Image.open(file) as picture:
        pixels = torch.tensor(np.asarray(picture.convert("RGB")))
    return F.adaptive_avg_pool2d(rearrange(pixels, "h w c -> 1 c h w") / 255, COMPARED)


def save_sheet(rows: list[list[Cell]], file: Path) -> None:
    with written_whole(file) as unfinished:
        sheet(rows).save(unfinished, "PNG")
