"""A stage says what each step does, and refuses settings it cannot mean."""

import math
from dataclasses import replace

import pytest

from consislora_core.schedule import (
    ADAMW,
    FASTER,
    MUON,
    NOISE,
    PRESETS,
    RECONSTRUCTION,
    Phase,
    Stage,
    image_stage,
    style_stage,
)


def test_the_image_stage_is_the_papers():
    stage = image_stage()
    assert stage.phases == (Phase(500, NOISE, 2e-4), Phase(1000, RECONSTRUCTION, 1e-4))
    assert (stage.learns, stage.rank, stage.noise_offset) == (("content", "style"), 64, 0.0)
    assert (stage.betas, stage.eps, stage.weight_decay) == ((0.9, 0.999), 1e-8, 1e-4)


def test_the_style_stage_is_the_papers():
    stage = style_stage()
    assert stage.phases == (Phase(1000, RECONSTRUCTION, 1e-4),)
    assert (stage.learns, stage.noise_offset) == (("style",), 0.03)


def test_loss_and_learning_rate_change_at_the_transition_step():
    stage = image_stage(steps=5, transition_step=2)
    assert [stage.at(step)[0] for step in range(5)] == [NOISE] * 2 + [RECONSTRUCTION] * 3


@pytest.mark.parametrize("make", [image_stage, style_stage])
def test_unless_another_is_chosen_the_schedule_stays_as_set(make):
    assert make(preset="paper") == make()


@pytest.mark.parametrize("steps", [1500, 6000])
def test_quality_has_the_last_rate_fade_and_stage_1_learn_by_muon_and_changes_nothing_else(steps):
    for make, optimizer, rate in ((image_stage, MUON, 3 / math.sqrt(steps / 300)), (style_stage, ADAMW, 1)):
        given = make(steps=steps)
        *earlier, last = given.phases
        phases = (*earlier, last._replace(fades=True))
        faster = tuple(phase._replace(learning_rate=rate * phase.learning_rate) for phase in phases)
        assert make(steps=steps, preset="quality") == replace(given, phases=faster, optimizer=optimizer)


@pytest.mark.parametrize(
    ("preset", "steps", "transition_step", "stage_2"), [("fast", 300, 100, 200), ("draft", 95, 32, 63)]
)
def test_the_short_presets_are_quality_in_fewer_steps(preset, steps, transition_step, stage_2):
    assert image_stage(preset=preset) == image_stage(steps, transition_step, preset="quality")
    assert style_stage(preset=preset) == style_stage(stage_2, FASTER * 1e-4, preset="quality")


def test_the_store_knows_a_stage_by_the_facts_of_earlier_versions():
    facts = dict(name="image", learns=("content", "style"), phases=image_stage().phases, rank=64, seed=0)
    facts |= dict(noise_offset=0.0, noises=1, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, max_grad_norm=None)
    assert image_stage().facts() == facts
    assert image_stage(preset="quality").facts()["optimizer"] == MUON


@pytest.mark.parametrize("preset", PRESETS)
def test_the_furthest_values_that_the_nodes_offer_are_taken(preset):
    for steps in (1, 100_000):
        image_stage(steps, steps, 1.0, 1e-7, preset, rank=1024, seed=2**64 - 1)
        image_stage(steps, 0, 1e-7, 1.0, preset, rank=1)
        style_stage(steps, 1.0, 1.0, preset)


def test_a_rate_that_fades_falls_in_a_line_in_its_own_phase_alone():
    stage = Stage("image", ("style",), (Phase(2, NOISE, 0.2), Phase(4, RECONSTRUCTION, 0.4, fades=True)))
    assert [stage.at(step)[1] for step in range(6)] == pytest.approx([0.2, 0.2, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(("transition_step", "loss"), [(0, RECONSTRUCTION), (4, NOISE)])
def test_a_transition_at_either_end_leaves_one_loss(transition_step, loss):
    assert [phase.loss for phase in image_stage(steps=4, transition_step=transition_step).phases] == [loss]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number of at least 1"),
        (
            {"steps": 10, "transition_step": 11},
            r"transition_step is 11; it must be a whole number from 0 to steps \(10\)",
        ),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a number above 0"),
        ({"reconstruction_learning_rate": math.nan}, "learning_rate is nan"),
        ({"preset": "best"}, "preset is 'best'; it must be paper or quality or fast"),
        ({"rank": 0}, "rank is 0; it must be a whole number from 1 to 1024"),
        ({"seed": -1}, "seed is -1"),
        ({"noise_offset": -0.1}, "noise_offset is -0.1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": 2.0}, "weight_decay is 2.0"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be adamw or muon"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(settings, words):
    with pytest.raises(ValueError, match=words):
        image_stage(**settings)


def test_a_stage_needs_phases_and_known_roles():
    with pytest.raises(ValueError, match="phases"):
        Stage("image", ("content",), ())
    with pytest.raises(ValueError, match="learns is .'colour'"):
        Stage("image", ("colour",), (Phase(1, NOISE, 1e-4),))
    with pytest.raises(ValueError, match="loss is 'l1'; it must be noise or reconstruction"):
        Stage("image", ("content",), (Phase(1, "l1", 1e-4),))
