"""Recolourings keep a picture's structure and none of its colours."""

import pytest
import torch
import torch.nn.functional as F
from images import loaded

from consislora_core.recolour import page_whiteness, recolour, whiteness


def drawn(name: str) -> torch.Tensor:
    """h w 3"""
    return loaded(name)[0].movedim(0, -1)


def recoloured(picture: torch.Tensor, count: int = 64, seed: int = 0) -> torch.Tensor:
    return recolour(picture, count, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def owl():
    return drawn("owl-flat")


def test_white_stays_white_and_every_other_pixel_changes(owl):
    pictures, page = recoloured(owl), (owl > 0.99).all(-1)
    assert (pictures[:, page] > 0.99).all()
    body = owl.amin(-1) < 0.9
    assert ((pictures - owl)[:, body].abs().amax(-1).mean(1) > 0.02).all()


def test_a_noisy_page_stays_white_and_a_clean_picture_is_judged_pixel_by_pixel(owl):
    page, body = ((255 * owl).round() == 255).all(-1), owl.amin(-1) < 0.9
    inside = -F.max_pool2d(-page[None, None].float(), 9, 1, 4)[0, 0] > 0  # away from the drawing
    noisy = (owl + 0.1 * torch.randn(owl.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    pictures = recoloured(noisy)
    assert ((pictures - noisy)[:, inside].abs().amax(-1) > 0.1).float().mean() < 0.05
    assert ((pictures - noisy)[:, body].abs().amax(-1).mean(1) > 0.02).all()
    assert torch.equal(page_whiteness(owl), whiteness(owl, dim=-1))


def test_what_was_of_one_colour_is_of_one_colour_still(owl):
    for colour in (owl[64, 64], owl[40, 50]):
        same = (owl == colour).all(-1)
        assert recoloured(owl)[:, same].std(1).max() < 1e-6


def test_the_colours_of_the_recolourings_say_nothing_of_the_pictures(owl):
    ink = owl.amin(-1) < 0.9
    means = recoloured(owl, 400)[:, ink].mean(1)
    turned = recoloured(owl.flip(-1), 400, seed=1)[:, ink].mean(1)  # red for blue
    assert (means.mean(0) - turned.mean(0)).abs().max() < 0.05 < means.std(0).min()


def test_a_grey_picture_gets_colours_and_in_half_of_the_recolourings_its_dark_tones_are_the_light_ones():
    grey = torch.linspace(0, 0.9, 64).view(8, 8, 1).expand(-1, -1, 3)
    pictures = recoloured(grey, 100)
    assert (pictures.amax(-1) - pictures.amin(-1)).mean() > 0.1
    assert 30 < (pictures[:, 0, 0].sum(-1) > pictures[:, -1, -1].sum(-1)).sum() < 70


def test_the_same_seed_gives_the_same_colours_and_another_seed_others(owl):
    assert torch.equal(recoloured(owl, 3), recoloured(owl, 3))
    assert not torch.equal(recoloured(owl, 3), recoloured(owl, 3, seed=1))


def test_the_node_gives_each_picture_and_then_its_recolourings(pack, owl):
    crown = drawn("crown-flat")
    batch = torch.stack([owl, crown])
    rgba = torch.cat([batch, torch.ones_like(batch[..., :1])], -1)
    (images,) = pack.nodes.recolour.Recolour.execute(rgba, 2, 0).args
    assert images.shape == (6, *owl.shape)
    assert torch.equal(images[0], owl) and torch.equal(images[3], crown)
    assert len({image.numpy().tobytes() for image in images}) == 6


def test_values_out_of_range_count_as_the_nearest_that_a_picture_has(pack, owl):
    import nodes

    (enlarged,) = nodes.ImageScale().upscale(owl[None] * (owl < 0.9), "bicubic", 300, 300, "disabled")
    assert enlarged.min() < 0 and enlarged.max() > 1
    (images,), (wanted,) = (
        pack.nodes.recolour.Recolour.execute(one, 4, 0).args for one in (enlarged, enlarged.clamp(0, 1))
    )
    assert images.isfinite().all() and torch.equal(images, wanted)


def test_what_the_computer_has_no_memory_for_is_refused_before_it_is_made(pack):
    picture = torch.zeros(1, 1, 1, 3).expand(8, 12_000, 12_000, 3)  # takes no memory itself
    with pytest.raises(ValueError, match="200 pictures of 12000 x 12000 pixels take 691.2 GB .* Lower recolourings"):
        pack.nodes.recolour.check_memory(picture, 24)
    pack.nodes.recolour.check_memory(torch.zeros(1, 8, 8, 3), 24)
