"""What each step of a stage does: which loss, which learning rate, which roles learn."""

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from .roles import ROLES

PRESETS = PAPER, QUALITY, FAST, DRAFT = "paper", "quality", "fast", "draft"
LOSS_NAMES = NOISE, RECONSTRUCTION = "noise", "reconstruction"
OPTIMIZERS = ADAMW, MUON = "adamw", "muon"
MUON_RATE, MUON_STEPS = 3, 300  # times AdamW's learning rate, in so many steps
SHORTER = {FAST: 5, DRAFT: 16}  # by which these presets divide the steps
FASTER = 2  # times the learning rate of stage 2, in both


class Phase(NamedTuple):
    """Consecutive steps with one loss. fades: the learning rate falls linearly, to 0 at the end of the phase."""

    steps: int
    loss: str
    learning_rate: float
    fades: bool = False


@dataclass(frozen=True)
class Stage:
    """The settings of one training run. Raises ValueError that names the field, its value and what is allowed."""

    name: str
    learns: tuple[str, ...]
    phases: tuple[Phase, ...]
    rank: int = 64
    seed: int = 0
    noise_offset: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    optimizer: str = ADAMW

    def __post_init__(self):
        for steps, loss, rate, _ in self.phases:
            _check("steps", steps, _is_count(steps), "a whole number of at least 1")
            _check("loss", loss, loss in LOSS_NAMES, " or ".join(LOSS_NAMES))
            is_rate = _is_between(rate, 0, 1, open_below=True)
            _check("learning_rate", rate, is_rate, "a number above 0 and at most 1")
        is_seed = isinstance(self.seed, int) and 0 <= self.seed < 2**64
        are_betas = all(_is_between(beta, 0, 1) and beta < 1 for beta in self.betas)
        for name, is_allowed, what in [
            ("phases", len(self.phases) > 0, "at least one phase"),
            ("learns", self.learns and set(self.learns) <= set(ROLES), f"some of {ROLES}"),
            ("rank", _is_count(self.rank) and self.rank <= 1024, "a whole number from 1 to 1024"),
            ("seed", is_seed, "a whole number from 0 to 2^64 - 1"),
            ("noise_offset", _is_between(self.noise_offset, 0, 1), "a number from 0 to 1"),
            ("betas", are_betas, "two numbers from 0 to below 1"),
            ("eps", _is_between(self.eps, 0, 1, open_below=True), "a number above 0"),
            ("weight_decay", _is_between(self.weight_decay, 0, 1), "a number from 0 to 1"),
            ("optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
        ]:
            _check(name, getattr(self, name), is_allowed, what)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def facts(self) -> dict:
        """All settings as plain values: the same as in earlier versions, since the store names trainings by them."""
        settings = {name: value for name, value in asdict(self).items() if (name, value) != ("optimizer", ADAMW)}
        return settings | {"noises": 1, "max_grad_norm": None}  # which could be chosen once

    def at(self, step: int) -> tuple[str, float]:
        """Loss and learning rate of a step, counted from 0. Raises IndexError past the end."""
        for steps, loss, learning_rate, fades in self.phases:
            if step < steps:
                return loss, learning_rate * (1 - step / steps) if fades else learning_rate
            step -= steps
        raise IndexError("step is past the end of the stage")


def image_stage(
    steps: int = 1500,
    transition_step: int = 500,
    learning_rate: float = 2e-4,
    reconstruction_learning_rate: float = 1e-4,
    preset: str = PAPER,
    **settings,
) -> Stage:
    """Stage 1: content and style together, with the stepwise loss transition (arXiv 2503.10614, section 4.2).

    transition_step: the first step with the reconstruction loss; 0 is reconstruction loss only, `steps` noise loss only
    (B-LoRA). preset: see `with_preset`. settings: other fields of `Stage`. Raises ValueError as `Stage` does.
    """
    _check("steps", steps, _is_count(steps), "a whole number of at least 1")
    is_transition = isinstance(transition_step, int) and 0 <= transition_step <= steps
    _check("transition_step", transition_step, is_transition, f"a whole number from 0 to steps ({steps}): lower it")
    phases = (
        Phase(transition_step, NOISE, learning_rate),
        Phase(steps - transition_step, RECONSTRUCTION, reconstruction_learning_rate),
    )
    return with_preset(Stage("image", ROLES, tuple(phase for phase in phases if phase.steps), **settings), preset)


def style_stage(
    steps: int = 1000,
    reconstruction_learning_rate: float = 1e-4,
    noise_offset: float = 0.03,
    preset: str = PAPER,
    **settings,
) -> Stage:
    """Stage 2: a fresh style LoRA beside the frozen content LoRA of stage 1 (arXiv 2503.10614, section 4.2).

    preset: see `with_preset`. settings: other fields of `Stage`. Raises ValueError as `Stage` does.
    """
    phase = Phase(steps, RECONSTRUCTION, reconstruction_learning_rate)
    return with_preset(Stage("style", ("style",), (phase,), noise_offset=noise_offset, **settings), preset)


def with_preset(stage: Stage, name: str) -> Stage:
    """The stage with one of `PRESETS` applied; benchmarks/results/fidelity.md compares them.

    paper: unchanged. quality: the last phase's rate fades, and stage 1 learns by Muon, at `muon_rate` times the rates.
    fast, draft: quality with its steps divided by `SHORTER`; stage 2 at `FASTER` times its rate.
    """
    _check("preset", name, name in PRESETS, " or ".join(PRESETS))
    if name == PAPER:
        return stage
    *earlier, last = stage.phases
    stage = replace(stage, phases=(*earlier, last._replace(fades=True)))
    if name in SHORTER:
        shorter = (phase._replace(steps=math.ceil(phase.steps / SHORTER[name])) for phase in stage.phases)
        stage = replace(stage, phases=tuple(shorter))
    if stage.name == "image":
        return replace(with_rates(stage, muon_rate(stage.steps)), optimizer=MUON)
    return with_rates(stage, FASTER) if name in SHORTER else stage


def muon_rate(steps: int) -> float:
    """Times AdamW's learning rate; less in a longer stage.

    A step of Muon is as long as its rate, whatever the gradient, and random steps add up with the root of their number.
    """
    return MUON_RATE * math.sqrt(MUON_STEPS / steps)


def with_rates(stage: Stage, factor: float) -> Stage:
    """The stage with learning rates times a factor, and at most 1."""
    rates = (min(1.0, factor * phase.learning_rate) for phase in stage.phases)
    phases = (phase._replace(learning_rate=rate) for phase, rate in zip(stage.phases, rates, strict=True))
    return replace(stage, phases=tuple(phases))


def _check(field: str, value, is_allowed: bool, what: str) -> None:
    if not is_allowed:
        raise ValueError(f"{field} is {value!r}; it must be {what}.")


def _is_count(value) -> bool:
    return isinstance(value, int) and value >= 1


def _is_between(value, low: float, high: float, open_below: bool = False) -> bool:
    return isinstance(value, (int, float)) and low <= value <= high and not (open_below and value == low)
