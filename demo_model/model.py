"""The demo base model: SDXL's architecture made small, built from ComfyUI's own classes.

256 x 256 pixels, 32 x 32 latents, v-prediction. The UNet has two levels, so that the role blocks
(`output_blocks.0.1` and `output_blocks.1.1`, as in SDXL) see a 16 x 16 grid of tokens.
"""

from pathlib import Path

import comfy.clip_model
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch
from safetensors import safe_open

WEIGHTS = Path(__file__).parent / "weights" / "consislora_demo.safetensors"
TOKENIZER = Path(__file__).parent / "tokenizer"
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "clip": "conditioner."}

SIZE = 256  # pixels
UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=96,
    channel_mult=[1, 2],
    num_res_blocks=[1, 2],
    transformer_depth=[0, 0, 1],
    transformer_depth_middle=1,
    transformer_depth_output=[0, 0, 0, 1, 3],  # most of it where shape is decided: the last is the first block's
    context_dim=192,
    adm_in_channels=128 + 6 * 256,
    num_classes="sequential",
    use_spatial_transformer=True,
    use_linear_in_transformer=True,
    use_temporal_attention=False,
    legacy=False,
)
VAE = dict(
    double_z=True,
    z_channels=4,
    resolution=SIZE,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1, 1, 2, 3],
    num_res_blocks=1,
    attn_resolutions=[],
    dropout=0.0,
)
VOCABULARY, START, END = 1536, 1534, 1535
TOKENS = 32  # a prompt longer than this is read in several pieces, as ComfyUI does with CLIP's 77


def _text_model(width: int, layers: int) -> dict:
    return dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_act="gelu",
        max_position_embeddings=TOKENS,
        eos_token_id=END,
    )


class _TextTransformer(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model, whose vocabulary size is fixed, with a vocabulary of our own size."""

    def __init__(self, config_dict, dtype, device, operations):
        super().__init__(config_dict, dtype, device, operations)
        self.text_model.embeddings.token_embedding = operations.Embedding(
            VOCABULARY, config_dict["hidden_size"], dtype=dtype, device=device
        )


class DemoClip(torch.nn.Module):
    """Two text encoders side by side, as in SDXL: hidden states concatenated, pooled vector from the second."""

    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__()
        common = dict(
            device=device,
            dtype=dtype,
            max_length=TOKENS,
            model_class=_TextTransformer,
            layer="hidden",
            layer_idx=-2,
            special_tokens={"start": START, "end": END, "pad": END},
            layer_norm_hidden_state=False,
            model_options=model_options or {},
        )
        self.clip_l = comfy.sd1_clip.SDClipModel(textmodel_json_config=_text_model(64, 3), **common)
        self.clip_g = comfy.sd1_clip.SDClipModel(textmodel_json_config=_text_model(128, 3), **common)
        self.dtypes = {dtype}

    def set_clip_options(self, options):
        self.clip_l.set_clip_options(options)
        self.clip_g.set_clip_options(options)

    def reset_clip_options(self):
        self.clip_l.reset_clip_options()
        self.clip_g.reset_clip_options()

    def encode_token_weights(self, token_weight_pairs):
        hidden_l, _ = self.clip_l.encode_token_weights(token_weight_pairs["l"])
        hidden_g, pooled = self.clip_g.encode_token_weights(token_weight_pairs["g"])
        return torch.cat([hidden_l, hidden_g], dim=-1), pooled


class DemoTokenizer:
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        common = dict(
            tokenizer_path=str(TOKENIZER),
            max_length=TOKENS,
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data or {},
        )
        self.clip_l = comfy.sd1_clip.SDTokenizer(embedding_size=64, embedding_key="clip_l", **common)
        self.clip_g = comfy.sd1_clip.SDTokenizer(embedding_size=128, embedding_key="clip_g", **common)

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        return {
            "l": self.clip_l.tokenize_with_weights(text, return_word_ids, **kwargs),
            "g": self.clip_g.tokenize_with_weights(text, return_word_ids, **kwargs),
        }

    def untokenize(self, token_weight_pair):
        return self.clip_g.untokenize(token_weight_pair)

    def state_dict(self):
        return {}


class DemoLatents(comfy.latent_formats.SDXL):
    """SDXL's latent format (its scale is folded into the VAE), with the preview colours of this VAE."""

    taesd_decoder_name = None


def widen_groups(module: torch.nn.Module) -> torch.nn.Module:
    """SDXL's 32 groups leave one or two of our few channels in each, and normalising those wipes out flat colour."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            layer.num_groups = 4
    return module


def model_config() -> comfy.supported_models.SDXL:
    config = comfy.supported_models.SDXL(dict(UNET))
    config.latent_format = DemoLatents()
    return config


def build_unet(dtype: torch.dtype, device, manual_cast: torch.dtype | None = None):
    """ComfyUI's SDXL model object around our UNet, weights not yet loaded."""
    config = model_config()
    config.set_inference_dtype(dtype, manual_cast)
    return widen_groups(config.get_model({"v_pred": torch.ones(1)}, device=device))


def load(path: Path = WEIGHTS, disable_dynamic: bool = True):
    """(MODEL, CLIP, VAE) as ComfyUI's CheckpointLoaderSimple would give them.

    disable_dynamic: as ComfyUI's loaders take it; the weights are never moved in a step.
    """
    with safe_open(path, "pt") as file:
        preview = [float(x) for x in file.metadata()["preview_rgb"].split()]
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no dict
    parts = {
        name: comfy.utils.state_dict_prefix_replace(dict(weights), {prefix: ""}, filter_keys=True)
        for name, prefix in PREFIXES.items()
    }
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(device=device, supported_dtypes=model_config().supported_inference_dtypes)
    model = build_unet(dtype, offload, comfy.model_management.unet_manual_cast(dtype, device))
    model.diffusion_model.load_state_dict(parts["unet"])
    model.latent_format.latent_rgb_factors = [preview[row : row + 3] for row in (0, 3, 6, 9)]
    model.latent_format.latent_rgb_factors_bias = preview[12:]
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(DemoTokenizer, DemoClip), parameters=10**6)
    clip.cond_stage_model.load_state_dict(parts["clip"])
    vae = comfy.sd.VAE(sd=parts["vae"], config={"params": {"ddconfig": VAE, "embed_dim": 4}})
    widen_groups(vae.first_stage_model)
    patcher = comfy.model_patcher.ModelPatcher(model, device, offload)
    patcher.cached_patcher_init = load, (path,), 0  # Train LoRA of newer ComfyUI loads the model again by this
    return patcher, clip, vae
