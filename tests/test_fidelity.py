"""The benchmark's ground: a fair list of pairs, and judges that know real drawings which they have not learned from."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from images import loaded
from safetensors import safe_open

from benchmarks.fidelity.controls import palette_distance, stroke_distance, style_weight
from benchmarks.fidelity.faster import ByLoss
from benchmarks.fidelity.held_out import FP8, Fp8Products
from benchmarks.fidelity.judges import DEMO, KINDS, load_judge
from benchmarks.fidelity.pairs import ALIGNED_SETS, CONTENT_SET, PAIRS, SAME_STYLE, STYLE_SETS
from benchmarks.fidelity.report import CONTENDERS, EARLY, LATE, Bench
from benchmarks.fidelity.several import AVERAGES, merged_layer
from benchmarks.picture_scores import perceptual_distance
from consislora_core.lora_file import LoraLayer
from consislora_core.metrics import content_similarity, style_similarity
from consislora_core.schedule import image_stage, style_stage

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = (ROOT / "demo_model" / "recipe" / "held_out.txt").read_text().split()
PICTURES = ["crown-flat", "owl-flat", "taxi-flat", "umbrella-high-contrast", "cherry-blossom-high-contrast"]
PICTURES += ["balloon-3d"]


def subjects(pairs):
    return {subject for pair in pairs for _, subject in (pair.content, pair.style)}


# ---- pairs


def test_at_least_sixty_pairs_are_reported_and_none_twice():
    assert len(set(PAIRS["report"])) == len(PAIRS["report"]) >= 60


def test_only_subjects_that_the_demo_model_has_not_learned():
    assert all(subjects(pairs) <= set(HELD_OUT) for pairs in PAIRS.values())


def test_a_pair_has_two_subjects_from_two_sets():
    for pairs in PAIRS.values():
        assert all(pair.content[1] != pair.style[1] for pair in pairs)
        assert {pair.content[0] for pair in pairs} == {CONTENT_SET}
        assert {pair.style[0] for pair in pairs} == set(STYLE_SETS)


def test_every_content_image_meets_every_style_image():
    for pairs in PAIRS.values():
        contents, styles = zip(*pairs, strict=True)
        assert set(pairs) == set(itertools.product(contents, styles))


def test_splits_are_balanced_over_styles_as_is_every_beginning_of_one():
    for pairs in PAIRS.values():
        for n in range(1, len(pairs) + 1):
            counts = Counter(pair.style[0] for pair in pairs[:n])
            assert max(counts.values()) - min(counts[name] for name in STYLE_SETS) <= 1


def test_the_splits_share_no_subject_and_no_reported_one_is_the_demo_s_own():
    tuned, reported = subjects(PAIRS["tune"]), subjects(PAIRS["report"])
    assert not tuned & reported
    assert not reported & {subject for _, subject in DEMO}


def test_no_truth_is_a_style_image():
    everything = [pair for pairs in PAIRS.values() for pair in pairs]
    assert not {pair.truth for pair in everything} & {pair.style for pair in everything}


def test_several_style_images_are_one_set_s_own_and_show_no_truth():
    truths = {pair.truth for pair in PAIRS["report"]}
    assert [first for first, _ in SAME_STYLE] == list(STYLE_SETS)
    for first, drawings in SAME_STYLE.items():
        assert drawings[0] == first and len(set(drawings)) == 4
        assert {emoji for emoji, _ in drawings} == {first[0]} and not truths & set(drawings)


@pytest.mark.parametrize("way", AVERAGES)
def test_the_average_of_equal_changes_is_that_change_whatever_their_factors_are(way):
    down, up = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12.0).view(6, 2)
    layer = merged_layer([LoraLayer(down, up, 2.0), LoraLayer(-down, -2 * up, 1.0)], AVERAGES[way])
    torch.testing.assert_close(layer.up @ layer.down * layer.alpha / layer.rank, up @ down)


def test_aligned_signs_average_what_agrees():
    changes = torch.tensor([[[3.0, 1.0]], [[1.0, -4.0]]])
    assert AVERAGES["averaged, signs aligned"](changes).tolist() == [[2.0, -4.0]]


# ---- judges


@pytest.fixture(scope="module")
def pictures():
    return torch.cat([loaded(name) for name in PICTURES])


@pytest.fixture(scope="module", params=list(KINDS))
def judge(request):
    return request.param, load_judge(request.param)


def test_judges_name_the_demo_s_pictures_of_which_they_have_seen_none(judge, pictures):
    name, judge = judge
    among = judge.names if name == "content" else ["fluent-emoji-flat", *STYLE_SETS]
    logits = judge(pictures).logits[:, [judge.names.index(each) for each in among]]
    answers = [among[i] for i in logits.argmax(1)]
    assert answers == [label[{"style": 0, "content": 1}[name]] for label in DEMO]


def test_the_same_subject_recoloured_and_moved_is_nearer_than_any_other_subject(pictures):
    judge = load_judge("content")
    changed = F.pad(pictures, (6, 0, 6, 0), value=1.0)[..., :128, :128].flip(1)
    ours, theirs = judge(changed).features, judge(pictures).features
    likeness = torch.stack([content_similarity(ours, feature[None]) for feature in theirs], 1)  # changed, picture
    assert (likeness.argmax(1) == torch.arange(len(pictures))).all()


def test_on_average_the_same_set_is_nearer_than_another(pictures):
    judge, sets = load_judge("style"), [name for name, _ in DEMO]
    features = judge(pictures).features
    for i, name in enumerate(sets):
        same = [j for j, other in enumerate(sets) if other == name and j != i]
        others = [j for j, other in enumerate(sets) if other != name]
        if same:
            own, foreign = (style_similarity(features[[i]], features[some]) for some in (same, others))
            assert own > foreign + 0.1


def test_perceptual_distance_grows_with_what_is_done_to_a_picture(judge, pictures):
    _, judge = judge
    truth = judge(pictures).maps
    blurred, other = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False), pictures.roll(1, 0)
    same, near, far = (perceptual_distance(judge(some).maps, truth) for some in (pictures, blurred, other))
    assert same.max() < 1e-6
    assert (near > same).all() and (far > near).all()


def test_judges_are_small_and_say_how_often_they_are_right(judge):
    name, judge = judge
    file = ROOT / "benchmarks" / "fidelity" / f"{name}.safetensors"
    assert file.stat().st_size < 1_000_000
    with safe_open(file, "pt") as opened:
        accuracy = json.loads(opened.metadata()["accuracy"])
    least = {
        "content": {"kept": 0.65, "truths nearest to their content image": 0.9},  # of 739 subjects
        "style": {"kept": 0.8, "among the benchmark's sets": 0.9},  # of 11 sets, of 5
    }
    assert all(accuracy[group] > share for group, share in least[name].items())
    known = {label[{"style": 0, "content": 1}[name]] for label in DEMO}
    assert known <= set(judge.names)


# ---- the report


def test_an_interval_is_over_the_images_that_pairs_share():
    bench = Bench(None, PAIRS["report"], scale=1.0, seeds=1)
    values = torch.linspace(0, 1, len(bench.styles))
    found = bench.estimate(values.repeat(len(bench.contents)))  # depends on the style image alone
    alone = values.std(unbiased=False).item() / len(values) ** 0.5
    assert found.mean == pytest.approx(0.5)
    assert found.high - found.low == pytest.approx(2 * 1.96 * alone, rel=0.05)


@pytest.mark.parametrize(
    ("name", "preset"), [("c", "paper"), ("quality", "quality"), ("fast", "fast"), ("draft", "draft")]
)
def test_these_contenders_train_as_the_nodes_do(name, preset):
    bench = Bench(None, PAIRS["report"], scale=1.0, seeds=1)
    image, style = bench.stages(CONTENDERS[name].recipe)
    assert image == image_stage(learning_rate=EARLY, reconstruction_learning_rate=LATE, preset=preset)
    assert style == style_stage(reconstruction_learning_rate=LATE, preset=preset)


def test_a_score_that_only_some_pairs_have_is_the_mean_over_those():
    bench = Bench(None, PAIRS["report"], scale=1.0, seeds=1)
    aligned = torch.tensor([pair.style[0] in ALIGNED_SETS for pair in bench.pairs])
    assert bench.estimate(torch.where(aligned, 0.25, torch.nan)) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("steepness", [0.0, 4.0])
@pytest.mark.parametrize("style_scale", [-1.0, 0.4])
def test_a_style_strength_over_the_noise_level_is_monotone_and_keeps_its_mean(style_scale, steepness):
    sigmas = torch.tensor([14.6, 9.0, 5.0, 1.2, 0.4, 0.03, 0.0])
    weights = torch.tensor([style_weight(sigma, sigmas, style_scale, steepness) for sigma in sigmas[:-1]])
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert weights[[0, -1]].tolist() == pytest.approx([1 - style_scale, 1 + style_scale])
    assert (style_scale * weights.diff() > 0).all()
    between = style_weight(torch.tensor(7.0), sigmas, style_scale, steepness)
    assert min(weights[1:3]) < between < max(weights[1:3])


def test_palette_is_colour_without_place_and_strokes_are_lines_without_colour():
    picture = loaded("crown-flat")[0] * 0.8
    mirrored, lighter = picture.flip(-1), picture + 0.2
    assert palette_distance(picture, mirrored) < 1e-3 < palette_distance(picture, lighter)
    assert stroke_distance(picture, lighter) < 1e-3 < stroke_distance(picture, 0 * picture)


# ---- ways to train faster


def test_noise_levels_with_larger_losses_come_more_often_and_weigh_as_much_less(host):
    """So that gradients have the same mean: on average a span of levels weighs as much as any other."""
    stage = image_stage(steps=160, transition_step=0, reconstruction_learning_rate=1e-9, rank=2)
    weights = torch.zeros(ByLoss.SPANS, 160)
    with ByLoss(*host, stage) as trainer:
        for i in range(160):
            trainer.drawn = trainer._draw()
            weights[trainer.span, i] = trainer.importance
            next(iter(trainer))
        shares = trainer._shares("reconstruction")
    counts = (weights[:, 60:] > 0).sum(1)
    assert counts[shares.argmax()] > 2 * counts[shares.argmin()]
    assert shares.argmax() > shares.argmin()  # in high noise
    assert weights.sum(1)[-5:].sum() == pytest.approx(80, rel=0.3)


def test_products_with_the_named_layers_are_those_of_fp8_and_no_others_are():
    named, other = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Fp8Products([named]):
        rounded, exact = named(x), other(x)
    assert torch.equal(exact, other(x))
    assert 0 < (rounded - named(x)).norm() / named(x).norm() < torch.finfo(FP8).eps
