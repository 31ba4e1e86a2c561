"""Keep Colours gives a result its content image's hue and chroma, and leaves the style lightness, lines and page.

Match Palette gives a content image the style image's palette, before structure_lock begins with it.
"""

import pytest
import torch
import torch.nn.functional as F
from images import loaded

from consislora_core.colours import CONTRAST, keep_colours, match_palette, to_oklab, to_srgb
from consislora_core.metrics import silhouette, structure_scores


def drawn(name: str, side: int = 128) -> torch.Tensor:
    """1 h w 3"""
    return loaded(name, side).movedim(1, -1)


def lab(pictures: torch.Tensor) -> torch.Tensor:
    """b h w 3"""
    return to_oklab(pictures.float().movedim(-1, 1)).movedim(1, -1)


@pytest.fixture(scope="module")
def crown():
    return drawn("crown-flat")


@pytest.fixture(scope="module")
def blue(crown):
    """The crown in other colours, as a style would have them."""
    return crown.flip(-1).contiguous()


def distance(pictures, content) -> float:
    """Of the mean hue and chroma inside the content image's silhouette."""
    inside = silhouette(content.movedim(-1, 1))[0, 0]
    return (lab(pictures)[0, inside, 1:].mean(0) - lab(content)[0, inside, 1:].mean(0)).norm().item()


def test_oklab_is_its_authors_and_goes_back(crown):
    red = to_oklab(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)).flatten()
    assert red.tolist() == pytest.approx([0.62796, 0.22486, 0.12585], abs=1e-4)  # the CSS Color 4 value of red
    x = crown.movedim(-1, 1)
    assert (to_srgb(to_oklab(x)) - x).abs().max() < 2e-3


def test_at_0_the_result_is_the_very_picture(crown, blue):
    assert torch.equal(keep_colours(blue, crown, 0.0), blue)


def test_at_1_the_colours_are_the_contents_and_between_they_move_evenly(crown, blue):
    distances = [distance(keep_colours(blue, crown, strength), crown) for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.15 * distances[0]


def test_lightness_stays_the_styles(crown, blue):
    assert (lab(keep_colours(blue, crown, 1.0)) - lab(blue))[..., 0].abs().max() < 5e-3


def test_the_page_stays_what_the_style_made_it_to_the_bit(crown, blue):
    outside = ~silhouette(crown.movedim(-1, 1))[0, 0]
    far = -F.max_pool2d(-outside[None].float(), 13, 1, 6)[0] > 0  # not at the outline
    for page in ((1.0, 1.0, 1.0), (0.95, 0.9, 0.7)):
        picture = torch.where(outside[..., None], torch.tensor(page), blue)
        moved = keep_colours(picture, crown, 1.0)
        assert far.any() and torch.equal(moved[0, far], picture[0, far])


def test_black_and_white_stay_black_and_white(crown):
    lines = (crown.mean(-1, keepdim=True) > 0.5).float().expand(-1, -1, -1, 3)
    assert (keep_colours(lines, crown, 1.0) - lines).abs().max() < 0.02


def test_a_grey_content_image_makes_the_subject_grey(crown):
    grey = lab(crown) * torch.tensor([1.0, 0.0, 0.0])
    grey = to_srgb(grey.movedim(-1, 1)).movedim(1, -1)
    assert distance(keep_colours(crown, grey, 1.0), grey) < 0.15 * distance(crown, grey)


def test_a_colour_that_srgb_lacks_keeps_hue_and_lightness():
    wild = torch.tensor([0.7, 0.3, 0.2]).view(1, 3, 1, 1)
    got = to_oklab(to_srgb(wild)).flatten()
    assert got[0] == pytest.approx(0.7, abs=5e-3)
    assert torch.atan2(got[2], got[1]).item() == pytest.approx(torch.atan2(wild[0, 2], wild[0, 1]).item(), abs=0.02)
    assert 0.1 < got[1:].norm() < 0.3


def test_only_inside_a_mask_do_colours_change(crown, blue):
    mask = torch.zeros(1, 32, 32)
    mask[:, :, 16:] = 1.0
    moved = keep_colours(blue, crown, 1.0, mask)
    assert torch.equal(moved[:, :, :56], blue[:, :, :56])
    assert (moved - blue)[:, :, 72:].abs().max() > 0.2
    assert torch.equal(keep_colours(blue, crown, 1.0, torch.zeros(1, 8, 8)), blue)


def test_colours_do_not_run_over_the_results_outlines():
    content, picture = torch.full((1, 128, 128, 3), 0.5), torch.full((1, 128, 128, 3), 0.3)
    content[:, :, :64], content[:, :, 64:] = torch.tensor([0.8, 0.2, 0.2]), torch.tensor([0.2, 0.2, 0.8])
    picture[:, :, 70:] = 0.7  # its own outline lies elsewhere
    moved = lab(keep_colours(picture, content, 1.0, torch.ones(1, 1, 1)))
    own, contents = ((moved[0, 64, edge, 1:] - moved[0, 64, edge - 1, 1:]).norm() for edge in (70, 64))
    assert own > 3 * contents


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (128, 96), (500, 333)])
def test_any_size_and_any_size_of_the_content_image(crown, size):
    picture = F.interpolate(crown.flip(-1).movedim(-1, 1), size).movedim(1, -1)
    moved = keep_colours(picture, crown[:, 10:, :], 1.0)
    assert moved.shape == picture.shape and moved.isfinite().all() and moved.min() >= 0 and moved.max() <= 1


def test_an_enlargement_gets_the_colours_of_the_picture(crown, blue):
    large = drawn("crown-flat", 512).flip(-1)
    moved = F.avg_pool2d(keep_colours(large, crown, 1.0).movedim(-1, 1), 4).movedim(1, -1)
    assert (moved - keep_colours(blue, crown, 1.0)).abs().mean() < 0.02


def test_a_batch_gets_one_content_image_or_one_each(crown, blue):
    owl = drawn("owl-flat")
    results = torch.cat([blue, owl])
    one = keep_colours(results, crown, 0.5)
    each = keep_colours(results, torch.cat([crown, owl.flip(-1)]), 0.5)
    assert torch.equal(one[:1], keep_colours(blue, crown, 0.5)) and torch.equal(each[:1], one[:1])
    assert torch.equal(each[1:], keep_colours(owl, owl.flip(-1), 0.5))
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    assert (keep_colours(results, crown, 0.5, masks) == results).all((1, 2, 3)).tolist() == [True, False]
    with pytest.raises(ValueError, match="content_image has a batch of 2"):
        keep_colours(torch.cat([results, blue]), results, 0.5)
    with pytest.raises(ValueError, match="mask has a batch of 3"):
        keep_colours(results, crown, 0.5, torch.ones(3, 8, 8))


@pytest.mark.parametrize("change", [keep_colours, match_palette])
def test_half_precision_comes_back_as_it_was_and_right(crown, blue, change):
    changed = change(blue.half(), crown.half(), 1.0)
    assert changed.dtype == torch.float16
    assert (changed - change(blue, crown, 1.0)).abs().max() < 0.02


@pytest.mark.parametrize("change", [keep_colours, match_palette])
def test_values_out_of_range_count_as_the_nearest_that_a_picture_has(crown, blue, change):
    """A picture has such where it was scaled with bicubic."""
    sharpened = [1.2 * picture - 0.1 for picture in (blue, crown)]
    changed, expected = change(*sharpened, 1.0), change(*(picture.clamp(0, 1) for picture in sharpened), 1.0)
    assert torch.equal(changed.clamp(0, 1), expected)


def test_one_colour_stays_one_up_to_the_edge_of_the_picture():
    grey, red = torch.full((1, 64, 64, 3), 0.5), torch.tensor([0.7, 0.4, 0.4]).expand(1, 64, 64, 3)
    kept = keep_colours(grey, red, 1.0, torch.ones(1, 8, 8))
    assert (lab(kept) - lab(red))[..., 1:].abs().max() < 5e-3


def node(pack, *inputs, **others) -> torch.Tensor:
    return pack.nodes.colours.KeepColours.execute(*inputs, **others).args[0]


def test_the_node_keeps_alpha_and_takes_grey_pictures(pack, crown, blue):
    alpha = torch.rand(1, 128, 128, 1)
    cut_out = torch.cat([blue, alpha], -1)
    assert torch.equal(node(pack, cut_out, crown, 0.0), cut_out)
    moved = node(pack, cut_out, torch.cat([crown, alpha], -1), 1.0)
    assert torch.equal(moved[..., 3:], alpha) and torch.equal(moved[..., :3], keep_colours(blue, crown, 1.0))
    grey = crown.mean(-1, keepdim=True)
    assert distance(node(pack, grey, crown, 1.0), crown) < 0.5 * distance(grey.expand(-1, -1, -1, 3), crown)


def test_the_node_takes_a_mask_without_a_batch(pack, crown, blue):
    assert torch.equal(
        node(pack, blue, crown, 1.0, torch.ones(8, 8)), node(pack, blue, crown, 1.0, torch.ones(1, 8, 8))
    )


@pytest.mark.parametrize("mask", [torch.zeros(0, 8, 8), torch.full((1, 8, 8), float("nan")), torch.ones(1, 3, 8, 8)])
def test_the_node_refuses_what_is_no_mask(pack, crown, mask):
    with pytest.raises(ValueError, match="mask"):
        node(pack, crown, crown, 1.0, mask)


def palette(picture) -> torch.Tensor:
    """Mean and standard deviation of the colours inside the silhouette, in OKLab: 2 3"""
    colours = lab(picture)[0, silhouette(picture.movedim(-1, 1))[0, 0]]
    return torch.stack([colours.mean(0), colours.std(0)])


@pytest.fixture(scope="module")
def owl():
    return drawn("owl-flat")


def test_a_palette_becomes_the_style_images_and_between_it_moves_evenly(crown, owl):
    matched = [match_palette(crown, owl, strength) for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    distances = [(palette(picture) - palette(owl)).norm().item() for picture in matched]
    assert torch.equal(matched[0], crown)
    assert distances == sorted(distances, reverse=True) and distances[-1] < 0.25 * distances[0]


def test_with_another_palette_outlines_and_the_page_stay_where_they_are(crown, owl):
    matched = match_palette(crown, owl)
    scores = structure_scores(matched.movedim(-1, 1), crown.movedim(-1, 1))
    assert scores["silhouette"] > 0.97 and scores["edges"] > 0.8
    assert torch.equal(matched[0, :8], crown[0, :8])


def test_white_in_a_subject_stays_white_and_counts_in_no_palette():
    def subject(darkest, brightest, spotted):
        """A square on white, with a white spot in its middle or none."""
        drawn, shade = torch.ones(1, 128, 128, 3), torch.linspace(0, 1, 64)[:, None]
        drawn[:, 32:96, 32:96] = torch.lerp(torch.tensor(darkest), torch.tensor(brightest), shade)
        drawn[:, 48:80, 48:80] = torch.where(torch.tensor(spotted), 1.0, drawn[:, 48:80, 48:80])
        return drawn

    light, dark = ([0.6, 0.5, 0.3], [0.9, 0.8, 0.5]), ([0.0, 0.05, 0.2], [0.1, 0.2, 0.5])
    matched = match_palette(subject(*light, True), subject(*dark, False))
    assert (matched[:, 50:78, 50:78] == 1).all()
    plain, spotted = (match_palette(subject(*light, False), subject(*dark, spot)) for spot in (False, True))
    for other in (spotted, matched):
        assert (plain - other)[:, 34:46, 34:94].abs().mean() < 0.03


def test_the_noise_of_a_flat_subject_does_not_become_a_pattern(owl):
    flat = torch.ones(1, 128, 128, 3)
    flat[0, 32:96, 32:96] = 0.5 + 0.01 * torch.randn(64, 64, 1, generator=torch.Generator().manual_seed(0))
    inside = slice(40, 88)
    spread = lab(match_palette(flat, owl))[0, inside, inside, 0].std()
    assert spread < 1.1 * CONTRAST * lab(flat)[0, inside, inside, 0].std() < lab(owl)[..., 0].std()


def test_a_photograph_without_a_background_changes_as_a_whole(owl):
    photograph = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    assert (palette(match_palette(photograph, owl))[0] - palette(owl)[0]).norm() < 0.1


def test_a_colour_becomes_the_same_in_all_frames_of_a_film_that_get_their_palette_together(pack, crown, owl):
    half = crown.clone()
    half[:, 64:] = 1
    film, execute = torch.cat([crown, half]), pack.nodes.colours.MatchPalette.execute
    seen = slice(0, 48)  # in both frames, clear of where the second one ends
    (each,), (together,) = (execute(film, owl, 1.0, *one).args for one in ((), (True,)))
    change = [(frames[0] - frames[1])[seen].abs().max() for frames in (together, each)]
    assert change[0] < 1e-3 < 0.02 < change[1]


def test_its_node_keeps_alpha_and_takes_grey_pictures(pack, crown, owl):
    alpha, execute = torch.rand(1, 128, 128, 1), pack.nodes.colours.MatchPalette.execute
    (matched,) = execute(torch.cat([crown, alpha], -1), torch.cat([owl, alpha], -1), 0.5).args
    assert torch.equal(matched, torch.cat([match_palette(crown, owl, 0.5), alpha], -1))
    (grey,) = execute(crown.mean(-1, keepdim=True), owl, 1.0).args
    assert (palette(grey)[0] - palette(owl)[0]).norm() < 0.1


def test_palettes_of_two_style_images_do_not_go_with_three_pictures(crown, owl):
    with pytest.raises(ValueError, match="style_image has a batch of 2"):
        match_palette(crown.expand(3, -1, -1, -1), owl.expand(2, -1, -1, -1))
