"""`python benchmarks/evaluate.py WORK`: do Evaluate's scores rank real drawings as they should?

The drawings are those of the fidelity benchmark's pairs. Each question has positive and negative drawings, and its AUC
is how often a positive one scores above a negative one: 1 is always, 0.5 is chance.

- Same subject: the content image's subject, drawn in the style image's set, against the other pairs' subjects in that
  set.
- Same style: the content image's subject in the style image's set, against the same subject in the other sets.
- Leaked: the style image's subject in the content image's set, which has leaked, against the content image's subject in
  the style image's set, which has not.

The networks are the benchmark's judges. They have not learned from the positive drawings of the first two questions,
but from many of the negative ones. CLIP and DINOv2, which the node takes, are not measured here: no package includes
them.

WORK keeps emoji and rendered drawings, as in `fidelity/judges.py`.
"""

import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.common import set_up

    set_up()

import torch
from torch import Tensor

from benchmarks.common import RESULTS
from benchmarks.fidelity.judges import Drawings, Judge, load_judge, render_everything
from benchmarks.fidelity.pairs import CONTENT_SET, PAIRS, STYLE_SETS, Drawing, Pair
from consislora_core.metrics import feature_scores, structure_scores

SETS = (CONTENT_SET, *STYLE_SETS)


class Question(NamedTuple):
    """Drawings that should score high beside a pair's images, and drawings that should score low."""

    pair: Pair
    positive: list[Drawing]
    negative: list[Drawing]


def same_subject(pairs: list[Pair]) -> list[Question]:
    drawn = sorted({pair.truth for pair in pairs})
    return [
        Question(pair, [pair.truth], [other for other in drawn if other[0] == pair.style[0] and other != pair.truth])
        for pair in pairs
    ]


def same_style(pairs: list[Pair]) -> list[Question]:
    return [
        Question(pair, [pair.truth], [(other, pair.content[1]) for other in SETS if other != pair.style[0]])
        for pair in pairs
    ]


def leaked(pairs: list[Pair]) -> list[Question]:
    return [Question(pair, [(CONTENT_SET, pair.style[1])], [pair.truth]) for pair in pairs]


QUESTIONS = {"same subject": same_subject, "same style": same_style, "leaked": leaked}
ASKED = [
    ("same subject", "edges", None),
    ("same subject", "silhouette", None),
    ("same subject", "content", "content"),
    ("same style", "style", "style"),
    ("leaked", "leakage", "content"),
]  # question, score, judge


class Bench(NamedTuple):
    drawings: Drawings
    places: dict[Drawing, int]

    def pictures(self, labels: list[Drawing]) -> Tensor:
        """b 3 h w, of those labels that the sets have drawn"""
        return self.drawings.batch([self.places[label] for label in labels if label in self.places])


def scores(bench: Bench, pair: Pair, labels: list[Drawing], name: str, judge: str | None) -> Tensor:
    pictures, content, style = (bench.pictures(drawings) for drawings in (labels, [pair.content], [pair.style]))
    if judge is None:
        return structure_scores(pictures, content)[name]
    network = cached_judge(judge)
    return feature_scores(*(network(batch).features for batch in (pictures, content, style)))[name]


@cache
def cached_judge(name: str) -> Judge:
    return load_judge(name)


def auc(positive: Tensor, negative: Tensor) -> float:
    """How often a positive score (n) is above a negative one (m); a tie counts half."""
    above = positive[:, None] - negative
    return ((above > 0).float() + 0.5 * (above == 0).float()).mean().item()


def answered(bench: Bench, questions: list[Question], name: str, judge: str | None) -> tuple[float, float]:
    """The AUC over all questions together, and its mean over pairs, each beside its own images only."""
    positive, negative = (
        [scores(bench, question.pair, getattr(question, side), name, judge) for question in questions]
        for side in ("positive", "negative")
    )
    single = [auc(ours, theirs) for ours, theirs in zip(positive, negative, strict=True)]
    return auc(torch.cat(positive), torch.cat(negative)), sum(single) / len(single)


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
        everything, single = answered(bench, QUESTIONS[question](pairs), name, judge)
        by = f"the {judge} judge" if judge else "no network"
        lines.append(f"| {question} | {name} | {by} | {everything:.3f} | {single:.3f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python benchmarks/evaluate.py WORK")
    (RESULTS / "evaluate.md").write_text(report(render_everything(Path(sys.argv[1]))), encoding="utf-8")
