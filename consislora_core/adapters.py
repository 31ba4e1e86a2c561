"""Puts LoRA parts into a UNet, says which learn, mixes them per batch row, and takes them out again."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .foreach import foreach
from .lora_file import LoraLayer, Part, Source
from .roles import Target, targets


def fresh_part(unet: nn.Module, role: str, rank: int, generator: torch.Generator) -> Part:
    """A part at its start, which changes nothing: down ~ N(0, 1/rank^2), up = 0, alpha = rank (PEFT's "gaussian").

    Raises ValueError for a UNet without both role blocks.
    """
    part = {}
    for name, target in targets(dict(unet.named_modules())).items():
        if target.role == role:
            features_in, features_out = _sizes(unet.get_submodule(name), name)
            part[target.layer] = LoraLayer(
                down=torch.randn(rank, features_in, generator=generator) / rank,
                up=torch.zeros(features_out, rank),
                alpha=float(rank),
            )
    return part


class LoraLinear(nn.Module):
    """A frozen linear layer W with LoRA (arXiv 2106.09685) beside it: y = W x + (alpha / rank) up (down x).

    down (loras rank in) and up (loras out rank) are fp32 and compute in x's dtype; `cast` may hold them in it. Each of
    the LoRAs acts on an equal span of x's batch rows.
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, alpha: float):
        super().__init__()
        self.base, self.down, self.up, self.alpha = base, nn.Parameter(down), nn.Parameter(up), alpha
        self.cast: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.base(x), self.alpha / self.down.shape[1]
        down, up = (weight.to(x.dtype) for weight in self.cast or (self.down, self.up))
        if len(down) == 1:  # the same numbers, with gradients that are contiguous as the weights are
            down, up = down.squeeze(0), up.squeeze(0)  # an index would copy its gradient into a tensor of zeros
            hidden = F.linear(x, down).flatten(0, -2)
            return torch.addmm(y.flatten(0, -2), hidden, up.T, alpha=scale).view_as(y)
        xs, ys = (rearrange(rows, "(lora row) ... c -> lora (row ...) c", lora=len(down)) for rows in (x, y))
        return torch.baddbmm(ys, xs @ down.mT, up.mT, alpha=scale).view_as(y)


class _Cast(torch.autograd.Function):
    """Casts tensors to a dtype and their gradients to fp32, in one kernel launch instead of one a tensor."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        return tuple(_cast(tensors, dtype))

    @staticmethod
    def backward(ctx, *grads):
        return None, *_cast(grads, torch.float32)


@torch.no_grad()
def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if cast:
        foreach("copy_", cast, tensors)
    return cast


class Inserted:
    """The LoRA layers in a UNet, fp32: of one LoRA, or of several that act on spans of the batch.

    layers: by target. learns: the roles whose parameters ask for gradients.
    """

    def __init__(self, layers: dict[Target, LoraLinear], learns: tuple[str, ...]):
        self.layers = layers
        self.parameters: list[nn.Parameter] = []  # those that learn, in the order of the UNet
        for target, layer in layers.items():
            for parameter in (layer.down, layer.up):
                parameter.requires_grad_(target.role in learns)
                if parameter.requires_grad:
                    self.parameters.append(parameter)

    @contextmanager
    def cast(self, dtype: torch.dtype) -> Iterator[None]:
        """Within the context the layers compute with copies of their weights in `dtype`, which pass gradients on."""
        if dtype == torch.float32:
            yield
            return
        layers = self.layers.values()
        weights = [weight for layer in layers for weight in (layer.down, layer.up)]
        learn = iter(_Cast.apply(dtype, *self.parameters))
        stay = iter(_cast([weight for weight in weights if not weight.requires_grad], dtype))
        for layer in layers:
            layer.cast = tuple(next(learn if weight.requires_grad else stay) for weight in (layer.down, layer.up))
        try:
            yield
        finally:
            for layer in layers:
                layer.cast = None

    def parts(self, lora: int = 0) -> dict[str, Part]:
        """Copies of the weights of one LoRA as they are now, by role, on the CPU."""
        parts: dict[str, Part] = {}
        for target, layer in self.layers.items():
            down, up = (weight[lora].detach().cpu().clone() for weight in (layer.down, layer.up))
            parts.setdefault(target.role, {})[target.layer] = LoraLayer(down, up, layer.alpha)
        return parts


@contextmanager
def inserted(
    unet: nn.Module, loras: Sequence[Mapping[str, Part]], learns: tuple[str, ...], device: torch.device
) -> Iterator[Inserted]:
    """Within the context LoRAs act on the UNet, and those of their parts whose role is in `learns` ask for gradients.

    loras: the parts of each by role; one LoRA acts on all batch rows, several, of one rank and alpha, on equal spans of
    them. Afterwards, also after an error, the UNet's modules and `requires_grad` flags are what they were. Raises
    ValueError for a part that does not fit the UNet.
    """
    for parts in loras:
        check_fit(unet, parts)
    names = {
        name: target
        for name, target in targets(dict(unet.named_modules())).items()
        if target.layer in loras[0].get(target.role, ())
    }
    originals = {name: unet.get_submodule(name) for name in names}
    flags = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    layers = {}
    for name, target in names.items():
        layer = _stacked([parts[target.role][target.layer] for parts in loras])
        layers[target] = LoraLinear(originals[name], layer.down.to(device), layer.up.to(device), layer.alpha)
    try:
        unet.requires_grad_(False)
        for name, target in names.items():
            _put(unet, name, layers[target])
        yield Inserted(layers, learns)
    finally:
        for name, original in originals.items():
            _put(unet, name, original)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _put(unet: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    unet.get_submodule(parent)._modules[child] = layer


def _stacked(layers: Sequence[LoraLayer]) -> LoraLayer:
    """Copies of one layer of several LoRAs: down (loras rank in), up (loras out rank), fp32."""
    downs, ups, alphas = zip(*layers, strict=True)
    return LoraLayer(torch.stack(downs).detach().float(), torch.stack(ups).detach().float(), alphas[0])


class Addition(NamedTuple):
    """What a layer's parts add to its output, in neighbouring batch rows: y += strength (x down) up.

    down: in r; up: r out; both of one part, or of several, one after the other. strength: one number, or rows 1 r;
    alpha / rank is in it. rows: those that change, of the `batch` that there are.
    """

    down: Tensor
    up: Tensor
    strength: float | Tensor
    rows: slice
    batch: int

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (row copy) ... in. y: (row copy) ... out, changed in place. Every operator here is time on the host."""
        x, y = x.flatten(0, -2), y.view(-1, self.up.shape[1])
        if self.rows.stop - self.rows.start < self.batch:
            size = x.shape[0] // self.batch
            rows = slice(self.rows.start * size, self.rows.stop * size)
            x, y = x[rows], y[rows]
        hidden = torch.mm(x, self.down)
        if isinstance(self.strength, float):
            y.addmm_(hidden, self.up, alpha=self.strength)
        else:
            hidden.view(self.strength.shape[0], -1, self.strength.shape[2]).mul_(self.strength)
            y.addmm_(hidden, self.up)


@lru_cache(maxsize=16)
def _acting(mixes: tuple[frozenset, ...], parts: tuple[tuple[Source, int, float], ...]) -> tuple | None:
    """Where parts act and how strongly: a slice of the rows, one of the ranks, and `Addition`'s strength.

    mixes: the items of each row's mix. parts: of a layer, each with its rank and its alpha / rank.
    """
    strengths = torch.tensor([[dict(mix).get(source, 0.0) * scale for source, _, scale in parts] for mix in mixes])
    strengths = strengths.repeat_interleave(torch.tensor([rank for _, rank, _ in parts]), 1)  # rows r
    if not strengths.any():
        return None
    rows, ranks = (slice(min(places), max(places) + 1) for places in strengths.nonzero().T.tolist())
    acting = strengths[rows, ranks]
    return rows, ranks, acting[0, 0].item() if (acting == acting[0, 0]).all() else acting[:, None]


class Mixer:
    """LoRA parts that act beside a UNet's own weights, in every batch row with strengths of its own.

    A layer's output becomes y = W x + sum_p s_p (alpha_p / rank_p) up_p (down_p x), s_p the row's strength of part p.
    parts: by the image and role they come from. Raises ValueError for a part that does not fit the UNet.
    """

    def __init__(self, unet: nn.Module, parts: Mapping[Source, Part]):
        self.layers: dict[str, dict[Source, LoraLayer]] = {}  # by the module's name
        names = {target: name for name, target in targets(dict(unet.named_modules())).items()}
        for source, part in parts.items():
            check_fit(unet, {source.role: part})
            for path, layer in part.items():
                self.layers.setdefault(names[Target(source.role, path)], {})[source] = layer
        self.handles: dict[nn.Module, list] = {}  # of the hooks, by the UNet
        self.rows: dict[nn.Module, dict[str, tuple]] = {}  # of the pass through a UNet, by role: each row's mix
        self.additions: dict[tuple, Addition | None] = {}
        self.placed: dict[tuple, list[Tensor]] = {}

    def attach(self, unet: nn.Module) -> None:
        """Puts the hooks into a UNet that `mixed` then needs not put in for each pass, until `detach`."""
        if unet not in self.handles:
            self.handles[unet] = []
            for name, (source, *_) in self.layers.items():
                hook = partial(self._add, unet, name, source.role)
                self.handles[unet].append(unet.get_submodule(name).register_forward_hook(hook))

    def detach(self, unet: nn.Module) -> None:
        """Takes the hooks out of a UNet, and frees the copies of the weights on other devices."""
        self._take_out(unet)
        self.additions.clear()
        self.placed.clear()

    def _take_out(self, unet: nn.Module) -> None:
        for handle in self.handles.pop(unet, ()):
            handle.remove()

    @contextmanager
    def mixed(self, unet: nn.Module, rows: Mapping[str, Sequence[Mapping[Source, float]]]) -> Iterator[None]:
        """Within the context the parts act on a batch through the UNet, in each role's block as its `rows` say.

        rows: by role, for each batch row in its block, the strength of every part that acts. The batch may be any
        multiple of the rows, with each row's copies side by side.
        """
        attached = unet in self.handles
        self.attach(unet)
        self.rows[unet] = {role: tuple(frozenset(mix.items()) for mix in mixes) for role, mixes in rows.items()}
        try:
            yield
        finally:
            del self.rows[unet]
            if not attached:
                self._take_out(unet)

    def _add(self, unet: nn.Module, name: str, role: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        """The hook of a layer, which does nothing except in a pass."""
        if unet not in self.rows:
            return
        x, mixes = inputs[0], self.rows[unet][role]
        key = name, mixes, x.device, x.dtype
        if key not in self.additions:
            self.additions[key] = self._addition(*key)
        if addition := self.additions[key]:
            addition.add(x, output)

    @torch.inference_mode(False)  # whose tensors autograd refuses when a mixed model is trained
    def _addition(self, name: str, mixes: tuple, device: torch.device, dtype: torch.dtype) -> Addition | None:
        """What a layer's parts add in rows with these mixes; None if no part acts."""
        layers = self.layers[name]
        parts = tuple((source, layer.rank, layer.alpha / layer.rank) for source, layer in layers.items())
        if (acting := _acting(mixes, parts)) is None:
            return None
        rows, ranks, strength = acting
        if (key := (name, device, dtype)) not in self.placed:
            sides = zip(*((layer.down, layer.up.T) for layer in layers.values()), strict=True)  # r in, r out
            self.placed[key] = [torch.cat([part.to(dtype) for part in side]).to(device) for side in sides]
        down, up = (weight[ranks] for weight in self.placed[key])
        return Addition(down.T, up, strength if isinstance(strength, float) else strength.to(device), rows, len(mixes))


def check_fit(unet: nn.Module, parts: Mapping[str, Part]) -> None:
    """Raises ValueError for parts that were trained on a UNet with other layers.

    A part need not adapt all layers of a transformer block, but it was trained on as many blocks as the UNet has.
    """
    layers = {target: unet.get_submodule(name) for name, target in targets(dict(unet.named_modules())).items()}
    for role, part in parts.items():
        expected = {target.layer: layer for target, layer in layers.items() if target.role == role}
        if _blocks(part) != _blocks(expected):
            raise ValueError(
                f"The {role} LoRA has {len(part)} layers where this model has {len(expected)}, and in other "
                "transformer blocks: it was trained on another architecture."
            )
        for path, (down, up, _) in part.items():
            sizes = _sizes(expected[path], path)
            if (down.shape[1], up.shape[0]) != sizes:
                raise ValueError(
                    f"The {role} LoRA fits layers of {down.shape[1]} to {up.shape[0]} features where this model has "
                    f"{sizes[0]} to {sizes[1]} ({path}): it was trained on another architecture."
                )


def _sizes(layer: nn.Module, name: str) -> tuple[int, int]:
    if not (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
        raise ValueError(
            f"This model has layers of a kind that LoRA does not know: {name} ({type(layer).__qualname__}) does not "
            "say how many features it takes. Load the checkpoint in fp16, bf16 or fp8."
        )
    return layer.in_features, layer.out_features


def _blocks(layers: Iterable[str]) -> set[str]:
    """The transformer blocks in which layers of a part lie."""
    return {layer.partition(".attn")[0] for layer in layers}
