"""The benchmark's pairs: what is drawn, in whose look, and where the right answer is.

All things are among those that the demo model has not learned (`demo/recipe/held_out.txt`), all style sets too. Chosen
at random, among content things that both sets draw alike: in the aligned sets with silhouettes that overlap by 0.85 or
more, in the others, by eye, as much the same object. No pair has two faces. `tune` and `report`
share no thing, and any beginning of either is balanced over the styles.
"""

import csv
from pathlib import Path
from typing import NamedTuple

STYLE_SETS = ("fluent-emoji", "fluent-emoji-high-contrast", "openmoji", "streamline-emojis")
ALIGNED_SETS = STYLE_SETS[:2]  # drawn on the same outlines as the content images' set


class Pair(NamedTuple):
    content_thing: str
    content_set: str
    style_thing: str
    style_set: str
    split: str  # "tune" or "report"

    @property
    def content(self) -> tuple[str, str]:
        return self.content_set, self.content_thing

    @property
    def style(self) -> tuple[str, str]:
        return self.style_set, self.style_thing

    @property
    def truth(self) -> tuple[str, str]:
        """The drawing of the content image's thing by whoever drew the style image."""
        return self.style_set, self.content_thing


def read_pairs() -> list[Pair]:
    with Path(__file__).with_name("pairs.csv").open(newline="", encoding="utf-8") as file:
        return [Pair(**row) for row in csv.DictReader(file)]
