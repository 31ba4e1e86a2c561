"""Cut-outs, watermarks and backgrounds on a real server, with the demo model."""

import json

import numpy as np
import pytest
from conftest import ROOT
from images import cut_out
from PIL import Image, ImageDraw

from demo.run import IMAGES, nodes

SIDE, BAND = 128, 24  # pixels: the picture, and the watermark across its top and bottom
VIOLET = (200, 0, 200)


@pytest.fixture(scope="module")
def pictures(server, tmp_path_factory):
    """A picture with bands of violet over it, and its mask, in the server's input folder."""
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(IMAGES / "crown-flat.png") as shown:
        clean = shown.convert("RGB").resize((SIDE, SIDE))
    marked, mask = clean.copy(), Image.new("L", clean.size, 255)
    for picture, colour in ((marked, VIOLET), (mask, 0)):
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, 0, SIDE, BAND - 1), colour)
        draw.rectangle((0, SIDE - BAND, SIDE, SIDE), colour)
    for name, picture in {"marked": marked, "mask": mask}.items():
        picture.save(folder / f"{name}.png")
        server.upload(folder / f"{name}.png")
    return clean, np.asarray(mask) == 0


def training(steps: int, **inputs) -> dict:
    """A training on the marked picture, and what draws pictures with it."""
    settings = {"transition_step": 0, "learning_rate": 4e-3, "reconstruction_learning_rate": 4e-3, "rank": 16}
    settings |= {"seed": 0, "precision": "fp32", "preset": "quality", "steps": steps}
    sampling = {"steps": 10, "cfg": 1.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0, "seed": 0}
    strengths = {"content_strength": 1.0, "style_strength": 1.0}
    linked = {
        "base": ("ConsisLoRADemoModel", {}),
        "image": ("LoadImage", {"image": "marked.png"}),
        "mask": ("LoadImageMask", {"image": "mask.png", "channel": "red"}),
        "ones": ("SolidMask", {"value": 1.0, "width": 64, "height": 64}),
        "latent": ("VAEEncode", {"pixels": ["image", 0], "vae": ["base", 2]}),
        "text": ("CLIPTextEncode", {"text": "A [c]", "clip": ["base", 1]}),
        "train": (
            "ConsisLoRATrainImage",
            {"model": ["base", 0], "latent": ["latent", 0], "positive": ["text", 0], **settings, **inputs},
        ),
        "apply": (
            "ConsisLoRAApply",
            {"model": ["base", 0], "content": ["train", 0], "style": ["train", 0], **strengths},
        ),
        "empty": ("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 2}),
        "sample": (
            "KSampler",
            {"model": ["apply", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
            | sampling,
        ),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["base", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "marked"}),
    }
    return {name: {"class_type": kind, "inputs": values} for name, (kind, values) in linked.items()}


def test_a_training_with_a_mask_does_not_learn_the_watermark(server, pictures):
    """Violet is 1 where the picture has the band's own colour, and 0 where it is grey or white."""
    clean, band = pictures
    violet, error = {}, {}
    for name, mask in {"without a mask": {}, "with it": {"mask": ["mask", 0]}}.items():
        made = [np.asarray(Image.open(file), float) for file in server.images(server.run(training(120, **mask)))]
        violet[name] = np.mean([(one[band] @ [0.5, -1, 0.5]).mean() / VIOLET[0] for one in made])
        error[name] = np.mean([abs(one - np.asarray(clean, float))[~band].mean() for one in made])
    for name in violet:
        print(f"{name}: violet in the bands {violet[name]:.2f}, error in the rest {error[name]:.0f} of 255")
    assert violet["without a mask"] > 0.3
    assert abs(violet["with it"]) < 0.05
    assert error["with it"] < 1.15 * error["without a mask"]


def test_a_mask_of_ones_finds_what_was_trained_without_one(server, pictures):
    server.run(training(2))
    before = server.log
    prompt = training(2, mask=["ones", 0])
    prompt["save"]["inputs"]["filename_prefix"] = "again"
    server.run(prompt)
    log = server.log.removeprefix(before)
    assert "image stage: trained before, taken from" in log and "step 2 of 2" not in log


def test_the_shared_workflow_gives_results_the_alpha_and_the_size_of_the_cut_outs(server):
    """Of sizes that are no multiples of 8, in files of several kinds, and of a picture without alpha."""
    root, output = server.base / "input" / "cut", server.base / "output" / "cut"
    for folder in ("subjects", "styles"):
        (root / folder).mkdir(parents=True)
    sources = {
        "crown.png": cut_out("crown-flat", (203, 150)),
        "owl.webp": cut_out("owl-flat", (90, 131)),
        "taxi.jpg": Image.open(IMAGES / "taxi-flat.png").convert("RGB").resize((100, 100)),
    }
    for name, picture in sources.items():
        picture.save(root / "subjects" / name, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
    Image.open(IMAGES / "balloon-halftone.png").save(root / "styles" / "dots.png")
    prompt = json.loads((ROOT / "workflows" / "api" / "catalogue_cut_out_demo.json").read_text(encoding="utf-8"))
    changes = {"contents": "cut/subjects", "styles": "cut/styles", "catalogue": "cut", "run": "all pairs in one run"}
    changes |= {"steps": 2, "transition_step": 1, "rank": 4, "recolourings": 2, "largest_size": 128}
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in changes.items() if name in node["inputs"]}
    made = {file.stem.partition("__")[0]: file for file in server.images(server.run(prompt))}
    for name, source in sources.items():
        with Image.open(made[name.partition(".")[0]]) as result:
            assert (result.mode, result.size) == ("RGBA", source.size)
            assert result.getchannel("A").tobytes() == source.convert("RGBA").getchannel("A").tobytes()
            facts = json.loads(result.text["consislora"])
        assert ("consislora.mask_hash" in facts["content_lora"]) == (source.mode == "RGBA")
        assert "consislora.mask_hash" not in facts["style_lora"]
    assert len(nodes(prompt, "ConsisLoRARecolour")) == 2  # one mask was for all recolourings
    assert {file.parent for file in made.values()} == {output}
