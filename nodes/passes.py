"""How a batch goes through ComfyUI's UNet: each row with its own LoRA mix, equal rows through the encoder once."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ..consislora_core.adapters import Mixer
from ..consislora_core.guidance import Mix, Row, first_equals
from ..consislora_core.lora_file import Part, Source
from ..consislora_core.roles import BLOCKS

ROWS = "consislora_rows"  # in transformer_options: the rows of a guided pass, by index in cond_or_uncond

# Patches that cannot tell how many rows there are; any other may keep something by row, or look for one.
ROWLESS_PATCHES = {"output_block_patch"}


def with_mix(model: ModelPatcher, parts: dict[Source, Part], mix: Mix) -> ModelPatcher:
    """A clone of the model, each pass of which carries the parts at the strengths of `mix`."""
    mixer = Mixer(model.model.diffusion_model, parts)

    def mixed_pass(executor, x, *args, **kwargs):
        with mixer.mixed(executor.class_obj, [mix]):
            return executor(x, *args, **kwargs)

    return _with_wrapper(model, "consislora", mixed_pass, mixer)


def with_guided_pass(
    model: ModelPatcher, parts: dict[Source, Part], mix: Mix, share_encoder: bool = True
) -> ModelPatcher:
    """A clone of the model whose guided passes carry a mix in each row (`ROWS`), and all others carry `mix`."""
    mixer = Mixer(model.model.diffusion_model, parts)
    # A key of its own puts this wrapper inside all others: they must not see a shared batch.
    return _with_wrapper(model, "consislora_guided", GuidedPass(mixer, mix, share_encoder), mixer)


def _with_wrapper(model: ModelPatcher, key: str, wrapper: Callable, mixer: Mixer) -> ModelPatcher:
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, key, wrapper)
    clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, key, lambda patcher: mixer.release())
    return clone


class GuidedPass:
    """Wraps the UNet's forward. A batch is made of chunks: one for each conditioning, holding all the latents."""

    def __init__(self, mixer: Mixer, mix: Mix, share_encoder: bool):
        self.mixer, self.mix, self.share_encoder = mixer, mix, share_encoder

    def __call__(self, executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        unet, rows = executor.class_obj, transformer_options.get(ROWS)
        control = control and fitting(control, x, len(transformer_options["cond_or_uncond"]))
        if rows is None:
            with self.mixer.mixed(unet, [self.mix]):
                return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

        chunks = [rows[index] for index in transformer_options["cond_or_uncond"]]
        # Other packs' patches know two kinds of rows: 0 is cond, 1 is uncond.
        kinds = [int(row.prompt == "negative") for row in chunks]
        options = {**transformer_options, "cond_or_uncond": kinds}
        inputs = [x, timesteps, context, y]
        with ExitStack() as stack:
            stack.enter_context(self.mixer.mixed(unet, [row.mix for row in chunks]))
            if self._may_share(options):
                firsts = first_equals(list(zip(*(tensor.chunk(len(chunks)) for tensor in inputs), strict=True)))
                shared = Sharing(firsts)
                inputs = [shared.narrow(tensor) for tensor in inputs]
                control = control and {place: [shared.narrow(t) for t in ts] for place, ts in control.items()}
                options = stack.enter_context(shared.widening(unet, self._first_block(chunks), options))
            return executor(*inputs, control, options, **kwargs)

    def _may_share(self, options: dict) -> bool:
        strangers = {name for name, patches in options.get("patches", {}).items() if patches} - ROWLESS_PATCHES
        strangers |= {name for name, patches in options.get("patches_replace", {}).items() if patches}
        if strangers and self.share_encoder:
            self.share_encoder = False
            logging.info(
                "ConsisLoRA: the model carries other patches (%s), so each row goes through the whole UNet; "
                "guidance is slower, and the picture the same.",
                ", ".join(sorted(strangers)),
            )
        return self.share_encoder

    def _first_block(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Where rows begin to differ: the output block, and the layer in it, of the first role that acts in one."""
        acting = {source.role for source in self.mixer.sources if any(source in row.mix for row in rows)}
        path = BLOCKS["sdxl"]["style" if acting == {"style"} else "content"]["comfyui"]
        _, block, layer = path.split(".")
        return int(block), int(layer)


def fitting(control: dict[str, list], x: Tensor, chunks: int) -> dict[str, list]:
    """Control for this batch. A T2I adapter keeps what it made for its first, which may have had more or fewer rows."""

    def fit(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or len(tensor) in (1, len(x)):
            return tensor
        return tensor[: len(x) // chunks].repeat(chunks, 1, 1, 1)

    return {place: [fit(tensor) for tensor in tensors] for place, tensors in control.items()}


class Sharing:
    """Equal rows as one, from the input up to the first LoRA, and as many as they are from there.

    firsts: for every row of the batch, the first row that is equal to it.
    """

    def __init__(self, firsts: Sequence[int]):
        self.rows = len(firsts)
        self.kept = sorted(set(firsts))
        self.places = [self.kept.index(first) for first in firsts]

    def narrow(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or len(tensor) == 1:  # no control at this block, or one picture's for all rows
            return tensor
        return tensor.unflatten(0, (self.rows, -1))[self.kept].flatten(0, 1)

    def widen(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (len(self.kept), -1))[self.places].flatten(0, 1)

    @contextmanager
    def widening(self, unet: nn.Module, first: tuple[int, int], options: dict) -> Iterator[dict]:
        """The options for a pass of the narrow batch through the UNet, which gives the wide batch's output."""
        narrow = {**options, **{key: [options[key][row] for row in self.kept] for key in ("cond_or_uncond", "uuids")}}

        def widen_skip(h, skip, transformer_options):
            _, block = transformer_options["block"]
            return h, self.widen(skip) if block > first[0] else skip

        def widen_batch(layer, inputs):
            narrow.update({key: options[key] for key in ("cond_or_uncond", "uuids")})
            return self.widen(inputs[0]), *inputs[1:]

        def widen_condition(layer, inputs):  # the time embedding or the text, where a layer takes one
            return inputs[0], *(self.widen(condition) for condition in inputs[1:2]), *inputs[2:]

        patches = narrow.get("patches", {})
        narrow["patches"] = {**patches, "output_block_patch": [widen_skip, *patches.get("output_block_patch", [])]}
        with ExitStack() as stack:
            for number, block in enumerate(unet.output_blocks):
                for place, layer in enumerate(block):
                    if (number, place) >= first:
                        stack.callback(layer.register_forward_pre_hook(widen_condition).remove)
                    if (number, place) == first:
                        stack.callback(layer.register_forward_pre_hook(widen_batch).remove)
            yield narrow
