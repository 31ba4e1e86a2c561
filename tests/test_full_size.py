"""SDXL and its relatives at full size and random weights: `python tests -m slow`. Needs 16 GB of memory, 10 of disk."""

import json
import math

import numpy
import pytest
import torch
from PIL import Image

from benchmarks.trainers import SDXL_UNET
from consislora_core import lora_file

pytestmark = pytest.mark.slow

VAE = dict(double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4],
           num_res_blocks=2, attn_resolutions=[], dropout=0.0)  # fmt: skip


# SDXL's smaller relatives: their public configurations, as far as they differ from SDXL's.
RELATIVES = {
    "SDXL": {},
    "SSD-1B": dict(
        transformer_depth=[0, 0, 2, 2, 4, 4], transformer_depth_output=[0, 0, 0, 1, 1, 2, 10, 4, 4],
        transformer_depth_middle=-1,
    ),
    "Segmind Vega": dict(
        transformer_depth=[0, 0, 1, 1, 2, 2], transformer_depth_output=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        transformer_depth_middle=-1,
    ),
    "KOALA-700M": dict(
        num_res_blocks=[1, 1, 1], transformer_depth=[0, 2, 5], transformer_depth_output=[0, 0, 2, 2, 5, 5],
        transformer_depth_middle=-2,
    ),
    "KOALA-1B": dict(
        num_res_blocks=[1, 1, 1], transformer_depth=[0, 2, 6], transformer_depth_output=[0, 0, 2, 2, 6, 6],
        transformer_depth_middle=6,
    ),
}  # fmt: skip
LAYER = 1_409_024  # values of a LoRA of rank 64 on one transformer layer of these


def checkpoint_shapes(relative: str = "SDXL") -> dict[str, list[int]]:
    """Every tensor of an SDXL checkpoint file, by name, as ComfyUI's own Save Checkpoint would write it."""
    import comfy.ldm.models.autoencoder
    import comfy.sdxl_clip
    import comfy.supported_models

    config = comfy.supported_models.SDXL({**SDXL_UNET, **RELATIVES[relative]})
    config.set_inference_dtype(torch.float16, None)
    with torch.device("meta"):
        model = config.get_model({}, device="meta")
        clip = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16)
        vae = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=VAE, embed_dim=4)
        tensors = config.process_unet_state_dict_for_saving(model.diffusion_model.state_dict())
        tensors |= config.process_clip_state_dict_for_saving(clip.state_dict())
        tensors |= config.process_vae_state_dict_for_saving(vae.state_dict())
    return {name: list(tensor.shape) for name, tensor in tensors.items() if tensor.is_floating_point()}


def write_random(path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file, written piece by piece, for as a whole it would take half the memory."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = numpy.random.default_rng(0).normal(0, 0.02, 1_000_003).astype("<f2")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            untrained = numpy.full(shape[:1], name.endswith("weight"), "<f2")  # scales 1, biases 0
            file.write((numpy.resize(noise, shape) if len(shape) > 1 else untrained).tobytes())


@pytest.fixture(params=RELATIVES)
def relative(request):
    return request.param


@pytest.fixture
def checkpoint(comfy, server, relative):
    path = server.base / "models" / "checkpoints" / f"random_{relative}.safetensors"
    write_random(path, checkpoint_shapes(relative))
    yield path.name
    path.unlink()


def test_a_full_size_checkpoint_trains_and_samples(server, relative, checkpoint):
    nodes = {
        "base": ("CheckpointLoaderSimple", dict(ckpt_name=checkpoint)),
        "photo": ("EmptyImage", dict(width=512, height=512, batch_size=1, color=0x3366CC)),
        "latent": ("VAEEncode", dict(pixels=["photo", 0], vae=["base", 2])),
        "prompt": ("CLIPTextEncode", dict(text="A [c]", clip=["base", 1])),
        "train": ("ConsisLoRATrainImage", dict(
            model=["base", 0], latent=["latent", 0], positive=["prompt", 0], steps=2, transition_step=1,
            learning_rate=2e-4, reconstruction_learning_rate=1e-4, rank=64, seed=0, precision="auto")),
        "save": ("ConsisLoRASave", dict(consislora=["train", 0], filename=f"full_size_{relative}", precision="fp16")),
        "apply": ("ConsisLoRAApply", dict(
            model=["base", 0], content=["train", 0], style=["train", 0], content_strength=1.0, style_strength=1.0)),
        "canvas": ("EmptyLatentImage", dict(width=512, height=512, batch_size=1)),
        "sample": ("KSampler", dict(
            model=["apply", 0], positive=["prompt", 0], negative=["prompt", 0], latent_image=["canvas", 0], seed=0,
            steps=1, cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0)),
        "decode": ("VAEDecode", dict(samples=["sample", 0], vae=["base", 2])),
        "picture": ("SaveImage", dict(images=["decode", 0], filename_prefix="full_size")),
    }  # fmt: skip
    prompt = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    (picture,) = server.images(server.run(prompt, timeout=3600))

    with Image.open(picture) as image:
        assert image.size == (512, 512)
        assert numpy.ptp(numpy.asarray(image)) > 0  # NaN would come out as plain black
    lora = lora_file.read(server.base / "models" / "loras" / f"full_size_{relative}_00001.safetensors")
    layers = [layer for part in lora.parts.values() for layer in part.values()]
    depth = sum(
        {**SDXL_UNET, **RELATIVES[relative]}["transformer_depth_output"][-2:]
    )  # ComfyUI takes them from the end
    assert sum(layer.down.numel() + layer.up.numel() for layer in layers) == LAYER * depth
    assert all(layer.up.isfinite().all() and layer.up.any() for layer in layers)
