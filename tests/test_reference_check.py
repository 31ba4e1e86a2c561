"""What a user reads of pictures that are poor to learn from, before they are learned."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from images import cut_out
from PIL import Image, ImageDraw
from prompts import quick
from reference import comfy_conditioning, comfy_model, run

from benchmarks.fidelity.faults import blurred, coarse, compressed, noisy, on_large_page
from consislora_core.image_faults import find_faults
from consislora_core.schedule import image_stage
from demo.run import IMAGES

DEMO = sorted(IMAGES.glob("*.png"))
SIDE = 256  # of the demo model's pictures


def picture(file, side=SIDE):
    return Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def photo():
    """Like a photograph: shading everywhere, texture, soft and sharp edges, and no page."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).resize((512, 512), Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8)).resize((512, 512), Image.Resampling.BICUBIC)
    blended = Image.blend(coarse, fine, 0.2)
    draw = ImageDraw.Draw(blended)
    for x, y, radius in rng.integers(40, 470, (12, 3)) // (1, 1, 8):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), tuple(rng.integers(0, 255, 3).tolist()))
    return blended.resize((400, 400), Image.Resampling.LANCZOS)


def tensor(of):
    return torch.from_numpy(np.array(of)).float() / 255


def faults(of, side=None, **settings):
    return find_faults(tensor(of), side or of.width, **settings)


DAMAGE = {
    "is blurred": blurred,
    "or was scaled up": coarse,
    "JPEG": lambda of: compressed(of, 20),
    "is noisy": lambda of: noisy(of, 25),
    "empty page": on_large_page,
}


@pytest.mark.parametrize("file", DEMO, ids=lambda file: file.stem)
def test_a_clean_drawing_has_no_fault(file):
    assert faults(picture(file)) == faults(Image.open(file).convert("RGB"), SIDE) == []


@pytest.mark.parametrize("words", DAMAGE)
@pytest.mark.parametrize("file", DEMO, ids=lambda file: file.stem)
def test_each_damage_is_named(file, words):
    (fault,) = faults(DAMAGE[words](picture(file)))
    assert words in fault


@pytest.mark.parametrize("words", list(DAMAGE)[:-1])
def test_so_it_is_of_a_photograph(words):
    assert faults(photo()) == []
    assert any(words in fault for fault in faults(DAMAGE[words](photo())))


def test_what_is_lost_when_a_picture_is_made_small_for_training_does_not_count():
    sharp = picture(DEMO[0], 2048)
    assert "is blurred" in str(faults(blurred(sharp)))
    assert [faults(DAMAGE[words](sharp), SIDE) for words in ("is blurred", "is noisy", "JPEG")] == [[]] * 3


@pytest.mark.parametrize("blur", [1.5, 3])
@pytest.mark.parametrize("file", DEMO, ids=lambda file: file.stem)
def test_image_sharpen_as_advised_makes_a_blurred_picture_more_like_the_sharp_one(comfy, file, blur):
    from comfy_extras.nodes_post_processing import Sharpen

    sharp, soft = picture(file), blurred(picture(file), blur)
    (fault,) = faults(soft)
    radius, sigma, alpha = map(float, re.findall(r"\d+\.?\d*", fault))
    ours = Sharpen.execute(tensor(soft)[None], int(radius), sigma, alpha).args[0]
    assert F.mse_loss(ours[0], tensor(sharp)) < 0.85 * F.mse_loss(tensor(soft), tensor(sharp))


def test_the_radius_is_in_pixels_of_the_training():
    soft = blurred(picture(DEMO[0]), 2)
    once, twice = (int(re.search(r"sharpen_radius (\d+)", str(faults(soft, side)))[1]) for side in (SIDE, 2 * SIDE))
    assert abs(twice - 2 * once) <= 1


def test_a_fine_weave_is_no_noise():
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    weave = 0.5 + 0.25 * torch.sin(2 * torch.pi * (x + 0.3 * y) / 3)
    assert "noisy" not in str(find_faults(weave[..., None].expand(-1, -1, 3), 256))


def test_a_small_picture_is_named_where_it_is_learned_large():
    (fault,) = faults(picture(DEMO[0], 200), 1024)
    assert fault.startswith("has 200 x 200 pixels and is scaled up 5.1 times")
    assert faults(picture(DEMO[0], 200)) == faults(picture(DEMO[0], 512), 1024) == []


def test_an_empty_page_does_not_count_behind_a_mask():
    assert faults(on_large_page(picture(DEMO[0])), masked=True) == []


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (8, 2000), (40, 40)])
def test_odd_sizes_and_flat_pictures_are_looked_at_too(size):
    for side in (1, 64, 1024):
        faults(Image.new("RGB", size, "white"), side)
        faults(noisy(Image.new("RGB", size, "grey"), 25), side)


def training(name, **changes):
    """The demo's training of a content image, on a file in the input folder, saved under a name of its own."""
    prompt = quick("train_content_demo", **{"filename": "reference_check", **changes})
    for node in prompt.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = name
    return prompt


def texts_shown(server, prompt):
    """The texts that nodes show while a workflow runs."""
    events = []
    server.run(prompt, on_event=lambda kind, data: events.append(data))
    return [data.decode(errors="replace") for data in events if isinstance(data, bytes)]


def put(server, name, of):
    of.save(server.base / "input" / name)
    return name


def test_the_training_node_and_the_log_name_the_file_and_its_fault(server):
    soft = put(server, "soft owl.png", blurred(picture(DEMO[0])))
    texts = texts_shown(server, training(soft))
    assert any("soft owl.png is blurred" in text for text in texts)
    assert "image stage: soft owl.png is blurred" in server.log
    again = texts_shown(server, training(soft, memory="lean"))  # the same training, which the store has
    assert any("soft owl.png is blurred" in text for text in again)


def test_a_clean_picture_trains_without_a_word(server):
    clean = put(server, "owl.png", picture(DEMO[3]))
    assert not [text for text in texts_shown(server, training(clean)) if clean in text]


def test_behind_a_node_that_changes_the_picture_the_file_says_nothing(server):
    soft = put(server, "soft.png", blurred(picture(DEMO[0])))
    prompt = training(soft)
    (encode,) = [node for node in prompt.values() if node["class_type"] == "VAEEncode"]
    prompt["sharp"] = {
        "class_type": "ImageSharpen",
        "inputs": {"image": encode["inputs"]["pixels"], "sharpen_radius": 1, "sigma": 1.0, "alpha": 1.0},
    }
    encode["inputs"]["pixels"] = ["sharp", 0]
    assert not [text for text in texts_shown(server, prompt) if "soft.png" in text]


def test_a_file_that_cannot_be_looked_at_is_passed_over(pack, comfy, monkeypatch):
    import folder_paths

    deep = Image.fromarray(np.random.default_rng(0).integers(0, 400, (64, 64), np.uint16))  # noisy, cut to 8 bits
    folder = Path(folder_paths.get_input_directory())
    deep.save(folder / "deep.png")
    (folder / "cut.png").write_bytes(DEMO[0].read_bytes()[:2000])
    picture(DEMO[0], 20).save(folder / "large.png")
    look = pack.host.reference_check.faults_of_file
    assert [look(f"{name}.png", SIDE, False) for name in ("deep", "gone", "cut")] == [[]] * 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # ComfyUI 0.33 opens pictures that are too large for Pillow
    assert look("large.png", SIDE, False) == []


def test_a_latent_far_below_what_sdxl_draws_is_named_but_not_the_demo_models(pack, comfy, caplog, monkeypatch):
    tensors = run("stage1_content")
    stage = image_stage(2, 1, 1e-3, 1e-3, rank=2)
    latent = {"samples": torch.ones(1, 4, 32, 48)}
    conditioning = comfy_conditioning(tensors)
    request = pack.host.training_key.TrainingRequest.from_inputs(comfy_model(), latent, conditioning, stage, "fp32")
    pack.host.reference_check.report_faults(request, None)
    assert not caplog.messages
    # As if the small model were SDXL, which has no smaller size than its own.
    monkeypatch.setattr(pack.host.reference_check, "FULL_SIZE_CHANNELS", 0)
    pack.host.reference_check.report_faults(request, None)
    assert "latent is of 384 x 256 pixels, and SDXL draws 1024 x 1024" in caplog.text


def test_load_catalogue_reports_the_faults_of_its_pictures(pack, comfy):
    import folder_paths

    root = Path(folder_paths.get_input_directory()) / "poor"
    for folder, of in (("photos", noisy(picture(DEMO[0]), 25)), ("styles", on_large_page(picture(DEMO[1])))):
        (root / folder).mkdir(parents=True, exist_ok=True)
        of.save(root / folder / f"{folder}.png")
    cut_out("owl-flat").save(root / "photos" / "cut_out.png")
    node = pack.nodes.catalogue.CatalogLoad
    result = node.execute("poor/photos", "poor/styles", "poor", "", "all pairs in one run", 0, "white", SIDE).result
    report = result[4].partition("Poor to learn from:")[2]
    assert "photos.png is noisy" in report and "styles.png is 9" in report and "cut_out" not in report
