"""A training request, and its key: a hash of all that decides what the training gives."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..consislora_core.lora_file import Part
from ..consislora_core.schedule import Stage
from ..consislora_core.store import METHOD, Unhashable, fingerprint
from .masks import acting, latent_mask
from .model_inputs import check_latent, check_picture_in, check_roles, check_text
from .training_model import is_flow, options_that_act, training_dtype, wrappers_that_act

# Of a conditioning: where, when and beside what a sampler applies it. Training reads none of it.
FOR_SAMPLERS = {
    "control", "control_apply_to_uncond", "area", "strength", "mask", "mask_strength", "set_area_to_bounds",
    "start_percent", "end_percent", "hooks", "gligen", "default",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class TrainingRequest:
    """All that decides what a training gives.

    latent: ComfyUI's, with the samples (b c h w) of one image, or of several of one subject. positive: one
    conditioning. frozen: parts that act but do not learn, by role. mask: what of the latents counts (b 1 h w, 0 to 1);
    None: everything.
    """

    model: ModelPatcher
    latent: dict
    positive: list
    stage: Stage
    dtype: torch.dtype
    frozen: Mapping[str, Part]
    base_hash: str  # `base_fingerprint` of the model
    mask: Tensor | None = None

    @classmethod
    def from_inputs(
        cls,
        model: ModelPatcher,
        latent: dict,
        positive: list,
        stage: Stage,
        precision: str,
        frozen: Mapping[str, Part] | None = None,
        mask: Tensor | None = None,
    ) -> "TrainingRequest":
        """From the inputs of a node. Raises ValueError, naming the input, for one that does not fit the model."""
        check_roles(model)
        is_flow(model)  # refuses a model that the method cannot train
        check_latent(model, latent, "latent")
        check_picture_in(latent, "latent", "Training")
        check_text(model, positive, "positive")
        if (count := _count(positive)) > 1:
            raise ValueError(f"positive holds {count} texts; training takes one. Connect a single CLIP Text Encode.")
        positive = _as_trained(positive)
        dtype = training_dtype(model, precision)
        mask = None if mask is None else latent_mask(mask, latent["samples"])
        return cls(model, latent, positive, stage, dtype, frozen or {}, base_fingerprint(model), mask)

    def for_each_image(self) -> list["TrainingRequest"]:
        """The same for each image of the latent by itself."""
        images = self.latent["samples"].split(1)
        masks = [None] * len(images) if self.mask is None else map(acting, self.mask.split(1))
        return [replace(self, latent={"samples": image}, mask=mask) for image, mask in zip(images, masks, strict=True)]

    @cached_property
    def key(self) -> str | None:
        """The name of the training in the store; None for a model or text that code of other nodes changes."""
        # Only where they are in use, so that what was trained before there was a choice keeps its name.
        flow = {"flow": True} if is_flow(self.model) else {}
        mask = {} if self.mask is None else {"mask": self.mask}
        wrapped = {"wrapped": wrappers} if (wrappers := self.model.weight_wrapper_patches) else {}
        try:
            return fingerprint(
                {
                    **flow,
                    **mask,
                    **wrapped,
                    "code": METHOD,
                    "base": self.base_hash,
                    "changes": _changes(self.model),
                    "latent": self.latent["samples"],
                    "positive": self.positive,
                    "stage": self.stage.facts(),
                    "frozen": self.frozen,
                    "dtype": str(self.dtype),
                }
            )
        except Unhashable as error:
            logging.info("ConsisLoRA: not looked up in the store of trained LoRAs and not kept there: %s.", error)
            return None


def _count(positive: list) -> int:
    """How many texts a conditioning holds, or pictures to paint in; they may be rows of one tensor."""
    text, extras = positive[0]
    tensors = text, extras.get("pooled_output"), extras.get("concat_latent_image")
    return max(len(positive), *(len(tensor) for tensor in tensors if torch.is_tensor(tensor)))


def _as_trained(positive: list) -> list:
    """One conditioning without what is `FOR_SAMPLERS`, so that the training has the same key with and without it."""
    ((text, extras),) = positive
    left_out = FOR_SAMPLERS & extras.keys()
    if left_out:
        logging.info(
            "ConsisLoRA: positive has %s, which training does not read: the text is learned as it is.",
            ", ".join(sorted(left_out)),
        )
    return [[text, {name: value for name, value in extras.items() if name not in left_out}]]


def base_fingerprint(model: ModelPatcher) -> str:
    """16 hex digits that name a base model: SHA-256 of samples of every weight, as stored and without patches."""
    with model.use_ejected():
        names = [f"diffusion_model.{name}" for name, _ in model.model.diffusion_model.named_parameters()]
        weights = {name: _sample(_stored_weight(model, name)) for name in names}
    return fingerprint([str(model.model.model_config.unet_config), weights])[:16]


def _stored_weight(model: ModelPatcher, name: str) -> Tensor:
    """A weight without the patches laid into it. ComfyUI's own `get_key_patches` fails for models it has quantised."""
    if name in model.hook_backup:
        return model.hook_backup[name][0]
    return model.backup[name].weight if name in model.backup else model.model.get_parameter(name)


def tensor_fingerprint(tensor: Tensor) -> str:
    """16 hex digits of the SHA-256 of a tensor's values in fp32."""
    return hashlib.sha256(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()[:16]


def _sample(tensor: Tensor) -> Tensor | list:
    """All of a small tensor; 16 spans of 64 values of a large one, for what changes a model changes whole layers.

    Spans, because a weight may still be on the disk, where single values would read as many pages. Of a quantised
    weight, the same of each tensor in it or of its bytes.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        return [_sample(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    flat = tensor.detach().as_subclass(Tensor).reshape(-1)
    return flat if len(flat) <= 1024 else flat[: len(flat) // 16 * 16].view(16, -1)[:, :64].cpu()


def _changes(model: ModelPatcher) -> list:
    """What nodes have changed of the base model, as far as training depends on it, in a form for `fingerprint`."""
    sampling = model.get_model_object("model_sampling")
    numbers = {name: value for name, value in vars(sampling).items() if isinstance(value, (int, float, str))}
    return [
        [kind.__qualname__ for kind in (*type(model.model).__mro__, *type(sampling).__mro__)],
        type(model.model.latent_format).__qualname__,
        numbers,
        dict(sampling.named_buffers()),
        {key: _plain(patches) for key, patches in model.patches.items() if key.startswith("diffusion_model.")},
        {key: value for key, value in model.object_patches.items() if key != "model_sampling"},
        [wrappers_that_act(model), model.callbacks, model.injections, options_that_act(model)],
    ]


def _plain(patch: Any) -> Any:
    """A weight patch as plain values: patches are nested lists of strengths, tensors, adapters and plain functions."""
    if isinstance(patch, (list, tuple)):
        return [_plain(item) for item in patch]
    if isinstance(patch, WeightAdapterBase):
        return [type(patch).__qualname__, _plain(patch.weights)]
    if isinstance(patch, FunctionType) and not patch.__closure__:
        return f"{patch.__module__}.{patch.__qualname__}"
    return _sample(patch) if torch.is_tensor(patch) else patch
