"""Frames of a film, sampled so that each looks like the first: chunk by chunk, whatever their number."""

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from einops import rearrange
from torch import Tensor

from .sampling import invert, sample

AT_ONCE = 8  # latents of a chunk, the anchor among them
REPLACED = "consislora_replaced"  # in transformer_options: the places where another pack computes self-attention


class AnchorAttention:
    """Self-attention of every latent also reads the keys and values of the first latent, the anchor.

    ComfyUI's attn1_patch, called with what queries, keys and values are computed from (b tokens channels). The batch
    holds one chunk for each conditioning, with all latents in it. Layers stay as they are where another pack computes
    the attention, as for perturbed attention, or has cut the queries into tiles, as HyperTile does: both count on as
    many keys as the picture has tokens.
    """

    knows_rows = True  # and each row by itself, so that equal rows can share the encoder

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        block = options["block"]
        is_replaced = {block, (*block, options["block_index"])} & options[REPLACED]
        if is_replaced or len(query) != len(key):
            return query, key, value
        read = partial(_with_anchor, rows=len(options["cond_or_uncond"]))
        keys = read(key)
        return query, keys, keys if value is key else read(value)


def _with_anchor(tensor: Tensor, rows: int) -> Tensor:
    latents = rearrange(tensor, "(row latent) n c -> row latent n c", row=rows)
    both = torch.cat([latents, latents[:, :1].expand_as(latents)], 2)
    return rearrange(both, "row latent n c -> (row latent) n c")


def with_anchor_attention(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model whose self-attention also reads the first latent of the batch."""
    clone = model.clone()
    clone.set_model_attn1_patch(AnchorAttention())
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "consislora_anchor", _note_replaced)
    return clone


def _note_replaced(executor: Callable, x, timesteps, context, y, control, transformer_options: dict, **kwargs) -> Any:
    """Says in transformer_options what ComfyUI does not tell an attn1_patch."""
    replaced = frozenset(transformer_options.get("patches_replace", {}).get("attn1", ()))
    return executor(x, timesteps, context, y, control, {**transformer_options, REPLACED: replaced}, **kwargs)


def sample_frames(
    guider: comfy.samplers.CFGGuider,
    inverting: comfy.samplers.CFGGuider,
    latent: dict,
    seed: int,
    sampler_name: str,
    sigmas: Tensor,
) -> dict:
    """Samples frames from their own noise, each beside the first one: a chunk of `AT_ONCE` takes all the memory.

    guider: of a model by `with_anchor_attention`. inverting: a guider that reconstructs the frames. latent: samples n c
    h w, the first is the anchor. Raises ValueError for control with a picture for each of more frames than a chunk has.
    """
    if len(latent["samples"]) > AT_ONCE:
        _check_control(guider)
    count = len(latent["samples"])
    chunks = [[0, *range(start, min(start + AT_ONCE - 1, count))] for start in range(1, max(2, count), AT_ONCE - 1)]
    prompts = {each: each.original_conds for each in (guider, inverting)}
    frames = []
    for number, rows in enumerate(chunks):
        runs = 2 * len(chunks)
        for each, conds in prompts.items():
            each.original_conds = _conds_of(conds, rows)
        noisy = invert(inverting, {"samples": latent["samples"][rows]}, sigmas, run=(2 * number, runs))
        sampled = sample(guider, noisy, seed, sampler_name, sigmas, noise=0, run=(2 * number + 1, runs))
        frames.append(sampled["samples"][min(number, 1) :])
    return {**latent, "samples": torch.cat(frames)}


def _conds_of(conds: dict[str, list[dict]], rows: list[int]) -> dict[str, list[dict]]:
    """The conditionings of these latents: of texts and masks for each frame theirs; fewer begin anew, as in ComfyUI."""

    def chosen(value: Any) -> Any:
        is_batch = torch.is_tensor(value) and value.ndim > 1 and len(value) > 1
        return value[[row % len(value) for row in rows]] if is_batch else value

    return {
        name: [{key: chosen(value) for key, value in cond.items()} for cond in prompt] for name, prompt in conds.items()
    }


def _check_control(guider: comfy.samplers.CFGGuider) -> None:
    """Raises ValueError for a ControlNet with several pictures: every chunk would read those of the first."""
    for control in {cond["control"] for conds in guider.original_conds.values() for cond in conds if "control" in cond}:
        while control:
            if control.cond_hint_original is not None and len(control.cond_hint_original) > 1:
                raise ValueError(
                    "A ControlNet has a picture for each frame, which works up to "
                    f"{AT_ONCE} frames. Give it one picture, leave it out, or sample fewer frames."
                )
            control = control.previous_controlnet
