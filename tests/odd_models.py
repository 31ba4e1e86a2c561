"""Models as other loaders leave them: quantised by ComfyUI, and like GGUF files. Also a node pack for a real server."""

import copy
import json

import torch
from torch import nn


def with_layers(model, convert):
    """A copy of a MODEL in which `convert` has replaced layers, or has given None for those that stay."""
    with torch.inference_mode():
        model = model.clone()
        model.model = copy.copy(model.model)
        model.model._modules = copy.deepcopy(model.model._modules)
        for parent in list(model.model.diffusion_model.modules()):
            for name, layer in list(parent.named_children()):
                if (new := convert(layer)) is not None:
                    setattr(parent, name, new)
    return model


def quantised(model, kind="float8_e4m3fn", dtype=torch.float32):
    """Linear layers as ComfyUI's mixed precision loads them."""
    import comfy.ops
    import comfy.quant_ops

    def convert(layer):
        if not isinstance(layer, nn.Linear) or not layer.weight.any():  # which would have a scale of 0
            return None
        state = {"weight": layer.weight.to(dtype)}
        if layer.bias is not None:
            state["bias"] = layer.bias.to(dtype)
        layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
        if isinstance(layout, str) and hasattr(comfy.quant_ops, "get_layout_class"):  # newer ComfyUI
            scale = {"scale": "recalculate"} if kind.startswith("float8") else {}
            state |= comfy.quant_ops.QuantizedTensor.from_float(state["weight"], layout, **scale).state_dict("weight")
            state["comfy_quant"] = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
            ops = comfy.ops.mixed_precision_ops({}, dtype)
        else:
            state["weight_scale"] = state["weight"].abs().max().float() / 448
            state["weight"] = (state["weight"] / state["weight_scale"]).to(torch.float8_e4m3fn)
            ops = comfy.ops.mixed_precision_ops({"": {"format": kind}}, dtype)
        new = ops.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
        new.load_state_dict(state)
        return new

    return with_layers(model, convert)


def stored_in_fp8(model):
    """All weights in fp8, cast for every layer, as a loader's weight_dtype makes them."""
    model = with_layers(model, lambda layer: None)
    model.model.manual_cast_dtype = torch.float32
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = True
            for name, p in layer.named_parameters(recurse=False):
                layer._parameters[name] = nn.Parameter(p.to(torch.float8_e4m3fn), False)
    return model


class Blocks(torch.Tensor):
    """Blocks of 32 values, an fp16 scale and a byte each; or, where `packed` is false, plain values. As with GGUF,
    `shape` is that of the values, and what is stored has another."""

    def __new__(cls, data, *_):
        return super().__new__(cls, data)

    def __init__(self, data, values_shape, packed):
        super().__init__()
        self.values_shape, self.packed = values_shape, packed

    @property
    def shape(self):
        return vars(self).get("values_shape", self.size())

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.values_shape, new.packed = self.values_shape, self.packed
        return new

    def detach(self):
        return self

    def clone(self, *_, **__):
        return self


def packed(weight):
    blocks = weight.float().reshape(len(weight), -1, 32)
    scales = (blocks.abs().amax(-1, keepdim=True) / 127).half()
    values = (blocks / scales.float()).round().nan_to_num().to(torch.int8)
    data = torch.cat([scales.view(torch.uint8), values.view(torch.uint8)], -1).flatten(1)
    return Blocks(data, weight.shape, True)


def unpacked(blocks, dtype):
    data = blocks.as_subclass(torch.Tensor)
    if not blocks.packed:
        return data.to(dtype)
    data = data.view(len(data), -1, 34)
    scales, values = data[..., :2].contiguous().view(torch.float16), data[..., 2:].contiguous().view(torch.int8)
    return (scales.to(dtype) * values.to(dtype)).reshape(blocks.values_shape)


def gguf_like(model, differentiable=True):
    """Every layer as GGUF's loader makes it: quantised linear layers, the others of its own tensor class as well."""
    import comfy.ops

    class Unpacking:
        def forward_comfy_cast_weights(self, x):
            weight, bias = (p if p is None else unpacked(p, x.dtype).to(x.device) for p in (self.weight, self.bias))
            if not differentiable:
                x = x.detach()
            if isinstance(self, nn.Linear):
                return nn.functional.linear(x, weight, bias)
            if isinstance(self, nn.Conv2d):
                return self._conv_forward(x, weight, bias)
            if isinstance(self, nn.GroupNorm):
                return nn.functional.group_norm(x, self.num_groups, weight, bias, self.eps)
            return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    kinds = {
        name: type(name, (Unpacking, getattr(comfy.ops.manual_cast, name)), {})
        for name in ("Linear", "Conv2d", "GroupNorm", "LayerNorm")
    }

    def convert(layer):
        if type(layer).__name__ not in kinds:
            return None
        layer.__class__ = kinds[type(layer).__name__]
        for name, p in layer.named_parameters(recurse=False):
            pack = isinstance(layer, nn.Linear) and p.ndim == 2 and p.shape[1] % 32 == 0
            layer._parameters[name] = nn.Parameter(packed(p) if pack else Blocks(p, p.shape, False), False)
        return None

    return with_layers(model, convert)


class OddModel:
    """A node that turns a MODEL into one of these kinds."""

    KINDS = {
        "fp8": stored_in_fp8,
        "fp8 quantised": lambda model: quantised(model, "float8_e4m3fn"),
        "int8 quantised": lambda model: quantised(model, "int8_tensorwise"),
        "GGUF": gguf_like,
        "GGUF without a gradient": lambda model: gguf_like(model, differentiable=False),
    }
    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "convert", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "kind": (list(cls.KINDS),)}}

    def convert(self, model, kind):
        return (self.KINDS[kind](model),)


NODE_CLASS_MAPPINGS = {"OddModel": OddModel}
