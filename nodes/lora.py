"""Save, load and apply LoRAs."""

import logging
import re

from comfy_api.latest import io

from ..catalogue.names import composed, portable
from ..consislora_core import lora_file
from ..consislora_core.adapter_config import config_beside
from ..consislora_core.files import escape_text
from ..consislora_core.guidance import parts_of, wanted_mix
from ..consislora_core.lora_file import ImageLora
from ..consislora_core.lora_summary import summarise, summarise_left_out
from ..host.guided_unet import with_mix
from ..host.model_inputs import check_loras, check_roles, check_weights
from ..host.paths import lora_names, lora_path, save_lora
from ..host.progress import show_text
from ..host.provenance import HIDDEN, note
from ..host.training_model import PRECISIONS
from .sockets import CATEGORY, ConsisLora, aliases
from .widget_values import checked

PERMISSION = ["not stated", "trained with permission", "trained without permission"]
FORMATS = KOHYA, PEFT = "ComfyUI and kohya", "PEFT folder"


class Save(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRASave",
            display_name="Save ConsisLoRA",
            category=CATEGORY,
            **aliases("save lora"),
            is_output_node=True,
            description="Writes a LoRA into models/loras. ComfyUI's Load LoRA, diffusers and A1111 read the file too.",
            inputs=[
                ConsisLora.Input("consislora", tooltip="What to save."),
                io.String.Input(
                    "filename",
                    default="consislora/my_image",
                    tooltip="Name inside models/loras; a number is added, so nothing is overwritten.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["fp16", "fp32"],
                    default="fp16",
                    tooltip="fp16 halves the file and is enough for use; fp32 keeps every bit.",
                ),
                io.String.Input(
                    "rights",
                    default="",
                    optional=True,
                    tooltip="A note on author and licence. It is kept in the file and in every picture made with it.",
                ),
                io.Combo.Input(
                    "permission",
                    options=PERMISSION,
                    default=PERMISSION[0],
                    optional=True,
                    tooltip="Whether the image's author agrees to the training. Kept like the note on rights.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default=KOHYA,
                    optional=True,
                    tooltip="The first is one file, for ComfyUI, diffusers and A1111. The second is a folder for PEFT, "
                    "and needs the package peft.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="filename", tooltip="The name under which Load ConsisLoRA lists the file."
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls, consislora, filename, precision, rights="", permission=PERMISSION[0], format=KOHYA
    ) -> io.NodeOutput:
        check_weights(consislora, "consislora")
        stated = {"rights": rights.strip(), "permission": permission if permission != PERMISSION[0] else ""}
        lora, name = with_rights(consislora, stated), portable_name(filename)
        return io.NodeOutput(save_lora(lora, name, PRECISIONS[precision], format == PEFT))


def with_rights(lora: ImageLora, stated: dict[str, str]) -> ImageLora:
    """The LoRA with its hash and the stated rights in its metadata; an empty statement leaves what it has."""
    entries = {"weights": lora.weights_hash, **{name: text for name, text in stated.items() if text}}
    named = {f"consislora.{name}": text for name, text in entries.items()}
    return ImageLora(lora.parts, {**lora.metadata, **named})


def portable_name(filename: str) -> str:
    """The name inside models/loras, each part of it valid on every system, with / between them.

    Raises ValueError for a name that is empty or leads outside.
    """
    parts = [part.strip() for part in re.split(r"[/\\]", composed(filename).strip().removesuffix(".safetensors"))]
    if not parts[0] or not parts[-1].strip(".") or ".." in parts or re.fullmatch("[A-Za-z]:.*", parts[0]):
        raise ValueError(
            f"filename is {filename!r}; it must be a name inside models/loras, such as my_product or "
            "clients/my_product."
        )
    return "/".join(portable(part) for part in parts if part not in ("", "."))


class Load(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRALoad",
            display_name="Load ConsisLoRA",
            category=CATEGORY,
            **aliases("load lora", "b-lora"),
            description="Reads a ConsisLoRA or B-LoRA from models/loras, in any published key spelling, also PEFT's.",
            inputs=[io.Combo.Input("lora_name", options=lora_names(), tooltip="A file in models/loras.")],
            outputs=[ConsisLora.Output(display_name="consislora", tooltip="The content and style parts in the file.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name):
        path = lora_path(lora_name)
        return [file.stat().st_mtime_ns for file in (path, config_beside(path)) if file]

    @classmethod
    def execute(cls, lora_name) -> io.NodeOutput:
        lora = lora_file.read(lora_path(lora_name))
        if lora.left_out:
            logging.info("ConsisLoRA: %s: left out %s", escape_text(lora_name), summarise_left_out(lora.left_out))
        show_text(cls.hidden, "\n".join(summarise(lora)))
        return io.NodeOutput(lora)


class Apply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        strength = dict(default=1.0, min=-10.0, max=10.0, step=0.05)
        return io.Schema(
            node_id="ConsisLoRAApply",
            display_name="Apply ConsisLoRA",
            category=CATEGORY,
            **aliases("apply lora", "mix loras", "b-lora", "style transfer"),
            description="Gives a model the content of one image and the style of another, each as strong as you like.",
            inputs=[
                io.Model.Input("model", tooltip="The SDXL model the LoRAs were trained on, or a relative of it."),
                ConsisLora.Input(
                    "content", optional=True, tooltip="Trained on the content image; its content part is used."
                ),
                ConsisLora.Input("style", optional=True, tooltip="Trained on the style image; its style part is used."),
                io.Float.Input("content_strength", tooltip="1 is as trained, 0 is off.", **strength),
                io.Float.Input("style_strength", tooltip="1 is as trained, 0 is off.", **strength),
            ],
            outputs=[io.Model.Output(tooltip="The model with both parts applied, for any sampler.")],
            hidden=HIDDEN,
        )

    @classmethod
    @checked
    def execute(
        cls, model, content_strength, style_strength, content: ImageLora | None = None, style: ImageLora | None = None
    ) -> io.NodeOutput:
        check_roles(model)
        check_loras(model, content, style)
        strengths = {"content_strength": content_strength, "style_strength": style_strength}
        note(cls.hidden, {"content": content, "style": style}, strengths)
        return io.NodeOutput(with_mix(model, parts_of(content, style), wanted_mix(content_strength, style_strength)))
