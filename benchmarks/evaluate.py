"""`python benchmarks/evaluate.py WORK`: do Evaluate's scores rank real drawings as they should?

The drawings are those of the fidelity benchmark's pairs. Each question has right and wrong answers, and its AUC is how
often a right one scores above a wrong one: 1 is always, 0.5 is chance.

- The content image's thing, drawn in the style image's set, against the other pairs' things in that set.
- The content image's thing in the style image's set, against the same thing in the other sets.
- The style image's thing in the content image's set, which has leaked, against the content image's thing in the style
  image's set, which has not.

The networks are the benchmark's judges. They have not learned from the right answers to the first two questions, while
they know many of the wrong ones. CLIP and DINOv2, which the node takes, are not measured here: no package carries them.

WORK keeps emoji and rendered drawings, as in `fidelity/judges.py`.
"""

import importlib.util
import runpy
import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    if not all(map(importlib.util.find_spec, ["torch", "safetensors", "resvg_py"])):
        runpy.run_path(sys.path[0] + "/bootstrap.py")["enter"]("benchmarks")

import torch
from torch import Tensor

from benchmarks.fidelity.judges import Drawings, Judge, load_judge, render_everything
from benchmarks.fidelity.pairs import CONTENT_SET, PAIRS, STYLE_SETS, Drawing, Pair
from consislora_core.metrics import feature_scores, structure_scores

RESULTS = Path(__file__).resolve().parent / "results" / "evaluate.md"
SETS = (CONTENT_SET, *STYLE_SETS)


class Question(NamedTuple):
    """Pictures that should score high beside a pair's images, and pictures that should score low."""

    pair: Pair
    right: list[Drawing]
    wrong: list[Drawing]


def same_thing(pairs: list[Pair]) -> list[Question]:
    drawn = sorted({pair.truth for pair in pairs})
    return [
        Question(pair, [pair.truth], [other for other in drawn if other[0] == pair.style[0] and other != pair.truth])
        for pair in pairs
    ]


def same_look(pairs: list[Pair]) -> list[Question]:
    return [
        Question(pair, [pair.truth], [(other, pair.content[1]) for other in SETS if other != pair.style[0]])
        for pair in pairs
    ]


def leaked(pairs: list[Pair]) -> list[Question]:
    return [Question(pair, [(CONTENT_SET, pair.style[1])], [pair.truth]) for pair in pairs]


QUESTIONS = {"same thing": same_thing, "same look": same_look, "leaked": leaked}
ASKED = [
    ("same thing", "edges", None),
    ("same thing", "silhouette", None),
    ("same thing", "content", "content"),
    ("same look", "style", "style"),
    ("leaked", "leakage", "content"),
]  # question, score, judge


class Bench(NamedTuple):
    drawings: Drawings
    places: dict[Drawing, int]

    def pictures(self, labels: list[Drawing]) -> Tensor:
        """b 3 h w, of the labels that the sets have drawn"""
        return self.drawings.batch([self.places[label] for label in labels if label in self.places])


def scores(bench: Bench, pair: Pair, labels: list[Drawing], name: str, judge: str | None) -> Tensor:
    pictures, content, style = (bench.pictures(some) for some in (labels, [pair.content], [pair.style]))
    if judge is None:
        return structure_scores(pictures, content)[name]
    network = cached_judge(judge)
    return feature_scores(*(network(some).features for some in (pictures, content, style)))[name]


@cache
def cached_judge(name: str) -> Judge:
    return load_judge(name)


def auc(right: Tensor, wrong: Tensor) -> float:
    """How often a right answer (n) scores above a wrong one (m); a tie counts half."""
    above = right[:, None] - wrong
    return ((above > 0).float() + 0.5 * (above == 0).float()).mean().item()


def answered(bench: Bench, questions: list[Question], name: str, judge: str | None) -> tuple[float, float]:
    """The AUC over everything at once, and its mean over pairs, each beside its own images only."""
    right, wrong = (
        [scores(bench, question.pair, getattr(question, side), name, judge) for question in questions]
        for side in ("right", "wrong")
    )
    apart = [auc(ours, theirs) for ours, theirs in zip(right, wrong, strict=True)]
    return auc(torch.cat(right), torch.cat(wrong)), sum(apart) / len(apart)


@torch.no_grad()
def report(drawings: Drawings) -> str:
    bench = Bench(drawings, {label: i for i, label in enumerate(drawings.labels)})
    pairs = [*PAIRS["tune"], *PAIRS["report"]]
    lines = [
        "# Do Evaluate's scores rank real drawings as they should?",
        "",
        f"{date.today()}, torch {torch.__version__}; `python benchmarks/evaluate.py WORK`.",
        *__doc__.splitlines()[1:-2],
        "",
        "| question | score | by | AUC over everything | AUC beside one pair of images |",
        "|---|---|---|---|---|",
    ]
    for question, name, judge in ASKED:
        everything, apart = answered(bench, QUESTIONS[question](pairs), name, judge)
        by = f"the {judge} judge" if judge else "no network"
        lines.append(f"| {question} | {name} | {by} | {everything:.3f} | {apart:.3f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python benchmarks/evaluate.py WORK")
    RESULTS.write_text(report(render_everything(Path(sys.argv[1]))), encoding="utf-8")
