"""What PEFT and diffusers say of an adapter beside its tensors: rank and scale, and what a LoRA here cannot hold."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # in a folder of PEFT
HEADER = "lora_adapter_metadata"  # the metadata entry of a file of diffusers

# Fields of peft.LoraConfig that change what the adapter computes, and what they stand for.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "aLoRA",
    "lora_bias": "LoRA with a bias",
    "modules_to_save": "layers trained in full",
    "target_parameters": "LoRA on single parameters",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens",
    "fan_in_fan_out": "transposed weights",
}
# What is raised for a config that is no JSON, or of wrong types.
DAMAGED = json.JSONDecodeError, UnicodeDecodeError, RecursionError, TypeError, AttributeError, OverflowError, re.error


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a peft.LoraConfig that give each layer its scale. None: not stated."""

    r: int | None = None
    lora_alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def alpha(self, module: str, rank: int) -> float:
        """The alpha of a layer of this rank whose alpha / rank is PEFT's scale; the rank itself where none is stated.

        module: its dotted name in the UNet. Raises ValueError if another rank is stated.
        """
        stated = _matching(self.rank_pattern, module, self.r)
        if stated is not None and stated != rank:
            raise ValueError(
                f"Its settings say rank {stated} for {module}, which has rank {rank}. The file is damaged."
            )
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        if alpha is None:
            return float(rank)
        # The scale of rsLoRA (arXiv 2312.03732) is alpha / sqrt(r).
        return alpha * math.sqrt(rank) if self.use_rslora else float(alpha)


def config_beside(path: Path) -> Path | None:
    """The config that belongs to a LoRA file in a folder of PEFT."""
    config = path.with_name(CONFIG_FILE)
    return config if path.name == ADAPTER_FILE and config.exists() else None


def read_config(path: Path, metadata: Mapping[str, str]) -> AdapterConfig:
    """The config of a LoRA file: beside it in a folder of PEFT, or in the metadata of a file of diffusers.

    Raises ValueError for a config that is not JSON of the right types, or that names what a LoRA here cannot hold.
    """
    try:
        if config := config_beside(path):
            fields = json.loads(config.read_text(encoding="utf-8"))
        else:
            fields = json.loads(metadata.get(HEADER) or "{}") or {}
        return _checked(fields)
    except DAMAGED as error:
        raise ValueError(
            f"Its settings as a PEFT adapter cannot be read ({error}). Download or save it again."
        ) from None


def _checked(fields: dict) -> AdapterConfig:
    if not isinstance(fields, dict):
        raise TypeError("they are no JSON object")
    # A pipeline of diffusers writes those of the UNet with its name before each.
    fields = {name.removeprefix("unet."): value for name, value in fields.items()}
    kind = fields.get("peft_type", "LORA")
    names = [name for key, name in UNSUPPORTED.items() if fields.get(key)] + [kind] * (kind != "LORA")
    names += [f"bias {bias}" for bias in {fields.get("bias")} - {None, "none"}]
    if names:
        raise ValueError(f"It uses {' and '.join(names)}, which ConsisLoRA cannot hold. Save it as plain LoRA.")
    config = AdapterConfig(
        fields.get("r"),
        fields.get("lora_alpha"),
        fields.get("rank_pattern") or {},
        fields.get("alpha_pattern") or {},
        bool(fields.get("use_rslora")),
    )
    numbers = [config.r, config.lora_alpha, *config.rank_pattern.values(), *config.alpha_pattern.values()]
    if not all(number is None or isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        raise TypeError("a rank or alpha is not a finite number")
    for pattern in [*config.rank_pattern, *config.alpha_pattern]:
        re.compile(pattern)
    return config


def _matching(patterns: Mapping[str, float], module: str, default: float | None) -> float | None:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
