"""`python benchmarks/fidelity/several.py [--work DIR] [--images 4] [--scale 0.2]`: one style from several style images.

LoRAs from one, two and four drawings of a set: trained together, or trained one by one and averaged. By the preset
quality, on pairs for the report. LoRAs and pictures are kept as by report.py, so that a stopped run continues. The
tables are also in benchmarks/results/several.md.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import date
from functools import cached_property
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import torch
from torch import Tensor

from benchmarks.common import RESULTS, bold, comfyui_version, joined, table, template
from benchmarks.fidelity.controls import figure
from benchmarks.fidelity.pairs import PAIRS, SAME_STYLE, Drawing, Pair
from benchmarks.fidelity.report import CONTENDERS, STYLE_PROMPT, TRUE_STYLE, Bench, first_pairs
from benchmarks.fidelity.studio import Own, Studio
from consislora_core.lora_file import ImageLora, LoraLayer
from consislora_core.store import fingerprint
from demo.server import PACK

QUALITY = CONTENDERS["quality"]
REPORTED = first_pairs(PAIRS["report"], 8, 8)  # those of fidelity.md, whose LoRAs are used here too
COUNTS, MOST = (2, 4), 4  # of drawings of a set
SHOWN = ("content", "outlines", "style", TRUE_STYLE, "leakage")
IN_FIGURE = (0, 5, 10, 15)  # pairs


def elected(changes: Tensor) -> Tensor:
    """The average of those that have the sign of the sum: TIES merging without trimming (arXiv 2306.01708)."""
    agree = changes.sign() == changes.sum(0).sign()
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


TOGETHER = "trained together"
# Of what several LoRAs add to the weights of a layer (n out in).
AVERAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "averaged": lambda changes: changes.mean(0),
    "averaged, signs aligned": elected,
}


def merged(loras: list[ImageLora], average: Callable[[Tensor], Tensor]) -> ImageLora:
    def merged_part(role: str) -> dict[str, LoraLayer]:
        parts = [lora.part(role) for lora in loras]
        return {path: merged_layer([part[path] for part in parts], average) for path in parts[0]}

    return ImageLora({role: merged_part(role) for role in loras[0].parts}, {})


def merged_layer(layers: list[LoraLayer], average: Callable[[Tensor], Tensor]) -> LoraLayer:
    """The average of the products up @ down, cut back to the rank of one of them by SVD."""
    changes = torch.stack([layer.alpha / layer.rank * layer.up @ layer.down for layer in layers])
    u, s, v = torch.linalg.svd(average(changes), full_matrices=False)
    rank = layers[0].rank
    root = s[:rank].sqrt()
    return LoraLayer(down=root[:, None] * v[:rank], up=u[:, :rank] * root, alpha=float(rank))


class Several(Bench):
    """Its pairs have the first drawing of each set as style image."""

    @cached_property
    def alone(self) -> dict[Drawing, Own]:
        """The LoRAs of the content images, and of each drawing of `SAME_STYLE`."""
        reported = Bench(self.studio, REPORTED, self.scale, 1)
        others = [drawing for group in SAME_STYLE.values() for drawing in group if drawing not in reported.styles]
        pairs = [Pair(content, drawing) for content in reported.contents for drawing in others]
        return reported.loras(QUALITY) | Bench(self.studio, pairs, self.scale, 1).loras(QUALITY)

    def learned(self, drawings: list[Drawing], way: str) -> Own:
        """The LoRA of one drawing, or of several: `TOGETHER` or one of `AVERAGES`."""
        recipe, studio, owns = QUALITY.recipe, self.studio, [self.alone[drawing] for drawing in drawings]
        if len(owns) == 1:
            return owns[0]
        if way == TOGETHER:
            stage_1, stage_2 = self.stages(recipe)
            whole = studio.learned(stage_1, "A [v]", drawings, together=True, recolourings=recipe.recolourings)
            return studio.learned(stage_2, STYLE_PROMPT, drawings, whole, together=True).owns[drawings[0]]
        name = fingerprint(["averaged", way, *(own.name for own in owns)])
        return Own(name, merged([own.lora for own in owns], AVERAGES[way]))

    def drawn(self, places: list[int], way: str) -> Tensor:
        """A picture of each pair. places: in its set, of the drawings to learn from."""
        print(f"Drawing {len(self.pairs)} pictures, {way} from drawings {places} ...", file=sys.stderr, flush=True)
        styles = {first: self.learned([group[i] for i in places], way) for first, group in SAME_STYLE.items()}
        return torch.cat(
            [
                self.studio.picture(self.alone[content], styles[style], seed, **QUALITY.settings)
                for seed, (content, style) in enumerate(self.pairs)
            ]
        )

    def scores_of(self, pictures: Tensor, places: list[int]) -> dict[str, Tensor]:
        """SHOWN of a picture of each pair: style to all drawings of its set, leakage of those learned from."""
        each = [
            self.scores(pictures, [Pair(content, SAME_STYLE[style][i]) for content, style in self.pairs])
            for i in range(MOST)
        ]
        averaged = {"style": range(MOST), "leakage": places}
        return {name: torch.stack([each[i][name] for i in averaged.get(name, [0])]).mean(0) for name in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description="One style from several style images.")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work", help="for resuming")
    parser.add_argument("--scale", type=float, default=0.2, help="training steps, as a part of the paper's")
    parser.add_argument("--images", type=int, metavar="N", default=4, help="content images, at most 8")
    options = parser.parse_args()
    pairs = first_pairs(PAIRS["report"], options.images, len(SAME_STYLE))
    bench = Several(Studio(options.work), pairs, options.scale, 1)
    drawn = {("1", f"number {i + 1}"): bench.drawn([i], "alone") for i in range(MOST)}
    alone = [bench.scores_of(pictures, [i]) for i, pictures in enumerate(drawn.values())]
    usual = {name: torch.stack([scores[name] for scores in alone]).mean(0) for name in SHOWN}
    found = {("1", "mean of four"): usual}
    for count in COUNTS:
        for way in (TOGETHER, *AVERAGES):
            drawn[f"{count}", way] = bench.drawn(list(range(count)), way)
            found[f"{count}", way] = bench.scores_of(drawn[f"{count}", way], list(range(count)))
    rows = [[*label, *(bench.estimate(scores[name]) for name in SHOWN)] for label, scores in found.items()]
    moved = [
        [*label, *(bold(bench.estimate(scores[name] - usual[name])) for name in SHOWN)]
        for label, scores in list(found.items())[1:]
    ]
    file = RESULTS / "several_sheet.png"
    contents, truths = (
        bench.studio.drawn(*(getattr(pair, name) for pair in bench.pairs)) for name in ("content", "truth")
    )
    references = [bench.studio.drawn(*(SAME_STYLE[style][i] for _, style in bench.pairs)) for i in range(MOST)]
    columns = {"content": contents, **{f"style {i + 1}": pictures for i, pictures in enumerate(references)}}
    columns |= {", ".join(label): pictures for label, pictures in drawn.items()} | {"ground truth": truths}
    figure(columns, IN_FIGURE, file)
    header = ["style images", "", *SHOWN]
    report = joined(template("several")).format(
        date=date.today(), comfyui=comfyui_version(), torch=torch.__version__, images=options.images,
        scale=options.scale, pairs=len(pairs), sets=len(SAME_STYLE), file=file.name,
        scores=table(header, rows), moves=table(header, moved),
    )  # fmt: skip
    (RESULTS / "several.md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
