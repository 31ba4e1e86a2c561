"""`python benchmarks/fidelity/judges.py WORK`: trains the benchmark's two judges and measures how reliable they are.

One classifies the subject of a picture, the other the emoji set it is drawn in; both also give features and feature
maps for `consislora_core.metrics`. They learn from real drawings, moved, blurred and, for the content judge,
recoloured, but never from a generated picture. Unlike the demo model they know its held-out subjects and unseen sets,
as a judge has to.

They are tested on drawings that they have not learned from: the ground truths of all pairs in `pairs.py`, the pictures
of the demo, and other drawings picked at random. The content judge has not learned from any drawing of fxemoji either.

WORK keeps emoji and rendered drawings. Takes some fifteen minutes on one CPU core; results: `content.safetensors` and
`style.safetensors` beside this file, with the accuracies in their metadata.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.common import set_up

    set_up()

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.fidelity.pairs import CONTENT_SET, PAIRS, STYLE_SETS

FOLDER = Path(__file__).resolve().parent
TRUTHS = {pair.truth for pairs in PAIRS.values() for pair in pairs}
SIDE, DRAWN = 128, 256  # pixels of a picture when it is judged, and when it is drawn
SHARPNESS = 16.0  # of the softmax over cosines
UNKNOWN = "fxemoji"  # the content judge learns from no drawing of this set
DEMO = [
    *((CONTENT_SET, subject) for subject in ("crown", "owl", "taxi")),
    *(("fluent-emoji-high-contrast", subject) for subject in ("umbrella", "cherry-blossom")),
    ("fluent-emoji", "balloon"),
]
TURNED = {"increasing", "decreasing", "waning", "waxing", "quarter", "left", "right"}  # other subjects when mirrored


def lines(x: Tensor) -> Tensor:
    """Darkness and edge strength (b 2 h w) of pictures: colours are not content."""
    dark = 1 - x.mean(1, keepdim=True)
    across, down = F.pad(x, (1, 1, 0, 0), "replicate"), F.pad(x, (0, 0, 1, 1), "replicate")
    across, down = across[..., 2:] - across[..., :-2], down[..., 2:, :] - down[..., :-2, :]
    return torch.cat([dark, (across**2 + down**2).amax(1, keepdim=True).clamp(min=1e-6).sqrt()], 1)


def colours(x: Tensor) -> Tensor:
    return x


def by_place(x: Tensor) -> Tensor:
    """b 16c: averages over a grid of 4 x 4 positions."""
    return F.adaptive_avg_pool2d(x, 4).flatten(1)


def anywhere(x: Tensor) -> Tensor:
    """b 2c: mean and standard deviation over the picture: positions are not style."""
    x = x.flatten(2)
    return torch.cat([x.mean(-1), x.std(-1)], 1)


class Kind(NamedTuple):
    """The architecture and training of one judge: its input, its layers, its pooling.

    side: of its input pictures, in pixels. window: the share of a side that each training image shows.
    """

    to_input: Callable[[Tensor], Tensor]
    channels: int  # of the input
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    pool: Callable[[Tensor], Tensor]
    pooled: int  # values for each channel
    features: int
    side: int
    window: float
    images: int
    batch: int
    rate: float


KINDS = {
    "content": Kind(
        lines, 2, (32, 64, 96, 128, 64), (2, 2, 1, 2, 1), by_place, 16, 112,
        side=SIDE // 2, window=1.0, images=150_000, batch=32, rate=3e-3,
    ),
    "style": Kind(
        colours, 3, (24, 48, 64, 96), (2, 2, 2, 2), anywhere, 2, 64,
        side=SIDE, window=0.75, images=90_000, batch=32, rate=3e-3,
    ),
}  # fmt: skip


class Judgement(NamedTuple):
    """logits: b names. features: b d, of length 1. maps: of each layer, b c h w."""

    logits: Tensor
    features: Tensor
    maps: list[Tensor]


class Judge(nn.Module):
    """Convolutions, and cosines between a picture's features and a direction for each name."""

    def __init__(self, kind: Kind, names: list[str]):
        super().__init__()
        self.names, self.kind = names, kind
        sizes = zip((kind.channels, *kind.widths), kind.widths, (5, 3, 3, 3, 3), kind.strides, strict=False)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, k, s, k // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, k, s in sizes
        )
        self.project = nn.Linear(kind.pooled * kind.widths[-1], kind.features)
        self.directions = nn.Parameter(torch.randn(len(names), kind.features))

    def forward(self, picture: Tensor) -> Judgement:
        """picture: b 3 h w, 0 to 1, square; made smaller where it is larger than the judge's side."""
        side = min(self.kind.side, picture.shape[-1])
        x, maps = self.kind.to_input(F.adaptive_avg_pool2d(picture, side)), []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        features = F.normalize(self.project(self.kind.pool(x.float())).float(), dim=1)
        return Judgement(SHARPNESS * features @ F.normalize(self.directions, dim=1).T, features, maps)


def load_judge(name: str) -> Judge:
    """The trained judge "content" or "style"."""
    file = FOLDER / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        judge = Judge(KINDS[name], json.loads(opened.metadata()["names"]))
    judge.load_state_dict(load_file(file))
    return judge.float().eval().requires_grad_(False)


class Drawings(NamedTuple):
    """pictures: n 256 256 3, uint8. labels: n of (set, subject)."""

    pictures: Tensor
    labels: list[tuple[str, str]]

    def batch(self, chosen) -> Tensor:
        """The drawings of these indices: b 3 h w, 0 to 1."""
        return rearrange(self.pictures[chosen], "n h w c -> n c h w").float() / 255


def render_everything(work: Path) -> Drawings:
    """Every subject in every set, cached in WORK."""
    import numpy as np

    from demo_model.recipe.drawings import TRAIN_SETS, EmojiSet, fetch_sets, subjects

    cache, labels = work / f"drawings_{DRAWN}.npy", work / f"drawings_{DRAWN}.json"
    if not labels.exists():
        names = list(dict.fromkeys([*TRAIN_SETS, *STYLE_SETS, "emojione-monotone"]))
        fetch_sets(work / "emoji", names)
        known, pictures, found = subjects(work / "emoji"), [], []
        for name in names:
            print(f"Rendering {name} ...", file=sys.stderr, flush=True)
            emoji = EmojiSet(work / "emoji", name)
            for subject in known:
                if (picture := emoji.render(subject, DRAWN)) is not None:
                    pictures.append(np.asarray(picture))
                    found.append((name, subject))
        np.save(cache, np.stack(pictures))
        labels.write_text(json.dumps(found))
    return Drawings(torch.from_numpy(np.load(cache)), [tuple(label) for label in json.loads(labels.read_text())])


def kept_from(name: str, drawings: Drawings) -> list[bool]:
    """Whether a judge is tested on a drawing, and does not learn from it: for each drawing."""
    always = {*TRUTHS, *DEMO}
    others = set(random.Random(0).sample(drawings.labels, len(drawings.labels) // 20))
    return [label in always | others or (name == "content" and label[0] == UNKNOWN) for label in drawings.labels]


def moved(x: Tensor, may_turn: Tensor, window: float) -> Tensor:
    """A random window of each picture, shifted, scaled and slightly rotated; half of those in may_turn (b) mirrored."""
    b = len(x)
    turn = torch.where(may_turn & (torch.rand(b) < 0.5), -1.0, 1.0)
    scale, angle = window * (1 + 0.1 * (2 * torch.rand(b) - 1)), 0.05 * torch.randn(b)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = (1.06 - window) * (2 * torch.rand(b, 2) - 1)
    rows = torch.stack([turn * cos, -sin, shift[:, 0], turn * sin, cos, shift[:, 1]], 1).view(b, 2, 3)
    grid = F.affine_grid(rows, [b, 3, *[round(window * x.shape[-1])] * 2], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def softened(x: Tensor) -> Tensor:
    """Blurred and noisy, up to the degree of the demo VAE's pictures."""
    for _ in range(2):
        x = x.lerp(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), torch.rand(len(x), 1, 1, 1) ** 2)
    return x + 0.04 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def recoloured(x: Tensor) -> Tensor:
    """Other hues and greys; black and white are unchanged."""
    mix = torch.randn(len(x), 3, 3) * 0.5 * torch.rand(len(x), 1, 1)
    mix = torch.eye(3) + mix - mix.mean(-1, keepdim=True)
    x = torch.einsum("boc,bchw->bohw", mix, x).clamp(0, 1)
    return x ** (0.3 * torch.randn(len(x), 1, 1, 1)).exp()


def train(name: str, drawings: Drawings) -> Judge:
    kind, kept = KINDS[name], kept_from(name, drawings)
    column = {"style": 0, "content": 1}[name]
    names = sorted({label[column] for label in drawings.labels})
    answers = torch.tensor([names.index(label[column]) for label in drawings.labels])
    may_turn = torch.tensor([not TURNED & set(subject.split("-")) for _, subject in drawings.labels])
    learned = torch.tensor(kept).logical_not().nonzero().flatten()
    torch.manual_seed(0)
    judge = Judge(kind, names).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), kind.rate, weight_decay=0.05)
    steps = kind.images // kind.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, kind.rate, steps, pct_start=0.15)
    for step in range(steps):
        chosen = learned[torch.randint(len(learned), (kind.batch,))]
        x = softened(moved(F.adaptive_avg_pool2d(drawings.batch(chosen), kind.side), may_turn[chosen], kind.window))
        x = (recoloured(x) if name == "content" else x).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(x).logits
        loss = F.cross_entropy(logits.float(), answers[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"{name}: step {step + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return judge.eval()


@torch.no_grad()
def accuracies(name: str, judge: Judge, drawings: Drawings) -> dict[str, float]:
    """Accuracies on drawings that the judge has not learned from, by group.

    For style the last is for drawings of the benchmark's own five sets, with only those five to choose from: other sets
    are nearly the same, such as the two in black and white.
    """
    kept = [i for i, is_kept in enumerate(kept_from(name, drawings)) if is_kept]
    column = {"style": 0, "content": 1}[name]
    groups = {"kept": [], "truths of the pairs": []} | ({f"all of {UNKNOWN}": []} if name == "content" else {})
    for chosen in torch.tensor(kept).split(256):
        answers = judge(drawings.batch(chosen)).logits.argmax(1).tolist()
        for i, answer in zip(chosen.tolist(), answers, strict=True):
            right, label = judge.names[answer] == drawings.labels[i][column], drawings.labels[i]
            group = "kept" if name == "style" or label[0] != UNKNOWN else f"all of {UNKNOWN}"
            groups[group].append(right)
            if label in TRUTHS:
                groups["truths of the pairs"].append(right)
    shares = {group: sum(right) / len(right) for group, right in groups.items()}
    if name == "content":
        return shares | {"truths nearest to their content image": nearest(judge, drawings)}
    ours = [judge.names.index(emoji) for emoji in (CONTENT_SET, *STYLE_SETS)]
    kept = [i for i in kept if judge.names.index(drawings.labels[i][0]) in ours]
    answers = judge(drawings.batch(kept)).logits[:, ours].argmax(1).tolist()
    right = [ours[answer] == judge.names.index(drawings.labels[i][0]) for i, answer in zip(kept, answers, strict=True)]
    return shares | {"among the benchmark's sets": sum(right) / len(right)}


def nearest(judge: Judge, drawings: Drawings) -> float:
    """The share of ground truths whose features are nearest to those of their own content image."""
    subjects, truths = sorted({subject for _, subject in TRUTHS}), sorted(TRUTHS)
    places = {label: i for i, label in enumerate(drawings.labels)}
    ours, contents = (
        judge(drawings.batch([places[label] for label in labels])).features
        for labels in (truths, [(CONTENT_SET, subject) for subject in subjects])
    )
    own = torch.tensor([subjects.index(subject) for _, subject in truths])
    return ((ours @ contents.T).argmax(1) == own).float().mean().item()


def save(name: str, judge: Judge, report: dict[str, float]) -> None:
    weights = {key: value.half() if value.is_floating_point() else value for key, value in judge.state_dict().items()}
    weights = {key: value.contiguous() for key, value in weights.items()}
    facts = {"format": "pt", "names": json.dumps(judge.names), "accuracy": json.dumps(report)}
    save_file(weights, FOLDER / f"{name}.safetensors", facts)


def main(work: Path) -> None:
    torch.set_flush_denormal(True)  # tiny averages otherwise slow a CPU down many times
    work.mkdir(parents=True, exist_ok=True)
    drawings = render_everything(work)
    for name in KINDS:
        judge = train(name, drawings)
        save(name, judge, accuracies(name, judge, drawings))
        report = accuracies(name, load_judge(name), drawings)
        print(f"{name}:", ", ".join(f"{group} {share:.1%}" for group, share in report.items()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python benchmarks/fidelity/judges.py WORK")
    main(Path(sys.argv[1]))
