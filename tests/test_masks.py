"""Masks: what of a picture is learned, and what of a result is kept."""

import shutil

import pytest
import torch
from reference import comfy_model, flat
from test_training_nodes import TENSORS, bits, inputs, train_image, train_style

from consislora_core.losses import LOSSES, mask_weights
from consislora_core.schedule import image_stage
from consislora_core.trainer import Trainer

SHORT = dict(steps=4, transition_step=2, learning_rate=1e-2, reconstruction_learning_rate=1e-2, rank=2)
HALF = torch.cat([torch.ones(1, 128, 64), torch.zeros(1, 128, 64)], 2)  # of a picture of 128 x 128: its left half
LATENT = TENSORS["z_0"].shape[-2:]


pytestmark = pytest.mark.usefixtures("store")


@pytest.fixture
def nodes(pack):
    return pack.nodes.train


def learned(host, **settings):
    with Trainer(*host, image_stage(**SHORT), **settings) as trainer:
        return [event.losses for event in trainer], flat(trainer.parts())


# The losses


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_masked_loss_is_the_mean_over_what_is_inside(loss):
    z_0, z_0_hat, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    sigma, mask = torch.tensor([0.5, 3.0], dtype=torch.float64).view(-1, 1, 1, 1), torch.zeros(2, 1, 8, 8).double()
    mask[:, :, 2:5, 1:4] = 1
    inside = [tensor[..., 2:5, 1:4] for tensor in (z_0, z_0_hat, noise)]
    masked = loss(z_0, z_0_hat, noise, sigma, weight=mask_weights(mask))
    torch.testing.assert_close(masked, loss(*inside, sigma))


# The trainer


@pytest.mark.parametrize("settings", [{}, {"loss_scale": 2.0**16}], ids=["plain", "loss scale"])
def test_a_mask_of_ones_gives_the_bits_of_none(host, settings):
    losses, lora = learned(host, **settings)
    ones, with_ones = learned(host, mask=torch.ones(1, 1, *host[1].shape[-2:]), **settings)
    assert losses == ones
    assert torch.equal(lora, with_ones)


def test_loras_side_by_side_each_have_their_own_mask(host):
    model, z_0, cond = host
    masks = torch.ones(3, 1, *z_0.shape[-2:])
    masks[1, ..., :3], masks[2, :, 5:] = 0, 0
    images = torch.cat([z_0, z_0.flip(2), z_0.flip(3)])
    with Trainer(model, images, cond, image_stage(**SHORT), loras=3, mask=masks) as trainer:
        together = [event.losses for event in trainer]
    alone = [learned((model, image[None], cond), mask=mask[None])[0] for image, mask in zip(images, masks, strict=True)]
    for row, losses in enumerate(alone):
        assert [step[row] for step in together] == pytest.approx([loss for (loss,) in losses], rel=1e-3)


def test_of_several_images_a_step_takes_the_mask_of_the_one_that_it_takes(host):
    model, z_0, cond = host
    images, corner = z_0.repeat(2, 1, 1, 1), torch.zeros(1, *z_0.shape[-2:])
    corner[:, :2, :2] = 1
    first_losses = []
    for masked in ([], [0], [1]):  # the images of which only a corner counts
        mask = torch.ones(2, 1, *z_0.shape[-2:])
        mask[masked] = corner
        with Trainer(model, images, cond, image_stage(**SHORT), mask=mask) as trainer:
            first_losses.append(next(iter(trainer)).loss)
    plain, *others = first_losses
    assert sorted(loss == plain for loss in others) == [False, True]


# The nodes


@pytest.mark.parametrize("value", [1.0, 0.25])
def test_a_mask_that_is_the_same_everywhere_is_none_in_bits_and_in_the_store(nodes, store, value):
    model = comfy_model()
    plain = train_image(nodes, model)
    key = stored(store)
    with_mask = train_image(nodes, model, mask=torch.full((1, 64, 64), value))
    assert stored(store) == key and bits(with_mask[0]) == bits(plain[0])
    shutil.rmtree(store.folder)
    anew = train_image(nodes, model, mask=torch.full((1, 64, 64), value))
    assert stored(store) == key and bits(anew[0]) == bits(plain[0]) and anew[1] == plain[1]


def stored(store) -> set[str]:
    return {path.name for path in store.folder.glob("*.lora")}


def test_a_mask_has_its_own_place_in_the_store_and_its_hash_in_the_file(nodes, store):
    model = comfy_model()
    plain, *_ = train_image(nodes, model)
    half, *_ = train_image(nodes, model, mask=HALF)
    again, *_ = train_image(nodes, model, mask=HALF.expand(1, -1, -1).half())
    other, *_ = train_image(nodes, model, mask=1 - HALF)
    assert len(stored(store)) == 3
    assert bits(again) == bits(half) and len({str(bits(lora)) for lora in (plain, half, other)}) == 3
    assert "consislora.mask_hash" not in plain.metadata
    assert half.metadata["consislora.mask_hash"] != other.metadata["consislora.mask_hash"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_both_stages_train_with_a_mask_in_every_precision(nodes, precision):
    model = comfy_model()
    lora, loss_map, _ = train_image(nodes, model, mask=HALF, precision=precision)
    style, style_losses, _ = train_style(nodes, model, lora, mask=HALF, precision=precision)
    assert torch.tensor(loss_map["loss"] + style_losses["loss"]).isfinite().all()
    assert bits(style) != bits(train_style(nodes, model, lora, precision=precision)[0])


def test_a_picture_of_an_odd_size_trains_with_the_mask_of_its_own_pixels(nodes):
    latent, mask = torch.randn(3, 4, 13, 9), torch.zeros(1, 107, 75)  # VAE Encode crops 107 x 75 to 104 x 72
    mask[:, 20:90, 20:60] = 1
    lora, loss_map, _ = train_image(nodes, comfy_model(), latent={"samples": latent}, mask=mask)
    assert torch.tensor(loss_map["loss"]).isfinite().all() and "consislora.mask_hash" in lora.metadata


def test_each_image_of_a_batch_has_the_lora_that_it_has_alone(nodes, store):
    model = comfy_model()
    latents = (TENSORS["z_0"] * torch.tensor([1, 0.5, 0.25]).view(-1, 1, 1, 1)).clone()
    masks = torch.cat([HALF, torch.ones_like(HALF), 1 - HALF])
    settings = inputs(latent={"samples": latents}, mask=masks, at_once=3)
    with torch.inference_mode():
        together = nodes.TrainImages.execute(model, **settings).result[0]
    keys = stored(store)
    for latent, mask, lora in zip(latents, (HALF, None, 1 - HALF), together, strict=True):
        alone, *_ = train_image(nodes, model, latent={"samples": latent[None].clone()}, mask=mask)
        assert bits(alone) == bits(lora)
    assert stored(store) == keys


def test_one_mask_is_for_all_recolourings_and_two_for_two_spans_of_them(pack):
    samples = torch.ones(6, 4, *LATENT)
    left, right = (pack.host.masks.latent_mask(mask, samples[:1])[0] for mask in (HALF, 1 - HALF))
    one = pack.host.masks.latent_mask(HALF, samples)
    two = pack.host.masks.latent_mask(torch.cat([HALF, 1 - HALF]), samples)
    assert one.shape == two.shape == (6, 1, *LATENT)
    assert torch.equal(one, left.expand(6, -1, -1, -1))
    assert all(torch.equal(row, left if number < 3 else right) for number, row in enumerate(two))


def test_a_mask_is_the_share_of_each_latent_pixel_that_is_inside(pack):
    mask = torch.zeros(1, 16, 24)
    mask[:, :4, :12] = 1
    for values in (mask, 3 * mask - 1):  # out of range they count as 0 and 1
        fitted = pack.host.masks.latent_mask(values, torch.ones(1, 4, 2, 3))
        assert fitted.tolist() == [[[[0.5, 0.25, 0], [0, 0, 0]]]]


@pytest.mark.parametrize("size", [(1003, 750), (1000, 748), (125, 93), (61, 47)])
def test_a_mask_fits_the_latent_of_a_picture_of_any_size(pack, size):
    """VAE Encode crops to multiples of 8; some scale a mask first."""
    height, width = size
    mask = torch.zeros(1, height, width)
    mask[:, : height // 2] = 1
    for picture in (size, (1024, 768)):
        latent = torch.ones(1, 4, picture[0] // 8, picture[1] // 8)
        fitted = pack.host.masks.latent_mask(mask, latent)
        assert fitted.mean() == pytest.approx(0.5, abs=0.02)


BAD = {
    "empty": (torch.zeros(1, 128, 128), r"mask is empty .* nothing would be learned.*Invert Mask"),
    "one of two empty": (torch.cat([HALF, 0 * HALF]), "mask is empty"),
    "NaN": (torch.full((1, 128, 128), torch.nan), "mask holds values that are not numbers"),
    "wrong batch": (HALF.expand(3, -1, -1), "mask holds 3 masks for 2 pictures. Connect one for all"),
    "wrong shape": (HALF[:, :108], "mask is 128 x 108 pixels, and the picture in latent .* another shape"),
    "no pixels": (torch.zeros(1, 0, 8), r"mask has shape \(1, 0, 8\); masks are"),
    "no mask": ([1], "mask is no mask"),
}


@pytest.mark.parametrize(("mask", "words"), BAD.values(), ids=BAD)
def test_a_mask_that_cannot_be_is_refused_in_words(nodes, mask, words):
    latent = {"samples": TENSORS["z_0"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match=words):
        train_image(nodes, comfy_model(), latent=latent, mask=mask)


# Keep Outside Mask


@pytest.fixture
def keep(pack):
    def keep(images, original, mask, outside="original", feather=0):
        return pack.nodes.keep_outside.KeepOutsideMask.execute(images, original, mask, outside, feather).result[0]

    return keep


def test_outside_of_the_mask_the_original_stays_to_the_bit_and_inside_is_the_result(keep):
    images, original = torch.rand(2, 3, 128, 128, 3)
    kept = keep(images, original[:1], HALF)
    assert torch.equal(kept[:, :, 64:], original[:1, :, 64:].expand(3, -1, -1, -1))
    assert torch.equal(kept[:, :, :64], images[:, :, :64])


def test_transparent_gives_the_result_the_masks_alpha_to_the_bit(keep):
    images, mask = torch.rand(3, 128, 128, 3), torch.rand(1, 128, 128)
    kept = keep(images, images[:1], mask, "transparent")
    assert torch.equal(kept, torch.cat([images, mask[..., None].expand(3, -1, -1, -1)], -1))


def test_a_result_of_another_size_comes_in_the_originals(keep):
    original = torch.rand(1, 300, 201, 3)
    mask = torch.zeros(1, 300, 201)
    mask[:, 50:250, 50:150] = 1
    kept = keep(torch.full((2, 96, 64, 3), 0.5), original, mask)
    assert kept.shape == (2, 300, 201, 3)
    assert torch.equal(kept[0] == original[0], (mask[0] == 0)[..., None].expand(-1, -1, 3) | (original[0] == 0.5))
    assert (kept[:, 50:250, 50:150] - 0.5).abs().max() < 1e-5
    sharp = keep(torch.rand(1, 96, 64, 3).round(), original, mask)
    assert sharp.min() >= 0 and sharp.max() <= 1


def test_the_soft_edge_rises_inwards_and_leaves_the_outside_and_the_pictures_border_alone(keep):
    images, original = torch.ones(1, 128, 128, 3), torch.zeros(1, 128, 128, 3)
    row = keep(images, original, HALF, feather=8)[0, 5, :, 0]
    assert row[:56].eq(1).all() and row[64:].eq(0).all()
    assert (row[56:64] - torch.arange(7, -1, -1) / 8).abs().max() < 1e-6


def test_a_thin_part_becomes_faint_and_does_not_vanish(keep):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 30:33] = 1
    row = keep(torch.ones(1, 64, 64, 3), torch.zeros(1, 64, 64, 3), mask, feather=8)[0, 9, :, 0]
    assert 0 < row[31] < 0.2


def test_pictures_with_alpha_and_grey_ones_are_taken_and_a_mask_of_ones_of_any_size(keep):
    kept = keep(torch.rand(1, 8, 16, 4), torch.rand(1, 8, 16, 1), torch.ones(64, 64))  # Load Image's, inverted
    assert kept.shape == (1, 8, 16, 3)


BAD_TOGETHER = {
    "another shape": (torch.ones(1, 64, 64, 3), torch.ones(1, 64, 128, 3), torch.ones(1, 64, 128), "images is 64 x 64"),
    "mask of another shape": (torch.ones(1, 64, 64, 3), torch.ones(1, 64, 64, 3), HALF[:, :64], "mask is 128 x 64"),
    "two originals": (torch.ones(3, 8, 8, 3), torch.ones(2, 8, 8, 3), torch.ones(1, 8, 8), "original holds 2 for 3"),
    "two masks": (torch.ones(3, 8, 8, 3), torch.ones(1, 8, 8, 3), torch.ones(2, 8, 8), "mask holds 2 for 3"),
    "empty": (torch.ones(1, 8, 8, 3), torch.ones(1, 8, 8, 3), torch.zeros(1, 8, 8), "nothing of the result would show"),
    "no pictures": (torch.ones(8, 8, 3), torch.ones(1, 8, 8, 3), torch.ones(1, 8, 8), "images has shape"),
}


@pytest.mark.parametrize(("images", "original", "mask", "words"), BAD_TOGETHER.values(), ids=BAD_TOGETHER)
def test_what_does_not_fit_together_is_refused_in_words(keep, images, original, mask, words):
    with pytest.raises(ValueError, match=words):
        keep(images, original, mask)
