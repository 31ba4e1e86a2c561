"""A batch with a LoRA mix in each row, through ComfyUI's UNet; equal rows share the encoder."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from einops import repeat
from torch import Tensor, nn

from ..consislora_core.adapters import Mixer
from ..consislora_core.guidance import Mix, Row, first_equals
from ..consislora_core.lora_file import Part, Source
from ..consislora_core.roles import BLOCKS, ROLES

ROWS = "consislora_rows"  # in transformer_options: the rows of a guided pass, by index in cond_or_uncond

# Where each role's block begins: the output block's number, and the layer's number in it.
STARTS = {role: tuple(map(int, BLOCKS["sdxl"][role]["comfyui"].split(".")[1:])) for role in ROLES}

# Patches that cannot depend on the number of rows; any other may look for a row, or keep something for each.
ROWLESS_PATCHES = {"output_block_patch"}


def with_mix(model: ModelPatcher, parts: dict[Source, Part], mix: Mix) -> ModelPatcher:
    """A clone of the model in which the parts act at the strengths of `mix`, in every forward pass.

    Raises ValueError for a part that does not fit the model.
    """
    mixer = Mixer(model.model.diffusion_model, {source: part for source, part in parts.items() if source in mix})

    @torch.compiler.disable  # which does not notice hooks that come and go, and would leave LoRAs out
    def mixed_pass(executor, x, *args, **kwargs):
        with mixer.mixed(executor.class_obj, dict.fromkeys(ROLES, [mix])):
            return executor(x, *args, **kwargs)

    return _with_wrapper(model, "consislora", mixed_pass, mixer)


def with_guided_pass(
    model: ModelPatcher, parts: dict[Source, Part], mix: Mix, share_encoder: bool = True
) -> ModelPatcher:
    """A clone of the model: a pass whose transformer_options hold `ROWS` has a mix in each row, any other has `mix`.

    share_encoder: rows with equal inputs go through the encoder as one; the numbers are the same up to rounding.
    Raises ValueError for a part that does not fit the model.
    """
    guided = GuidedPass(Mixer(model.model.diffusion_model, parts), mix, share_encoder)
    # A key of its own puts this wrapper inside all others: they must not see a shared batch.
    return _with_wrapper(model, "consislora_guided", guided, guided)


def _with_wrapper(model: ModelPatcher, key: str, wrapper: Callable, attachable: "Mixer | GuidedPass") -> ModelPatcher:
    """A clone with a wrapper, whose hooks are put in once a sampling, into the UNet of every GPU that takes part."""
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)
    for event, act in ((CallbacksMP.ON_PRE_RUN, attachable.attach), (CallbacksMP.ON_CLEANUP, attachable.detach)):
        clone.add_callback_with_key(event, key, lambda patcher, act=act: act(patcher.model.diffusion_model))
    return clone


class GuidedPass:
    """Wraps the UNet's forward pass. ComfyUI's batch holds one chunk for each conditioning, with all latents in it."""

    def __init__(self, mixer: Mixer, mix: Mix, share_encoder: bool):
        self.mixer, self.mix, self.share_encoder = mixer, mix, share_encoder
        self.widenings: dict[nn.Module, Widening] = {}

    def attach(self, unet: nn.Module) -> None:
        """Puts the hooks into a UNet that passes then need not put in, until `detach`."""
        self.mixer.attach(unet)
        if unet not in self.widenings:
            self.widenings[unet] = Widening(unet)

    def detach(self, unet: nn.Module) -> None:
        """Takes the hooks out again."""
        self.mixer.detach(unet)
        if widening := self.widenings.pop(unet, None):
            widening.close()

    @torch.compiler.disable  # which does not notice hooks that come and go, and would leave LoRAs out
    def __call__(self, executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        unet, rows = executor.class_obj, transformer_options.get(ROWS)
        control = control and _resized(control, x, len(transformer_options["cond_or_uncond"]))
        if rows is None:
            with self.mixer.mixed(unet, dict.fromkeys(ROLES, [self.mix])):
                return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

        chunks = [rows[index] for index in transformer_options["cond_or_uncond"]]
        # Patches of other packs know two kinds of rows: 0 is cond, 1 is uncond.
        kinds = [int(row.prompt == "negative") for row in chunks]
        options = {**transformer_options, "cond_or_uncond": kinds}
        inputs = [x, timesteps, context, y]
        mixes = dict.fromkeys(ROLES, [row.mix for row in chunks])
        with ExitStack() as stack:
            if self._can_share(options):
                widening = self.widenings.get(unet) or stack.enter_context(closing(Widening(unet)))
                shared = widening.shared_rows(chunks, inputs, options["uuids"])
                mixes = {role: [chunks[row].mix for row in shared.kept[role]] for role in ROLES}
                inputs = [shared.narrow(tensor) for tensor in inputs]
                control = control and {place: [shared.narrow(t) for t in ts] for place, ts in control.items()}
                options = stack.enter_context(widening.of(shared, options))
            stack.enter_context(self.mixer.mixed(unet, mixes))
            return executor(*inputs, control, options, **kwargs)

    def _can_share(self, options: dict) -> bool:
        others = {
            name
            for name, patches in options.get("patches", {}).items()
            if any(not getattr(patch, "knows_rows", False) for patch in patches)
        } - ROWLESS_PATCHES
        others |= {name for name, patches in options.get("patches_replace", {}).items() if patches}
        if others and self.share_encoder:
            self.share_encoder = False
            logging.info(
                "ConsisLoRA: the model carries other patches (%s), so each row goes through the whole UNet; "
                "guidance is slower, and the picture the same.",
                ", ".join(sorted(others)),
            )
        return self.share_encoder


def _resized(control: dict[str, list], x: Tensor, chunks: int) -> dict[str, list]:
    """Control for this batch: a T2I adapter caches its output for the first batch, which may have had another size."""

    def resize(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or len(tensor) in (1, len(x)):
            return tensor
        return repeat(tensor[: len(x) // chunks], "latent c h w -> (chunk latent) c h w", chunk=chunks)

    return {place: [resize(tensor) for tensor in tensors] for place, tensors in control.items()}


class SharedRows:
    """Computes equal rows of a guided pass once, as far as they are equal.

    The UNet is walked in three sections: "encoder", up to the content block, where rows with equal inputs are one;
    "content", up to the style block, where rows with equal content parts besides are one; "style", the rest, where each
    row is computed by itself.

    firsts: by section, for every row of the batch, the first row that is equal to it. kept: by section, those rows.
    """

    def __init__(self, rows: Sequence[Row], inputs: Sequence[Tensor]):
        encoder = first_equals(list(zip(*(tensor.chunk(len(rows)) for tensor in inputs), strict=True)))
        content = [(first, _of_role(row.mix, "content")) for first, row in zip(encoder, rows, strict=True)]
        self.firsts = {
            "encoder": encoder,
            "content": [content.index(key) for key in content],
            "style": list(range(len(rows))),
        }
        self.kept = {section: sorted(set(firsts)) for section, firsts in self.firsts.items()}
        # Rows with content parts side by side: a mixer computes from the first of them to the last.
        self.kept["content"].sort(key=lambda row: not _of_role(rows[row].mix, "content"))

    def narrow(self, tensor: Tensor | None) -> Tensor | None:
        """The rows of the encoder section from those of the batch."""
        if tensor is None or len(tensor) == 1:  # no control at this block, or one image's for all rows
            return tensor
        return _chosen_rows(tensor, len(self.firsts["encoder"]), self.kept["encoder"])

    def widen(self, tensor: Tensor, before: str, after: str) -> Tensor:
        """The rows of one section from those of an earlier section."""
        places = [self.kept[before].index(self.firsts[before][row]) for row in self.kept[after]]
        if places == list(range(len(self.kept[before]))):
            return tensor
        return _chosen_rows(tensor, len(self.kept[before]), places)


class Widening:
    """The hooks by which a UNet's batch becomes wider between the sections. They do nothing except in a shared pass.

    known: the shared rows of every batch so far, by the prompts and ComfyUI's uuids of its rows: only the first such
    batch is compared by its values, for which the CPU waits for a GPU.
    """

    def __init__(self, unet: nn.Module):
        self.known: dict[tuple, SharedRows] = {}
        self.shared: SharedRows | None = None
        self.options: dict = {}  # transformer_options of the narrow pass
        self.per_row: dict[str, dict[str, list]] = {}  # by section, what of them has an entry for each row
        # Each condition, narrow and wide, by section and id; the narrow one is held so that no other gets its id.
        self.conditions: dict[tuple, tuple[Tensor, Tensor]] = {}
        batch_hooks = {
            STARTS["content"]: partial(self._widen_batch, "encoder", "content"),
            STARTS["style"]: partial(self._widen_batch, "content", "style"),
        }
        self.handles = []
        for number, block in enumerate(unet.output_blocks):
            for place, layer in enumerate(block):
                hook = partial(self._widen_condition, _section_at((number, place)))
                self.handles.append(layer.register_forward_pre_hook(hook))
                if hook := batch_hooks.get((number, place)):
                    self.handles.append(layer.register_forward_pre_hook(hook))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()

    def shared_rows(self, rows: Sequence[Row], inputs: Sequence[Tensor], uuids: Sequence) -> SharedRows:
        """Which rows of a batch are equal. inputs: the UNet's, of the whole batch."""
        key = tuple((row.prompt, uuid) for row, uuid in zip(rows, uuids, strict=True))
        if key not in self.known:
            self.known[key] = SharedRows(rows, inputs)
        return self.known[key]

    @contextmanager
    def of(self, shared: SharedRows, options: dict) -> Iterator[dict]:
        """Yields the options for a pass of the narrow batch, which becomes wider on its way."""
        per_row = {
            section: {key: [options[key][row] for row in rows] for key in ("cond_or_uncond", "uuids")}
            for section, rows in shared.kept.items()
        }
        patches = options.get("patches", {})
        skips = [self._widen_skip, *patches.get("output_block_patch", [])]
        narrow = {**options, **per_row["encoder"], "patches": {**patches, "output_block_patch": skips}}
        self.shared, self.options, self.per_row = shared, narrow, per_row
        try:
            yield narrow
        finally:
            self.shared = None
            self.conditions.clear()

    def _widen_skip(self, h, skip, transformer_options):
        _, block = transformer_options["block"]
        return h, self.shared.widen(skip, "encoder", _section_at((block, 0)))

    def _widen_batch(self, before, after, layer, inputs):
        if self.shared is None:
            return None
        self.options.update(self.per_row[after])
        return self.shared.widen(inputs[0], before, after), *inputs[1:]

    def _widen_condition(self, section, layer, inputs):
        """Widens the time embedding or the text, where a layer takes one."""
        if self.shared is None or len(inputs) == 1:
            return None
        h, condition, *others = inputs
        key = section, id(condition)
        if key not in self.conditions:
            self.conditions[key] = condition, self.shared.widen(condition, "encoder", section)
        return h, self.conditions[key][1], *others


def _chosen_rows(tensor: Tensor, count: int, rows: list[int]) -> Tensor:
    """Some of a tensor's `count` rows, each of which holds all latents. Nothing in it waits for a GPU."""
    chunks = tensor.chunk(count)
    return torch.cat([chunks[row] for row in rows])


def _of_role(mix: Mix, role: str) -> Mix:
    return {source: strength for source, strength in mix.items() if source.role == role}


def _section_at(place: tuple[int, int]) -> str:
    """The section that a layer of the output blocks is in."""
    return next((role for role in reversed(ROLES) if place >= STARTS[role]), "encoder")
