"""A whole catalogue: every content image in every style, from folders."""

import hashlib
import logging
from collections.abc import Callable
from functools import partial
from shutil import disk_usage
from typing import NamedTuple

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL.Image import Image
from torch import Tensor

from ..catalogue.backgrounds import Colour, read_background
from ..catalogue.names import as_spelled, inside
from ..catalogue.pictures import NAME, PictureCache
from ..catalogue.plan import Plan, plan_catalogue
from ..catalogue.sheets import disk_errors_named, error_text
from ..catalogue.sizes import latent_size
from ..consislora_core.image_faults import find_faults
from ..host import drawing
from ..host.paths import input_folder, output_folder, temp_folder
from ..host.progress import begin_run, show_text, stop_if_cancelled
from .sockets import CATEGORY, CatalogJob, aliases
from .widget_values import checked

ONE, ALL = "one pair per run", "all pairs in one run"
FAULTS = 3  # so many of the pictures' are in the report


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
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=64,
                    max=4096,
                    step=8,
                    optional=True,
                    tooltip="The side of the squares that the model makes: 1024 for SDXL, 256 for the demo model. "
                    "width and height have the area of such a square.",
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
                io.Int.Output(
                    display_name="width",
                    is_output_list=True,
                    tooltip="Of the latent, in pixels: with height it has the content image's proportions.",
                ),
                io.Int.Output(display_name="height", is_output_list=True, tooltip="Of the latent, in pixels."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, contents, styles, catalogue, name, run, index, background="white", resolution=1024):
        begin_run()  # ComfyUI asks for fingerprints when a run begins, also where all nodes are cached
        state = make_plan(contents, styles, catalogue, name).state()
        # Hashed, because ComfyUI writes it into the picture's metadata.
        return hashlib.sha256(state.encode(errors="backslashreplace")).hexdigest()

    @classmethod
    @checked
    def execute(
        cls, contents, styles, catalogue, name, run, index, background="white", resolution=1024
    ) -> io.NodeOutput:
        plan = make_plan(contents, styles, catalogue, name)
        with disk_errors_named(f"The catalogue in {plan.folder} cannot be made", "queue again"):
            return cls.next_pairs(plan, run, index, read_background(background), resolution)

    @classmethod
    def next_pairs(cls, plan: Plan, run: str, index: int, background: Colour | str, resolution: int) -> io.NodeOutput:
        pairs, entries = plan.pair_up(), plan.sheet.entries()
        if not pairs:
            problems = [f"{name}: {problem}" for name, problem in plan.problems.items()]
            raise ValueError(error_text("The catalogue", problems or ["contents or styles is empty. Name a folder."]))
        cache = picture_cache(plan, run, background, resolution)
        jobs = plan.pending(pairs if run == ALL else [pairs[index % len(pairs)]], entries, cache, stop_if_cancelled)
        plan.record_bad_files(entries, cache, stop_if_cancelled)
        names = [job.name for job in jobs]
        report = plan.report(plan.count_done(pairs, entries), len(pairs), names, cache)
        logging.info("ConsisLoRA catalogue: %s", report)
        report = "\n".join([report, *fault_lines(cache)])
        show_text(cls.hidden, report)
        if not jobs:
            return io.NodeOutput(*4 * [[ExecutionBlocker(None)]], report, *3 * [[ExecutionBlocker(None)]])
        contents, styles = zip(*map(cache.open_pair, jobs.values()), strict=True)
        jobs = {job._replace(in_run=len(jobs)): pair for job, pair in jobs.items()}
        images, masks, _ = map(list, zip(*contents, strict=True))
        widths, heights = map(list, zip(*(latent_size(job.size, resolution) for job in jobs), strict=True))
        styles = [style.image for style in styles]
        return io.NodeOutput(images, styles, list(jobs), names, report, masks, widths, heights)


def make_plan(contents: str, styles: str, catalogue: str, name: str) -> Plan:
    """The plan in ComfyUI's own folders. Raises ValueError for names that lead out of them."""
    return plan_catalogue(input_folder(), as_spelled(inside(output_folder(), catalogue)), contents, styles, name)


class Opened(NamedTuple):
    """A picture as IMAGE, and as MASK where it is opaque; and what is wrong with it."""

    image: Tensor
    mask: Tensor
    faults: list[str]


def picture_cache(plan: Plan, run: str, background: Colour | str, resolution: int) -> PictureCache:
    """For the pictures of one pair in memory, or for those of all pairs in temporary files, for half of the disk."""
    opened = partial(decode, resolution=resolution)
    if run == ONE:
        return PictureCache(opened, plan.name_of, dict(plan.problems), background)
    folder = temp_folder()
    opened_there = partial(opened, keep=partial(drawing.mapped, folder=folder))
    limit = disk_usage(folder).free // 2
    return PictureCache(opened_there, plan.name_of, dict(plan.problems), background, limit)


def fault_lines(cache: PictureCache) -> list[str]:
    """What is wrong with the pictures that were opened: the first few for the report, all for the log."""
    opened = {path: picture for (path, _), picture in cache.opened.items() if picture is not None}
    faults = [f"- {cache.name_of(path)} {fault}" for path, picture in opened.items() for fault in picture.faults]
    for fault in faults:
        logging.warning("ConsisLoRA catalogue: %s", fault)
    more = [f"... and {len(faults) - FAULTS} more, in ComfyUI's log"] if len(faults) > FAULTS else []
    return ["Poor to learn from:", *faults[:FAULTS], *more] if faults else []


def decode(
    picture: Image, alpha: Image | None, resolution: int, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Opened:
    """resolution: the side of a square with the area at which it is learned. keep: puts a tensor where it stays."""
    image = drawing.to_image(picture)
    faults = find_faults(image[0], resolution, masked=alpha is not None)
    # Ones for a picture without alpha take the memory of one.
    mask = torch.ones(1, 1, 1).expand(image.shape[:3]) if alpha is None else keep(drawing.to_mask(alpha))
    return Opened(keep(image), mask, faults)
