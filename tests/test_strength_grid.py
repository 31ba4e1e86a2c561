"""The grid: which value lies where, and that each of its pictures is what the sampler alone makes."""

import pytest
import torch


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
