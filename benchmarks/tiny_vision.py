"""CLIP and DINOv2 with few layers and random weights: for tests, and as a node for trials of photos.py."""

import json
import tempfile
from pathlib import Path

import torch

VIT = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
CLIP = {**VIT, "image_size": 224, "patch_size": 32, "projection_dim": 16, "num_channels": 3, "hidden_act": "quick_gelu"}
DINO = {**VIT, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "image_size": 518}
CONFIGS = {"clip": {**CLIP, "model_type": "clip_vision_model"}, "dinov2": {**DINO, "model_type": "dinov2"}}


def tiny_encoder(kind: str):
    """A CLIP_VISION of a kind in CONFIGS."""
    import comfy.clip_vision

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        config = Path(folder, "config.json")
        config.write_text(json.dumps(CONFIGS[kind]))
        torch.manual_seed(0)
        encoder = comfy.clip_vision.ClipVisionModel(config)
        for parameter in encoder.model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return encoder


class TinyVision:
    CATEGORY = "testing"
    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (list(CONFIGS),)}}

    def make(self, kind):
        return (tiny_encoder(kind),)


NODE_CLASS_MAPPINGS = {"TinyVision": TinyVision}
