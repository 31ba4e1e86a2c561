"""Each score is best for the picture itself and moves with what it is named after, and with nothing else."""

import pytest
import torch
import torch.nn.functional as F
from images import IMAGES, loaded

from benchmarks.picture_scores import perceptual_distance, ssim, style_distance
from consislora_core.metrics import (
    content_score,
    content_similarity,
    feature_scores,
    leakage,
    silhouette_overlap,
    style_similarity,
)


@pytest.fixture(scope="module")
def pictures():
    return torch.cat([loaded(path.stem) for path in sorted(IMAGES.glob("*.png"))])


def shifted(picture, pixels):
    return F.pad(picture, (pixels, 0, 0, 0), value=1.0)[..., : picture.shape[-1]]


def square(top, left, side, ink=(0.0, 0.0, 0.0), paper=(1.0, 1.0, 1.0), hollow=False):
    picture = torch.tensor(paper).view(1, 3, 1, 1).repeat(1, 1, 64, 64)
    picture[..., top : top + side, left : left + side] = torch.tensor(ink).view(3, 1, 1)
    if hollow:
        picture[..., top + 2 : top + side - 2, left + 2 : left + side - 2] = torch.tensor(paper).view(3, 1, 1)
    return picture


def falls(scores):
    return bool((torch.cat(scores).diff() < 0).all())


def every_pair(score, pictures):
    return torch.stack([score(pictures, picture[None]) for picture in pictures])


# ---- pictures


@pytest.mark.parametrize("score", [content_score, ssim, silhouette_overlap])
def test_a_picture_is_most_like_itself(score, pictures):
    scores = every_pair(score, pictures)
    others = scores - 2 * torch.eye(len(pictures))
    torch.testing.assert_close(scores.diagonal(), torch.ones(len(pictures)))
    assert others.max() < 0.95


@pytest.mark.parametrize("score", [content_score, ssim, silhouette_overlap])
def test_a_score_does_not_depend_on_the_rest_of_the_batch(score, pictures):
    alone = torch.cat([score(picture[None], pictures[:1]) for picture in pictures])
    torch.testing.assert_close(score(pictures, pictures[:1]), alone)


def test_content_falls_as_the_subject_moves_and_further_when_it_is_another():
    owl, crown = loaded("owl-flat"), loaded("crown-flat")
    scores = [content_score(shifted(owl, pixels), owl) for pixels in (0, 1, 2, 4, 8)]
    assert falls(scores) and scores[1] > 0.9
    assert content_score(crown, owl) < scores[3]


def test_content_does_not_see_a_recolouring(pictures):
    for recoloured in (pictures.flip(1), 1 - pictures, pictures[:, [1, 2, 0]]):
        scores = torch.cat([content_score(a[None], b[None]) for a, b in zip(recoloured, pictures, strict=True)])
        torch.testing.assert_close(scores, torch.ones(len(pictures)))


def test_style_sees_a_recolouring_far_more_than_a_shift():
    owl = loaded("owl-flat")
    assert style_distance(owl, owl).item() == 0
    assert style_distance(shifted(owl, 4), owl) < 0.2 * style_distance(owl.flip(1), owl)


def test_the_same_style_in_another_size_is_near():
    owl = loaded("owl-flat")
    assert style_distance(F.avg_pool2d(owl, 2), owl) < 0.5 * style_distance(loaded("umbrella-high-contrast"), owl)


def test_ssim_is_that_of_a_published_implementation():
    y, x = torch.meshgrid(torch.arange(32), torch.arange(40), indexing="ij")
    a = torch.stack([(x * y % 17) / 16, (x + 2 * y) % 11 / 10, ((x - y) ** 2 % 13) / 12])[None]
    b = torch.stack([(x * y % 5) / 4, (x + 2 * y) % 11 / 10, ((3 * x + y) % 7) / 6])[None]
    # scikit-image 0.26.0: structural_similarity with gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # data_range=1, channel_axis=2
    assert ssim(a, b).item() == pytest.approx(0.332797262965221, abs=1e-5)
    assert ssim(b, a).item() == pytest.approx(ssim(a, b).item())


def test_ssim_of_two_flat_pictures_is_their_brightness_term():
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    assert ssim(a, b).item() == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-4)


def test_ssim_turns_negative_for_the_negative(pictures):
    assert (ssim(1 - pictures, pictures) < ssim(0.5 + 0.5 * pictures, pictures)).all()
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert ssim(1 - noise, noise) < -0.8


def test_silhouettes_are_what_they_cover():
    assert silhouette_overlap(square(8, 8, 32), square(8, 24, 32)).item() == pytest.approx(1 / 3)
    assert silhouette_overlap(square(8, 8, 32), square(8, 8, 16)).item() == pytest.approx(1 / 4)
    assert silhouette_overlap(square(0, 4, 56), square(0, 4, 28)).item() == pytest.approx(1 / 4)  # cut by the border


@pytest.mark.parametrize(
    "other",
    [
        square(8, 8, 32, ink=(0.9, 0.2, 0.1)),
        square(8, 8, 32, hollow=True),
        square(8, 8, 32, ink=(1.0, 1.0, 1.0), paper=(0.1, 0.2, 0.4)),
        square(8, 8, 32) - 0.08 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["ink", "outline", "paper", "grain"],
)
def test_silhouettes_know_neither_colours_nor_fillings_nor_the_grain_of_paper(other):
    assert silhouette_overlap(other, square(8, 8, 32)).item() == 1


def test_an_empty_picture_overlaps_only_with_another():
    empty = torch.full((1, 3, 64, 64), 0.97)
    assert silhouette_overlap(empty, torch.ones(1, 3, 64, 64)).item() == 1
    assert silhouette_overlap(empty, square(8, 8, 32)).item() == 0


def test_a_large_picture_has_the_silhouette_of_the_small_one():
    large = F.interpolate(loaded("owl-flat"), scale_factor=4)
    assert silhouette_overlap(large, loaded("owl-flat")).item() == 1


# ---- features


def directions(n, d=64, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("similarity", [content_similarity, style_similarity])
def test_similarity_is_a_cosine_and_averages_over_several_images(similarity):
    features, references = directions(5), directions(3, seed=1)
    torch.testing.assert_close(similarity(7 * features, features[:1])[0], torch.tensor(1.0))
    torch.testing.assert_close(similarity(-features, features[:1])[0], torch.tensor(-1.0))
    each = torch.stack([similarity(features, reference[None]) for reference in references])
    torch.testing.assert_close(similarity(features, references), each.mean(0))


def test_leakage_is_0_for_a_clean_picture_and_1_for_the_style_image_and_grows_between():
    clean, style = directions(1), directions(1, seed=1)
    mixed = torch.lerp(clean, style, torch.linspace(0, 1, 6)[:, None])
    scores = leakage(mixed, style, clean)
    torch.testing.assert_close(scores[[0, -1]], torch.tensor([0.0, 1.0]))
    assert falls([-scores])


def test_leakage_counts_from_the_clean_picture_so_that_a_likeness_of_the_two_subjects_is_none():
    style = directions(1)
    clean = F.normalize(style + directions(1, seed=1), dim=1)  # a subject like the style image's
    assert content_similarity(clean, style) > 0.5
    torch.testing.assert_close(leakage(clean, style, clean), torch.zeros(1))
    assert leakage(directions(1, seed=1), style, clean) < 0
    same = torch.eye(2)[:1]
    assert leakage(same, same, clean=same).isfinite()


def test_each_content_image_counts_alike_however_long_its_features():
    features, content, style = directions(2), directions(3, seed=1), directions(2, seed=2)
    longer = feature_scores(features, content * torch.tensor([[1.0], [5.0], [20.0]]), style)
    for name, score in feature_scores(features, content, style).items():
        torch.testing.assert_close(longer[name], score)


def test_a_subject_of_one_among_n_style_images_leaks_by_1_over_n():
    clean, *styles = torch.eye(5).split(1)
    torch.testing.assert_close(leakage(styles[0], torch.cat(styles), clean), torch.tensor([0.25]))


def test_perceptual_distance_compares_directions_place_by_place():
    maps = [torch.rand(4, 8, 6, 6), torch.rand(4, 16, 3, 3)]
    assert perceptual_distance(maps, [7 * layer for layer in maps]).max() < 1e-6
    a, b = torch.eye(2).view(2, 2, 1, 1).expand(2, 2, 4, 4).split(1)
    half = torch.cat([a[..., :2], b[..., 2:]], -1)
    assert [perceptual_distance([x], [a]).item() for x in (a, half, b)] == pytest.approx([0, 1, 2])
    distances = perceptual_distance(maps, [layer[:1] for layer in maps])
    assert distances[0] < 1e-6 and distances[1:].min() > 0.01
