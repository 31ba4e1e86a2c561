"""The benchmark's pairs: which subject is drawn in which style, and its ground truth.

The demo model has learned none of the subjects (`demo_model/recipe/held_out.txt`) and none of the style sets. In each
split every content image is paired with every style image, so that each image is trained on once. Content subjects are
those that all sets draw alike: in the aligned sets with silhouettes that overlap by 0.75 or more, in the others, by
eye, as much the same object. No pair has two faces. `tune` and `report` share no subject, and any first pairs of either
are balanced over the styles. Nothing was ever chosen by pictures of `report`; those of `tune` were used often.
"""

from itertools import product
from typing import NamedTuple

CONTENT_SET = "fluent-emoji-flat"
STYLE_SETS = ("fluent-emoji", "fluent-emoji-high-contrast", "openmoji", "streamline-emojis")
ALIGNED_SETS = STYLE_SETS[:2]  # drawn on the same outlines as the content images' set

Drawing = tuple[str, str]  # set, subject


class Pair(NamedTuple):
    content: Drawing
    style: Drawing

    @property
    def truth(self) -> Drawing:
        """The ground truth: the content image's subject, drawn in the style image's set."""
        return self.style[0], self.content[1]


def crossed(contents: str, styles: str) -> list[Pair]:
    """Every content subject with every style subject; the latter are drawn in STYLE_SETS in turn."""
    drawings = [(STYLE_SETS[i % len(STYLE_SETS)], subject) for i, subject in enumerate(styles.split())]
    return [Pair((CONTENT_SET, subject), style) for subject, style in product(contents.split(), drawings)]


PAIRS = {
    "tune": crossed(
        "airplane cocktail-glass ox hourglass-done office-building kimono growing-heart face-with-rolling-eyes",
        "hatching-chick popcorn hot-pepper spouting-whale meat-on-bone violin microscope water-wave",
    ),
    "report": crossed(
        "minibus nut-and-bolt hear-no-evil-monkey green-book chestnut factory "
        "necktie delivery-truck nerd-face computer-disk confetti-ball zzz",
        "penguin taco kick-scooter herb volcano squid green-salad love-hotel drum motor-scooter lollipop electric-plug",
    ),
}

# For style parts from several drawings: of each set its first style image in `report`, its second, and two others.
SAME_STYLE = {}
for emoji in STYLE_SETS:
    first, second, *_ = dict.fromkeys(style for _, style in PAIRS["report"] if style[0] == emoji)
    SAME_STYLE[first] = [first, second, (emoji, "crocodile"), (emoji, "taxi")]
