"""`python benchmarks/fidelity/faster.py [--images 4] [--scale 1] [--only ...]`: can a fifth of the steps give more?

Ways to train that other work proposes, each alone, on the pairs for tuning: noise levels drawn where the loss is,
smaller ranks, other rates for a side or a part, a warm start of stage 2, low resolution first. They are against the
preset *fast* as it was then, with stage 1 at 6 times AdamW's rates instead of 3 (fidelity_tuning_rates.md has both).
LoRAs and pictures are kept as by report.py. The tables are also in benchmarks/results/fidelity_faster.md.
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import torch
from torch import Tensor

from benchmarks.common import RESULTS, bold, comfyui_version, joined, table, template
from benchmarks.fidelity.pairs import PAIRS, Drawing
from benchmarks.fidelity.report import CONTENT_PROMPT, HALF, STYLE_PROMPT, Recipe, first_pairs, muon_at
from benchmarks.fidelity.shorter import WHOLE, Shorter
from benchmarks.fidelity.studio import Learned, Own, Studio
from consislora_core.losses import Draw
from consislora_core.schedule import LOSS_NAMES
from consislora_core.trainer import RandomStep, StepEvent, Trainer
from demo.server import PACK

FAST = muon_at(6, fewer=5)
SHOWN = ("content", "outlines", "style", "sum")


class ByLoss(Trainer):
    """Draws noise levels in proportion to the root mean square of the losses there (arXiv 2102.09672, section 3.3).

    A loss has the weight of 1 / (its level's share times the number of levels), so that gradients have the same mean.
    """

    SPANS, LAST, FIRST = 10, 10, 3  # of neighbouring levels; losses kept of each; seen of each before it begins

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = {loss: [deque(maxlen=self.LAST) for _ in range(self.SPANS)] for loss in LOSS_NAMES}

    def _draw(self) -> RandomStep:
        random, levels = super()._draw(), len(self.model.sigmas) // self.SPANS
        shares = self._shares(self.stage.at(min(self.step, self.stage.steps - 1))[0])
        self.span = int(torch.multinomial(shares, 1, generator=self.generator))
        self.importance = 1 / (float(shares[self.span]) * self.SPANS)
        level = self.span * levels + int(torch.randint(levels, (1,), generator=self.generator))
        sigma = self.model.sigmas[level].view(1, 1, 1, 1)
        return random._replace(draw=Draw(random.draw.noise, sigma.to(random.draw.noise)))

    def _shares(self, loss: str) -> Tensor:
        seen = self.seen[loss]
        if min(map(len, seen)) < self.FIRST:
            return torch.full((self.SPANS,), 1 / self.SPANS)
        sizes = torch.tensor([torch.tensor([*losses]).square().mean().sqrt() for losses in seen])
        return 0.9 * sizes / sizes.sum() + 0.1 / self.SPANS

    def train_step(self, z_0: Tensor, random: Draw, weight: Tensor | None = None) -> StepEvent:
        span, importance = self.span, self.importance  # those of the next step are drawn while this one computes
        event = super().train_step(z_0, random, torch.full((len(z_0), 1, 1, 1), importance))
        self.seen[event.phase][span].append(event.loss / importance)
        return event


class Rates(Trainer):
    """Steps of `chosen` weights are `times` as long. chosen: of a role and a side ("down" or "up")."""

    def __init__(self, *args, chosen: Callable[[str, str], bool], times: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.chosen, self.times = chosen, times

    def _update(self, *computed: Tensor) -> None:
        weights = [
            getattr(layer, side)
            for target, layer in self.inserted.layers.items()
            for side in ("down", "up")
            if self.chosen(target.role, side)
        ]
        before = [weight.detach().clone() for weight in weights]
        super()._update(*computed)
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.add_(weight - old, alpha=self.times - 1)


class Warm(Trainer):
    """Begins with style parts that were learned before."""

    def __init__(self, *args, styles: Learned, **kwargs):
        super().__init__(*args, **kwargs)
        parts = [own.lora.part("style") for own in styles.owns.values()]
        self.start = [{**start, "style": part} for start, part in zip(self.start, parts, strict=True)]


class Way(NamedTuple):
    """How the LoRAs of a pair are trained; sizes: of the pictures in each phase of either stage, as parts of theirs."""

    label: str
    recipe: Recipe = FAST
    rank: int = 64
    trainer: Callable[..., Trainer] = Trainer
    is_warm: bool = False
    sizes: tuple[tuple[float, ...], ...] = WHOLE


def shorter_stage_2(recipe: Recipe, n: int) -> Recipe:
    return recipe._replace(style=tuple(phase._replace(steps=phase.steps // n) for phase in recipe.style))


def rates(chosen: Callable[[str, str], bool], times: float) -> Callable[..., Trainer]:
    return partial(Rates, chosen=chosen, times=times)


WAYS = {
    "fast": Way("*fast*, as it was"),
    "levels": Way("noise levels by their loss", trainer=ByLoss),
    "rank 32": Way("rank 32", rank=32),
    "rank 16": Way("rank 16", rank=16),
    "up": Way("up matrices at 4 times the rate", trainer=rates(lambda role, side: side == "up", 4)),
    "style": Way("style parts at 2 times the rate", trainer=rates(lambda role, side: role == "style", 2)),
    "warm": Way("stage 2 begins at stage 1's style part", is_warm=True),
    "warm, half": Way("the same, with half of stage 2's steps", shorter_stage_2(FAST, 2), is_warm=True),
    "half": Way("half of stage 2's steps", shorter_stage_2(FAST, 2)),
    "low first": Way("noise loss at half of the side", sizes=((0.5, 1.0), (1.0,))),
}


class Faster(Shorter):
    def trained(self, name: str) -> dict[Drawing, Own]:
        """The LoRAs of all images, in one of `WAYS`."""
        way = WAYS[name]
        stage_1, stage_2 = (replace(stage, rank=way.rank) for stage in self.stages(way.recipe))
        named = {} if way.trainer is Trainer else {"trainer": way.trainer, "way": way.label}
        first = named | {"recolourings": way.recipe.recolourings}
        if way.sizes != WHOLE:
            first["sizes"] = way.sizes[0]
        contents = self.studio.learned(stage_1, CONTENT_PROMPT, self.contents, **first)
        whole = self.studio.learned(stage_1, "A [v]", self.styles, **first)
        if way.is_warm:
            named = {"trainer": partial(Warm, styles=whole), "way": way.label}
        return contents.owns | self.studio.learned(stage_2, STYLE_PROMPT, self.styles, whole, **named).owns

    def share(self, way: Way) -> float:
        """Of the seconds that fast trains."""
        return self.seconds(way.recipe, way.sizes) / self.seconds(FAST, WHOLE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Other ways to train in a fifth of the steps.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--scale", type=float, default=1.0, help="training steps, as a part of fast's")
    parser.add_argument("--images", type=int, metavar="N", default=4, help="content images, and style images")
    parser.add_argument("--only", nargs="+", metavar="WAY", default=[*WAYS], help="these, beside fast")
    options = parser.parse_args()
    pairs = first_pairs(PAIRS["tune"], options.images, options.images)
    bench = Faster(Studio(options.work), pairs, options.scale, 1)
    names = dict.fromkeys(["fast", *options.only])
    tables = {}
    for locked in (False, True):
        fast, rows = bench.scores_of(bench.trained("fast"), locked, **HALF), []
        for name in names:
            scores = bench.scores_of(bench.trained(name), locked, **HALF)
            found = [bench.estimate(scores[score]) for score in SHOWN]
            less = ["" if name == "fast" else bold(bench.estimate(scores[score] - fast[score])) for score in SHOWN]
            rows.append([WAYS[name].label, f"{bench.share(WAYS[name]):.2f}", *found, *less])
        header = ["", "its seconds, of *fast*'s", *SHOWN, *(f"{score}, less *fast*'s" for score in SHOWN)]
        tables["locked" if locked else "free"] = table(header, rows)
    report = joined(template("fidelity_faster")).format(
        date=date.today(), images=options.images, scale=options.scale, pairs=len(pairs), comfyui=comfyui_version(),
        torch=torch.__version__, threads=torch.get_num_threads(), **tables,
    )  # fmt: skip
    (RESULTS / "fidelity_faster.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
