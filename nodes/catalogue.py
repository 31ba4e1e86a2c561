"""A whole catalogue: every content image in every style, from folders, into a folder with a sheet of results."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from itertools import count, islice
from pathlib import Path
from shutil import disk_usage
from typing import NamedTuple

import torch
from comfy.cli_args import args
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL.Image import Image
from torch import Tensor

from ..catalogue.backgrounds import Colour, read_background
from ..catalogue.names import as_spelled, composed, inside
from ..catalogue.pictures import NAME, PictureCache, write_picture
from ..catalogue.plan import CatalogueJob, Plan, plan_catalogue
from ..catalogue.retry import first_try
from ..catalogue.sheets import RESULTS, SETTINGS, Entry, Result, ResultsSheet, as_record, error_text
from ..consislora_core.files import escape_text
from ..consislora_core.lora_file import ImageLora
from ..host import drawing
from ..host.model_inputs import check_pictures
from ..host.paths import input_folder, output_folder, temp_folder
from ..host.progress import begin_run, seconds_of_run, show_text, stop_if_cancelled
from ..host.prompt_graph import numbers_behind, workflow_texts
from .sockets import CATEGORY, CatalogJob, ConsisLora, aliases
from .widget_values import checked

ONE, ALL = "one pair per run", "all pairs in one run"
FACTS = ("stage", "image_hash", "steps", "rank", "seed")  # of a LoRA's metadata, for the sheet


class CatalogLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRACatalogLoad",
            display_name="Load Catalogue",
            category=CATEGORY,
            **aliases("batch", "load images from folder"),
            description="Pairs every content image with every style image of two folders, and skips "
            "what the catalogue already has.",
            inputs=[
                io.String.Input(
                    "contents",
                    default="catalogue/contents",
                    multiline=True,
                    tooltip="A folder of pictures inside ComfyUI's input folder, or several folders and files, "
                    "one a line.",
                ),
                io.String.Input(
                    "styles", default="catalogue/styles", multiline=True, tooltip="The same for the style images."
                ),
                io.String.Input(
                    "catalogue",
                    default="catalogue",
                    tooltip="Folder inside ComfyUI's output folder for the results and their sheet, results.csv.",
                ),
                io.String.Input(
                    "name",
                    default=NAME,
                    tooltip="How results are named; the names of the two pictures are put in. A slash makes folders.",
                ),
                io.Combo.Input(
                    "run",
                    options=[ONE, ALL],
                    default=ONE,
                    tooltip="One pair per run loses nothing when something fails; all pairs in one run need one click.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=True,
                    tooltip="Which pair, from 0; after the last comes the first again. "
                    "Set its control to increment and queue as many runs as there are pairs.",
                ),
                io.String.Input(
                    "background",
                    default="white",
                    optional=True,
                    tooltip="What transparent pictures are laid on: a colour by name, or as #f4f1ec; or style, for the "
                    "colour that the border of the style image mostly has.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="content", is_output_list=True, tooltip="The content image."),
                io.Image.Output(display_name="style", is_output_list=True, tooltip="The style image."),
                CatalogJob.Output(display_name="job", is_output_list=True, tooltip="For Save Catalogue."),
                io.String.Output(
                    display_name="name", is_output_list=True, tooltip="The name that the result will have."
                ),
                io.String.Output(
                    display_name="report", tooltip="What comes now, what is done, and which files cannot be used."
                ),
                io.Mask.Output(
                    display_name="mask",
                    is_output_list=True,
                    tooltip="1 where the content image is opaque, 0 where it is transparent, for the training nodes "
                    "and Keep Outside Mask. Load Image gives it the other way round.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, contents, styles, catalogue, name, run, index, background="white"):
        begin_run()  # ComfyUI asks for fingerprints when a run begins, also where all nodes are cached
        state = make_plan(contents, styles, catalogue, name).state()
        # Hashed, because ComfyUI writes it into the picture's metadata.
        return hashlib.sha256(state.encode(errors="backslashreplace")).hexdigest()

    @classmethod
    @checked
    def execute(cls, contents, styles, catalogue, name, run, index, background="white") -> io.NodeOutput:
        plan = make_plan(contents, styles, catalogue, name)
        with disk_errors_named(f"The catalogue in {plan.folder} cannot be made", "queue again"):
            return cls.next_pairs(plan, run, index, read_background(background))

    @classmethod
    def next_pairs(cls, plan: Plan, run: str, index: int, background: Colour | str) -> io.NodeOutput:
        pairs, entries = plan.pair_up(), plan.sheet.entries()
        if not pairs:
            problems = [f"{name}: {problem}" for name, problem in plan.problems.items()]
            raise ValueError(error_text("The catalogue", problems or ["contents or styles is empty. Name a folder."]))
        cache = picture_cache(plan, run, background)
        jobs = plan.pending(pairs if run == ALL else [pairs[index % len(pairs)]], entries, cache)
        plan.record_bad_files(entries, cache, stop_if_cancelled)
        names = [job.name for job in jobs]
        report = plan.report(plan.count_done(pairs, entries), len(pairs), names, cache)
        logging.info("ConsisLoRA catalogue: %s", report)
        show_text(cls.hidden, report)
        if not jobs:
            return io.NodeOutput(*4 * [[ExecutionBlocker(None)]], report, [ExecutionBlocker(None)])
        contents, styles = zip(*map(cache.open_pair, jobs.values()), strict=True)
        jobs = {job._replace(in_run=len(jobs)): pair for job, pair in jobs.items()}
        images, masks = map(list, zip(*contents, strict=True))
        return io.NodeOutput(images, [style.image for style in styles], list(jobs), names, report, masks)


class CatalogSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRACatalogSave",
            display_name="Save Catalogue",
            category=CATEGORY,
            **aliases("batch", "save images to folder"),
            is_output_node=True,
            description="Writes a result of the catalogue as PNG, with its workflow, and an entry in results.csv.",
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
            ],
            outputs=[io.String.Output(display_name="files", tooltip="The files, inside ComfyUI's output folder.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls, images: Tensor, job: CatalogueJob, content: ImageLora | None = None, style: ImageLora | None = None,
        report: str = "", accepted: bool | None = None, reasons: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        check_pictures(images, "images")
        sheet = ResultsSheet(job.folder / RESULTS)
        with disk_errors_named(f"{job.name} could not be saved to {job.folder}", "queue the pair again"):
            paths = free_paths(job, sheet.entries(), len(images))
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
        facts = {} if args.disable_metadata else {"consislora": facts_text(result, content, style)}
        texts = workflow_texts(cls.hidden) | facts
        with disk_errors_named(f"{job.name} could not be saved to {job.folder}", "queue the pair again"):
            for image, path in zip(images, paths, strict=True):
                write_picture(drawing.to_picture(image), path, texts)
            sheet.record([result], waiting=stop_if_cancelled)
        files = [path.relative_to(output_folder()) for path in paths]
        shown = [{"filename": file.name, "subfolder": file.parent.as_posix(), "type": "output"} for file in files]
        return io.NodeOutput("\n".join(file.as_posix() for file in files), ui={"images": shown})


@contextmanager
def disk_errors_named(what: str, then: str) -> Iterator[None]:
    """Raises a ValueError for an error of the disk. what: could not be done. then: to do after it is mended."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the second where a network folder has no locks
        raise ValueError(
            escape_text(
                f"{what}: {error}. Free some space, make the folder writable, or close {RESULTS} in other programs; "
                f"then {then}."
            )
        ) from error


def free_paths(job: CatalogueJob, entries: Mapping[str, Entry], number: int) -> list[Path]:
    """Where the pictures of a pair go: a number is appended from the second on, and no other pair's are overwritten."""
    others = {composed(file).casefold() for name, entry in entries.items() if name != job.name
              for file in entry.files.split(";")}  # fmt: skip
    names = (f"{job.name}.png" if one == 1 else f"{job.name}_{one}.png" for one in count(1))
    free = (name for name in names if composed(name).casefold() not in others)
    return [inside(job.folder, name) for name in islice(free, number)]


def make_plan(contents: str, styles: str, catalogue: str, name: str) -> Plan:
    """The plan in ComfyUI's own folders. Raises ValueError for names that lead out of them."""
    return plan_catalogue(input_folder(), as_spelled(inside(output_folder(), catalogue)), contents, styles, name)


class Opened(NamedTuple):
    """A picture as IMAGE, and as MASK where it is opaque."""

    image: Tensor
    mask: Tensor


def picture_cache(plan: Plan, run: str, background: Colour | str) -> PictureCache:
    """For the pictures of one pair in memory, or for those of all pairs in temporary files, for half of the disk."""
    if run == ONE:
        return PictureCache(decode, plan.name_of, dict(plan.problems), background)
    folder = temp_folder()
    decode_there = partial(decode, keep=partial(drawing.mapped, folder=folder))
    limit = disk_usage(folder).free // 2
    return PictureCache(decode_there, plan.name_of, dict(plan.problems), background, limit)


def decode(picture: Image, alpha: Image | None, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Opened:
    """keep: puts a tensor where it is to stay."""
    image = keep(drawing.to_image(picture))
    # Ones for a picture without alpha take the memory of one.
    mask = torch.ones(1, 1, 1).expand(image.shape[:3]) if alpha is None else keep(drawing.to_mask(alpha))
    return Opened(image, mask)


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
