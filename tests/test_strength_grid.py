"""The grid: which value lies where, and that each of its pictures is what the sampler alone makes."""

import logging

import pytest
import torch
from PIL import Image
from reference import comfy_model
from test_bad_inputs import Vae, latent
from test_guidance import conditioning


@pytest.fixture
def grid(pack):
    return pack.nodes.strength_grid


def test_content_grows_to_the_right_and_style_upward(grid):
    cells = list(grid.Sweep("strength", [0.0, 1.0], [5.0, 6.0]).cells())
    assert [tuple(cell.values()) for cell in cells] == [(0.0, 6.0), (1.0, 6.0), (0.0, 5.0), (1.0, 5.0)]
    assert cells[0].keys() == {"content_strength", "style_strength"}


@pytest.mark.parametrize(("steps", "values"), [(1, [0.5]), (2, [0.5, 2.0]), (4, [0.5, 1.0, 1.5, 2.0])])
def test_values_are_evenly_spaced_from_first_to_last(grid, steps, values):
    assert grid.spaced(0.5, 2.0, steps) == pytest.approx(values)


def test_pictures_lie_in_their_cells_between_the_axes(pack):
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
    images = colours[:, None, None].expand(6, 20, 40, 3)
    (page,) = pack.host.drawing.draw_grid(images, "guidance", [0, 1, 2], [0, 1], cell=80)
    height, width, _ = page.shape
    assert (height - 80, width - 240) == (56, 56)  # two rows of 40, three columns of 80, and the axes
    centres = page[20:80:40, width - 240 + 40 :: 80].flatten(0, 1)
    torch.testing.assert_close(centres, colours, atol=0.01, rtol=0)


def test_a_picture_of_8_bits_comes_back_as_it_was(pack):
    drawing, pixels = pack.host.drawing, bytes(range(256)) * 3
    picture = Image.frombytes("RGB", (16, 16), pixels)
    for nearly in (-0.4, 0.4):
        assert drawing.to_picture(drawing.to_image(picture)[0] + nearly / 255).tobytes() == pixels


def test_each_axis_shows_its_own_values(pack):
    def margins(content, style):
        page = pack.host.drawing.draw_grid(torch.zeros(4, 40, 40, 3), "guidance", content, style, cell=80)[0]
        return page[160:], page[:160, :-160]  # below the pictures, and left of them

    (below, left), (other_below, same_left), (same_below, other_left) = (
        margins(*values) for values in (([0, 1], [0, 1]), ([2, 3], [0, 1]), ([0, 1], [2, 3]))
    )
    assert torch.equal(below, same_below) and not torch.equal(below, other_below)
    assert torch.equal(left, same_left) and not torch.equal(left, other_left)


def test_a_page_is_as_large_as_it_was_said_to_be(pack):
    drawing, images = pack.host.drawing, torch.rand(6, 20, 40, 3)
    page = drawing.draw_grid(images, "guidance", [0, 1, 2], [0, 1], cell=300)
    assert tuple(page.shape[2:0:-1]) == drawing.grid_page_size(3, 2, 300, (20, 40))


def test_what_a_grid_takes_is_said_before_it_begins(pack, loras, monkeypatch, caplog):
    """Cells of 2048 pixels, 400 of them, take 34 GB, and failed after an hour of sampling."""
    import comfy.model_management

    inputs = {
        **dict(positive=conditioning("main"), negative=conditioning("uncond"), vae=Vae(), seed=0, steps=1, **loras),
        **dict(latent_image=latent(1, 4, 128, 128), sampler_name="euler", scheduler="normal", denoise=1.0),
        **dict(sweep="guidance", content_from=0.0, content_to=1.0, style_from=0.0, style_to=1.0),
    }

    def draw(steps, cell):
        return pack.nodes.strength_grid.StrengthGrid.execute(
            comfy_model(), **inputs, content_steps=steps, style_steps=steps, cell_size=cell
        )

    # Sub-quadratic attention asks for two numbers.
    free = lambda device, both=False: (8e9, 8e9) if both else 8e9  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
    words = "400 pictures of 1024 x 1024 pixels, on a page of 41544 x 41544, which takes 39.6 GB of memory, and 8.0 GB"
    with pytest.raises(ValueError, match=words):
        draw(20, 2048)
    with caplog.at_level(logging.INFO), pytest.raises(AttributeError, match="decode"):
        draw(1, 64)
    assert "ConsisLoRA grid: 1 pictures of 1024 x 1024 pixels, on a page of 120 x 120: 0.01 GB" in caplog.text
