"""The results of a catalogue: into a folder, with a sheet of results."""

import json
from datetime import datetime, timezone

from comfy.cli_args import args
from comfy_api.latest import io, ui
from torch import Tensor

from ..catalogue.plan import CatalogueJob, free_paths
from ..catalogue.retry import first_try
from ..catalogue.sheets import RESULTS, SETTINGS, Result, ResultsSheet, as_record, disk_errors_named
from ..consislora_core.files import write_file
from ..consislora_core.lora_file import ImageLora
from ..host.model_inputs import check_pictures
from ..host.paths import output_folder
from ..host.picture_files import KINDS, NOTHING, Metadata, encode_picture, resized
from ..host.progress import seconds_of_run, stop_if_cancelled
from ..host.prompt_graph import numbers_behind, workflow_texts
from ..host.provenance import CHUNK
from ..host.xmp import Credits
from .sockets import CATEGORY, CatalogJob, ConsisLora, aliases
from .widget_values import checked

FACTS = ("stage", "image_hash", "steps", "rank", "seed")  # of a LoRA's metadata, for the sheet
AS_MADE, AS_PHOTO = "as made", "as the photo"


class CatalogSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRACatalogSave",
            display_name="Save Catalogue",
            category=CATEGORY,
            **aliases("batch", "save images to folder"),
            is_output_node=True,
            description="Writes a result of the catalogue, with its workflow, and an entry in results.csv.",
            inputs=[
                io.Image.Input("images", tooltip="The result."),
                CatalogJob.Input("job", tooltip="From Load Catalogue: name and folder of the result."),
                ConsisLora.Input(
                    "content", optional=True, tooltip="The LoRA of the content image, to record in sheet and picture."
                ),
                ConsisLora.Input(
                    "style", optional=True, tooltip="The LoRA of the style image, to record in sheet and picture."
                ),
                io.String.Input(
                    "report", optional=True, force_input=True, tooltip="The scores, from Evaluate, for the sheet."
                ),
                io.Boolean.Input(
                    "accepted", optional=True, force_input=True, tooltip="Whether the result is good enough."
                ),
                io.String.Input(
                    "reasons", optional=True, force_input=True, tooltip="Why it is not, from Accept or Reject."
                ),
                io.Combo.Input(
                    "size",
                    options=[AS_MADE, AS_PHOTO],
                    default=AS_MADE,
                    optional=True,
                    tooltip="As the photo: scaled to the content photo's own width and height, exactly.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(KINDS),
                    default="PNG",
                    optional=True,
                    tooltip="PNG and TIFF lose nothing; WebP and JPEG are smaller. JPEG has no transparency: it gets "
                    "the picture on white. All have sRGB's profile. ComfyUI opens the workflow from PNG and WebP.",
                ),
                io.Combo.Input(
                    "bits",
                    options=["8", "16"],
                    default="8",
                    optional=True,
                    tooltip="Of a channel, in PNG and TIFF; WebP and JPEG have 8. A VAE in bf16 gives fewer: for "
                    "all 16, start ComfyUI with --fp32-vae.",
                ),
                io.String.Input(
                    "title", default="", optional=True, tooltip="Of the picture, in its XMP; empty: the result's name."
                ),
                io.String.Input(
                    "creator",
                    default="",
                    optional=True,
                    tooltip="Who made the picture, for its XMP; several with ; between.",
                ),
                io.String.Input(
                    "rights",
                    default="",
                    optional=True,
                    tooltip="Whose the picture is, for its XMP; empty: what Save ConsisLoRA noted in the LoRAs.",
                ),
            ],
            outputs=[io.String.Output(display_name="files", tooltip="The files, inside ComfyUI's output folder.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls, images: Tensor, job: CatalogueJob, content: ImageLora | None = None, style: ImageLora | None = None,
        report: str = "", accepted: bool | None = None, reasons: str = "", size=AS_MADE, format="PNG", bits="8",
        title="", creator="", rights="",
    ) -> io.NodeOutput:  # fmt: skip
        check_pictures(images, "images")
        sheet = ResultsSheet(job.folder / RESULTS)
        with disk_errors_named(f"{job.name} could not be saved to {job.folder}", "queue the pair again"):
            paths = free_paths(job, sheet.entries(), KINDS[format].suffix, len(images))
        result = Result(
            job.name,
            job.key,
            job.content,
            job.style,
            ";".join(path.relative_to(job.folder).as_posix() for path in paths),
            describe_lora(content),
            describe_lora(style),
            **numbers_behind(cls.hidden, "images", SETTINGS),
            scores=report,
            accepted={None: "", True: "yes", False: "no"}[accepted],
            reason=reasons,
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=seconds_of_run(job.in_run),
            retry_of=first_try(cls.hidden and cls.hidden.extra_pnginfo),
        )
        metadata = NOTHING
        if not args.disable_metadata:
            facts = facts_text(result, content, style)
            credits = Credits(title or job.name, creator, rights or noted_rights(content, style), facts)
            metadata = Metadata(workflow_texts(cls.hidden) | {CHUNK: facts}, credits)
        with disk_errors_named(f"{job.name} could not be saved to {job.folder}", "queue the pair again"):
            for image, path in zip(images, paths, strict=True):
                image = resized(image, job.size) if size == AS_PHOTO else image
                write_file(path, encode_picture(image, format, int(bits), metadata))
            sheet.record([result], waiting=stop_if_cancelled)
        files = [path.relative_to(output_folder()) for path in paths]
        shown = [{"filename": file.name, "subfolder": file.parent.as_posix(), "type": "output"} for file in files]
        if format == "TIFF":  # which browsers do not show
            shown = ui.PreviewImage(images.float().expand(-1, -1, -1, max(3, images.shape[-1]))).values
        return io.NodeOutput("\n".join(file.as_posix() for file in files), ui={"images": shown})


def noted_rights(*loras: ImageLora | None) -> str:
    """What LoRAs say of the rights in their images."""
    notes = [lora.metadata.get("consislora.rights") for lora in loras if lora]
    return "; ".join(dict.fromkeys(filter(None, notes)))


def describe_lora(lora: ImageLora | None) -> str:
    """A LoRA in a few words: its title if it came from a file, and how it was trained."""
    metadata = lora.metadata if lora else {}
    facts = [f"{name} {metadata[f'consislora.{name}']}" for name in FACTS if f"consislora.{name}" in metadata]
    return ", ".join(filter(None, [metadata.get("modelspec.title"), *facts]))


def facts_text(result: Result, content: ImageLora | None, style: ImageLora | None) -> str:
    """The result and the LoRAs' metadata as JSON, for the picture."""
    record = {name: value for name, value in as_record(result).items() if value not in ("", None)}
    return json.dumps(
        {**record, **{f"{role}_lora": lora.metadata for role, lora in [("content", content), ("style", style)] if lora}}
    )
