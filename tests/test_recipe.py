"""The demo model's recipe: pictures are painted as their words say, and a training goes on from its checkpoint."""

import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
WHITE, BLACK, RED = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.8, 0.1, 0.1)


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo_model"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "recipe"]:
        del sys.modules[name]


@pytest.fixture
def disc():
    """A blue disc cut out, rgba 1 4 64 64, and its tones."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    cover = ((0.6 - (x**2 + y**2).sqrt()) * 20).clamp(0, 1)
    rgba = torch.stack([0.2 * torch.ones_like(cover), 0.3 * torch.ones_like(cover), torch.ones_like(cover), cover])
    return rgba[None], torch.tensor([[0.3, 0.35, 0.4]])


def middle_and_corner(picture):
    return picture[0, :, 32, 32], picture[0, :, 1, 1]


def test_a_drawing_as_drawn_stays_itself_on_white(recipe, disc):
    from recipe.painter import Style, paint

    middle, corner = middle_and_corner(paint(*disc, [Style("", "as drawn")]))
    torch.testing.assert_close(middle, torch.tensor([0.2, 0.3, 1.0]))
    torch.testing.assert_close(corner, torch.ones(3))


def test_fill_page_and_outline_have_their_colours(recipe, disc):
    from recipe.painter import Style, paint

    style = Style("", "flat", (RED,) * 3, outline="bold", ink=BLACK, page=(0.5, 0.9, 0.9))
    picture = paint(*disc, [style])
    middle, corner = middle_and_corner(picture)
    torch.testing.assert_close(middle, torch.tensor(RED))
    torch.testing.assert_close(corner, torch.tensor([0.5, 0.9, 0.9]))
    assert picture[0, :, 32].max(0).values.min() < 0.2  # on the way out lies the outline


@pytest.mark.parametrize("kind", ["emoji", "filled", "lines"])
def test_every_style_drawn_by_lot_can_be_painted_and_is_seen(recipe, disc, kind):
    from recipe.painter import draw_style, paint

    rng = random.Random(0)
    styles = [draw_style(rng, kind) for _ in range(200)]
    rgba, tones = disc
    pictures = paint(rgba.expand(200, -1, -1, -1), tones.expand(200, -1), styles)
    assert pictures.isfinite().all() and pictures.min() >= 0 and pictures.max() <= 1
    assert pictures.flatten(1).std(1).min() > 0.01


def test_a_style_is_the_same_for_every_shape(recipe, disc):
    """Side by side with others a picture is painted as alone."""
    from recipe.painter import draw_style, paint

    rng = random.Random(1)
    styles = [style for style in (draw_style(rng, "emoji") for _ in range(12)) if style.texture != "grainy"]
    rgba, tones = disc
    together = paint(rgba.expand(len(styles), -1, -1, -1), tones.expand(len(styles), -1), styles)
    for i, style in enumerate(styles):
        torch.testing.assert_close(together[i], paint(rgba, tones, [style])[0], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_files_of_limited_size_and_gives_the_weights_back(recipe, tmp_path, monkeypatch):
    from recipe import run

    monkeypatch.setattr(run, "LARGEST_FILE", 5000)
    tensors = {f"layer {i}": torch.randn(10, 100).half() for i in range(7)}
    run.save_shards(tmp_path, "unet", tensors)
    files = list(tmp_path.iterdir())
    assert len(files) == 4 and max(file.stat().st_size for file in files) < 5500
    back = run.load_shards(tmp_path, "unet")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_a_training_that_was_stopped_goes_on_where_it_was(recipe, tmp_path):
    from recipe.run import Clock, Optimiser, Run

    def run_of(minutes):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 8)
        return Run("toy", layer, Optimiser(layer, 0.01), Clock(tmp_path, minutes), tmp_path, until=0.9), layer

    first, layer = run_of(minutes=1.0)
    x = torch.randn(16, 8)
    for _ in range(30):
        first.step(((layer(x) - x) ** 2).mean(), 16)
    with pytest.raises(KeyboardInterrupt), first.kept():
        raise KeyboardInterrupt
    again, restored = run_of(minutes=1.0)
    torch.testing.assert_close(restored.weight, layer.weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.average["weight"], first.average["weight"], rtol=1e-3, atol=1e-3)
    assert again.begun == pytest.approx(first.begun) and again.clock.seconds() >= first.clock.seconds() - 0.2
