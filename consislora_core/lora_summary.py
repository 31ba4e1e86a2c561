"""Says in words what was found in a LoRA file."""

import re
from collections.abc import Collection

from .lora_file import ImageLora, Part
from .roles import block_of

# Metadata that states the base model: ModelSpec's, of kohya's scripts, and ours.
BASE_MODEL = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "consislora.base_model_hash")
PROMPT = ("consislora.prompt", "modelspec.trigger_phrase")
LONGEST = 200  # characters of a text from the file

TEXT_ENCODER = re.compile(
    r"(base_model_model_|lora_|lycoris_)*(te\d?_|clip_|text_|cond_stage_|conditioner_|bundle_emb)"
)


def summarise(lora: ImageLora) -> list[str]:
    """Lines that name the parts with ranks and alphas, what was left out, base model and prompt."""
    lines = [f"{role}: {_describe_part(part)}" for role, part in lora.parts.items()]
    if lora.left_out:
        lines.append(f"left out: {summarise_left_out(lora.left_out)}")
    base = dict.fromkeys(lora.metadata[name].partition("/")[0] for name in BASE_MODEL if lora.metadata.get(name))
    prompts = [lora.metadata[name] for name in PROMPT if lora.metadata.get(name)]
    for fact, stated in {"base model": ", ".join(base), "trained with": "".join(prompts[:1])}.items():
        lines.append(f"{fact}: {stated[:LONGEST] or 'not stated'}")
    return lines


def summarise_left_out(modules: Collection[str]) -> str:
    """How many modules of each kind there are, each with an example, in one line."""
    examples: dict[str, list[str]] = {}
    for module in modules:
        examples.setdefault(_kind(module), []).append(module)
    return ", ".join(f"{kind} ({len(names)}, such as {names[0]})" for kind, names in sorted(examples.items()))


def _kind(module: str) -> str:
    role, layer = block_of(module)
    if role is None:
        return "text encoders" if TEXT_ENCODER.match(layer) else "other blocks of the UNet"
    if "_ff_" in layer:
        return "feed-forward layers"
    return "proj_in and proj_out" if layer.startswith("proj_") else "other layers of the two blocks"


def _describe_part(part: Part) -> str:
    count = f"{len(part)} layer{'s' * (len(part) != 1)}"
    ranks, alphas = zip(*((layer.rank, layer.alpha) for layer in part.values()), strict=True)
    return f"{count}, rank {_span(ranks)}, alpha {_span(alphas)}"


def _span(values: Collection[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
