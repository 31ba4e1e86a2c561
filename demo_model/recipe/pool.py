"""What the demo model learns from: drawings as they are and repainted, with prompts, and later their latents."""

import random
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from recipe import painter, texts
from recipe.drawings import Drawing, emoji_drawings, icon_drawings, on_all_cores, render_all
from recipe.painter import Style
from torch import Tensor

PROMPTS = 3  # alternatives for each picture
HELD_OUT_SHOWN = 20  # drawings of subjects not learned, on the sheet of restored ones
AS_DRAWN = 0.35  # the share of the emoji sets' own drawings in training; the rest is repainted


class Entry(NamedTuple):
    """One picture: a drawing by its number, mirrored or not, turned and stretched or not, in a style."""

    drawing: int
    mirrored: bool
    moved: bool
    style: Style


def list_entries(drawings: list[Drawing], count: int) -> list[Entry]:
    """Each emoji drawing as it is, twice, and `count` repainted: the same list at every call."""
    rng = random.Random(0)
    emoji = [i for i, drawing in enumerate(drawings) if drawing.kind == "emoji"]
    icons = [i for i, drawing in enumerate(drawings) if drawing.kind != "emoji"] or emoji
    as_drawn = [
        Entry(i, mirrored, False, Style(texts.words(drawings[i].set), "as drawn"))
        for i in emoji
        for mirrored in (False, True)
    ]
    repainted = []
    for _ in range(count):
        i = rng.choice(emoji if rng.random() < 0.55 else icons)
        repainted.append(Entry(i, rng.random() < 0.5, rng.random() < 0.6, painter.draw_style(rng, drawings[i].kind)))
    return as_drawn + repainted


def prompts_of(drawings: list[Drawing], entries: list[Entry], number: int) -> list[tuple[str, str, str]]:
    """PROMPTS triples for entry `number`: what the content block, the style block and the rest read."""
    rng, entry = random.Random(number), entries[number]
    subject = drawings[entry.drawing].subject
    own_colours = entry.style.fill in ("own", "as drawn")
    triples = []
    for _ in range(PROMPTS):
        other = rng.choice(entries)
        elsewhere = drawings[other.drawing].subject, other.style.words
        triples.append(texts.captions(subject, entry.style.words, own_colours, elsewhere, rng))
    return triples


class _Tokens:
    def __init__(self, drawings: list[Drawing], entries: list[Entry]):
        self.reader, self.prompts = texts.Reader(), partial(prompts_of, drawings, entries)

    def __call__(self, number: int) -> np.ndarray:
        return np.array([[self.reader.tokens(text) for text in triple] for triple in self.prompts(number)], np.int16)


class Size(NamedTuple):
    """subjects: emoji, each in every set. icons: of each set. repainted: pictures beside the drawings as they are."""

    subjects: int
    icons: int
    repainted: int

    def drawings(self, folder: Path) -> list[Drawing]:
        return emoji_drawings(folder, self.subjects) + icon_drawings(folder, self.icons)


def prepare(work: Path, size: Size, processes: int) -> None:
    """Renders the drawings and reads the prompts, on all cores: files in WORK that `Pool` opens."""
    drawings = size.drawings(work / "emoji")
    if not (work / "held_out.npy").exists():
        held_out = random.Random(0).sample(emoji_drawings(work / "emoji", 10**6, held_out=True), HELD_OUT_SHOWN)
        np.save(work / "held_out.npy", render_all(work / "emoji", held_out, texts.demo.SIZE, processes)[0])
    if not (work / "rgba.npy").exists():
        rgba, tones = render_all(work / "emoji", drawings, texts.demo.SIZE, processes)
        np.save(work / "tones.npy", tones)
        np.save(work / "unfinished.npy", rgba)
        (work / "unfinished.npy").rename(work / "rgba.npy")
    if not (work / "tokens.npy").exists():
        entries = list_entries(drawings, size.repainted)
        tokens = on_all_cores(partial(_Tokens, drawings, entries), range(len(entries)), processes)
        np.save(work / "unfinished.npy", np.stack(tokens))
        (work / "unfinished.npy").rename(work / "tokens.npy")


def sample_texts(drawings: list[Drawing], count: int) -> list[str]:
    """Prompts for the tokenizer to learn from."""
    entries = list_entries(drawings, count)
    return [text for i in range(len(entries)) for triple in prompts_of(drawings, entries, i) for text in triple]


class Pool:
    """Pictures of entries, painted when asked for; `weights` are the shares in which to show them."""

    def __init__(self, work: Path, size: Size, device: str):
        self.drawings = size.drawings(work / "emoji")
        self.entries = list_entries(self.drawings, size.repainted)
        self.rgba = torch.from_numpy(np.load(work / "rgba.npy", mmap_mode="c")).to(device)
        self.tones = torch.from_numpy(np.load(work / "tones.npy")).to(device)
        self.tokens = torch.from_numpy(np.load(work / "tokens.npy")).to(device)  # entries prompts 3 tokens
        rgba = torch.from_numpy(np.load(work / "held_out.npy")).to(device) / 255
        self.held_out = (rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]) * 2 - 1  # never learned from; n 3 h w, -1 to 1
        self.device = device
        familiar = [1 if "-" in self.drawings[entry.drawing].subject else 2 for entry in self.entries]
        weights = torch.tensor(familiar, dtype=torch.float32)
        drawn = torch.tensor([entry.style.fill == "as drawn" for entry in self.entries])
        weights[drawn] *= AS_DRAWN / weights[drawn].sum()
        weights[~drawn] *= (1 - AS_DRAWN) / weights[~drawn].sum()
        self.weights = weights

    def __len__(self) -> int:
        return len(self.entries)

    def draw(self, batch: int) -> Tensor:
        """Numbers of entries, by their weights; on the CPU, so that none waits for the GPU."""
        return torch.multinomial(self.weights, batch, replacement=True)

    def pictures(self, numbers: list[int]) -> Tensor:
        """b 3 h w, -1 to 1."""
        entries = [self.entries[number] for number in numbers]
        chosen = torch.tensor([entry.drawing for entry in entries], device=self.device)
        rgba = self.rgba[chosen].float() / 255
        mirrored, moved = (
            torch.tensor([getattr(entry, name) for entry in entries], device=self.device).view(-1, 1, 1, 1)
            for name in ("mirrored", "moved")
        )
        rgba = torch.where(mirrored, rgba.flip(-1), rgba)
        turned = painter.moved(rgba, torch.Generator().manual_seed(numbers[0]))
        styles = [entry.style for entry in entries]
        return painter.paint(torch.where(moved, turned, rgba), self.tones[chosen], styles) * 2 - 1
