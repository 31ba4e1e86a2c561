"""Evaluate and Gate: scores rank what they should, with a network or none, and each side goes its own way."""

import json
import re

import pytest
import torch
from images import IMAGES, loaded
from PIL import Image

from batch.comfy_client import WorkflowError
from benchmarks.tiny_vision import CONFIGS, tiny_encoder


@pytest.fixture
def nodes(pack):
    return pack.nodes.evaluate


def image(name: str):
    """1 128 128 3"""
    return loaded(name).movedim(1, -1)


def images(*names: str):
    return torch.cat([image(name) for name in names])


@pytest.fixture
def owls(nodes):
    """A crown and two owls, one of them in other colours, scored against an owl."""
    pictures = torch.cat([images("crown-flat", "owl-flat"), image("owl-flat").flip(-1)])
    return pictures, nodes.score_pictures(pictures, image("owl-flat"), image("crown-flat"))


def test_without_a_network_shapes_are_scored(owls):
    _, (crown, owl, recoloured) = owls
    assert owl == {"edges": pytest.approx(1), "silhouette": pytest.approx(1)}
    assert recoloured["edges"] == pytest.approx(1)
    assert max(crown.values()) < 0.9


def test_a_picture_and_its_enlargement_have_the_same_scores(nodes):
    crown, owl = image("crown-flat"), image("owl-flat")
    large = torch.nn.functional.interpolate(crown.movedim(-1, 1), scale_factor=8).movedim(1, -1)
    (small_scores,), (large_scores,) = (nodes.score_pictures(picture, owl, crown) for picture in (crown, large))
    assert large_scores == pytest.approx(small_scores, abs=1e-4)


def test_pictures_of_another_shape_and_with_alpha_are_compared_at_the_middle(nodes):
    wide = torch.ones(1, 128, 256, 4)
    wide[:, :, 64:192, :3] = image("owl-flat")
    (score,) = nodes.score_pictures(image("owl-flat"), wide, image("crown-flat"))
    assert score["edges"] > 0.99


def test_a_grey_picture_is_scored_as_the_same_in_three_channels(nodes):
    grey, owl, crown = (image(name).mean(-1, keepdim=True) for name in ("taxi-flat", "owl-flat", "crown-flat"))
    coloured = [picture.expand(-1, -1, -1, 3) for picture in (grey, owl, crown)]
    scores, cards, _ = nodes.Evaluate.execute(grey, owl, crown).result
    assert scores == nodes.Evaluate.execute(*coloured).result[0]
    assert torch.equal(cards, nodes.Evaluate.execute(*coloured).result[1])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 500), (700, 9)])
def test_the_smallest_pictures_are_scored_and_smaller_ones_refused_by_name(nodes, height, width):
    picture = torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0))
    (score,) = nodes.Evaluate.execute(picture, picture, picture).result[0]
    assert list(score.values()) == pytest.approx([1, 1])
    with pytest.raises(ValueError, match="images is 7 x 8 pixels; at least 8 x 8 are needed"):
        nodes.Evaluate.execute(picture[:, :8, :7], picture, picture)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_network_adds_content_style_and_leakage(nodes, kind):
    owl, crown = image("owl-flat"), image("crown-flat")
    scores = nodes.score_pictures(torch.cat([owl, crown]), owl, crown, tiny_encoder(kind))
    assert [list(score) for score in scores] == 2 * [["content", "style", "leakage", "edges", "silhouette"]]
    assert [scores[0]["content"], scores[1]["style"]] == pytest.approx([1, 1], abs=1e-4)
    assert [score["leakage"] for score in scores] == pytest.approx([0, 1], abs=1e-2)
    assert scores[0]["style"] == pytest.approx(scores[1]["content"], abs=1e-4)
    assert scores[0]["style"] < 0.9999


def test_the_report_holds_every_score_and_the_mean(nodes, owls):
    _, scores = owls
    report = json.loads(nodes.report_text(scores))
    assert report["pictures"][1] == {"edges": 1.0, "silhouette": 1.0}
    assert report["mean"]["edges"] == pytest.approx(sum(score["edges"] for score in scores) / 3, abs=1e-3)


def test_a_score_beyond_0_and_1_is_drawn_as_they_are(pack):
    def bar(score):
        card = pack.host.drawing.draw_card({"picture": Image.new("RGB", (8, 8))}, {"leakage": score})
        return card.crop((140, card.height - 60, card.width - 70, card.height)).tobytes()  # without the number

    assert bar(-0.4) == bar(0.0) != bar(0.5) != bar(1.0) == bar(1.3)


def gate(nodes, pictures, scores, **bounds):
    everything = {name: all_keep for name, (_, all_keep) in (nodes.LEAST | nodes.MOST).items()}
    return nodes.Gate.execute(pictures, scores, **{**everything, **bounds}).result


def test_the_gate_splits_pictures_and_says_why(nodes, owls):
    pictures, scores = owls
    accepted, rejected, reasons = gate(nodes, pictures, scores, min_edges=0.9, min_silhouette=0.9)
    assert torch.equal(accepted, pictures[1:]) and torch.equal(rejected, pictures[:1])
    first, *others = reasons.splitlines()
    assert re.fullmatch(r"1: edges 0\.\d\d is below 0\.9; silhouette 0\.\d\d is below 0\.9", first)
    assert others == ["2: accepted", "3: accepted"]


def test_leakage_is_bounded_from_above(nodes):
    scores = [{"leakage": 0.3, "edges": 0.0}, {"leakage": 0.5, "edges": 0.0}]
    accepted, rejected, reasons = gate(nodes, torch.rand(2, 8, 8, 3), scores, max_leakage=0.3)
    assert (len(accepted), len(rejected)) == (1, 1)
    assert reasons.splitlines()[1] == "2: leakage 0.50 is above 0.3"


def test_what_is_not_a_number_never_passes_whatever_the_bounds(nodes):
    pictures = torch.rand(4, 8, 8, 3)
    pictures[1, 0, 0, 0] = float("nan")
    scores = [{"edges": edges} for edges in (0.5, 0.5, float("nan"), float("inf"))]
    for bounds in ({}, {"min_edges": 0.5}):
        accepted, rejected, reasons = gate(nodes, pictures, scores, **bounds)
        assert torch.equal(accepted, pictures[:1]) and len(rejected) == 3
        assert reasons.splitlines() == [
            "1: accepted",
            "2: the picture holds values that are not numbers",
            "3: edges is nan",
            "4: edges is inf",
        ]


def test_bounds_that_nothing_was_scored_for_are_named(nodes, owls):
    with pytest.raises(ValueError, match="^min_content and max_leakage cannot.*Connect clip_vision.*max_leakage to 1,"):
        gate(nodes, *owls, min_content=0.5, max_leakage=0.2)


def test_scores_of_other_pictures_are_refused(nodes, owls):
    pictures, scores = owls
    with pytest.raises(ValueError, match="images holds 2 pictures, but scores are for 3"):
        gate(nodes, pictures[:2], scores)


@pytest.mark.parametrize("scores", [[], [None], [{"edges": "high"}]], ids=["none", "nothing", "words"])
def test_what_evaluate_does_not_give_is_refused_in_words(nodes, scores):
    with pytest.raises(ValueError, match="scores are not what Evaluate gives"):
        gate(nodes, torch.rand(len(scores), 8, 8, 3), scores)


# ---- in the server


def judging(server, *names: str, **bounds) -> dict:
    """Scores pictures against the flat owl, parts them, and saves each side."""
    for name in {*names, "owl-flat", "crown-flat"}:
        server.upload(IMAGES / f"{name}.png")
    prompt = {name: {"class_type": "LoadImage", "inputs": {"image": f"{name}.png"}} for name in {*names, "owl-flat"}}
    prompt |= {"style": {"class_type": "LoadImage", "inputs": {"image": "crown-flat.png"}}}
    batch = [names[0], 0]
    for i, name in enumerate(names[1:]):
        inputs = {"image1": batch, "image2": [name, 0]}
        prompt[f"batch {i}"] = {"class_type": "ImageBatch", "inputs": inputs}
        batch = [f"batch {i}", 0]
    everything = {"min_content": -1, "min_style": -1, "max_leakage": 1, "min_edges": 0, "min_silhouette": 0}
    evaluate = {"images": batch, "content_image": ["owl-flat", 0], "style_image": ["style", 0]}
    prompt["scores"] = {"class_type": "ConsisLoRAEvaluate", "inputs": evaluate}
    inputs = {"images": batch, "scores": ["scores", 0], **everything, **bounds}
    prompt["gate"] = {"class_type": "ConsisLoRAGate", "inputs": inputs}
    for i, side in enumerate(["accepted", "rejected"]):
        inputs = {"images": ["gate", i], "filename_prefix": side}
        prompt[side] = {"class_type": "SaveImage", "inputs": inputs}
    prompt["reasons"] = {"class_type": "PreviewAny", "inputs": {"source": ["gate", 2]}}
    return prompt


def sides(entry: dict) -> dict[str, int]:
    return {
        side: len(entry["outputs"][side]["images"]) for side in ("accepted", "rejected") if side in entry["outputs"]
    }


def test_both_sides_are_saved_and_the_card_is_shown(server):
    entry = server.run(judging(server, "owl-flat", "crown-flat", "taxi-flat", min_edges=0.9))
    assert sides(entry) == {"accepted": 1, "rejected": 2}
    assert "3: edges" in entry["outputs"]["reasons"]["text"][0]
    shown = [server.base / "temp" / card["filename"] for card in entry["outputs"]["scores"]["images"]]
    assert len(shown) == 3
    with Image.open(shown[0]) as card:
        assert card.width > 2 * card.height


@pytest.mark.parametrize(("least", "side"), [(0.0, "accepted"), (1.0, "rejected")])
def test_what_follows_an_empty_side_is_left_out_and_nothing_fails(server, least, side):
    entry = server.run(judging(server, "crown-flat", "taxi-flat", min_silhouette=least))
    assert sides(entry) == {side: 2}
    assert entry["status"]["status_str"] == "success"


def test_the_server_shows_what_a_bound_lacks(server):
    with pytest.raises(WorkflowError, match="ConsisLoRAGate .*min_style cannot be checked.*Connect clip_vision"):
        server.run(judging(server, "crown-flat", min_style=0.3))
