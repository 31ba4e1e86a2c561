"""A whole catalogue: every content picture in every look, from folders, into a folder with a sheet of results."""

import hashlib
import json
import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..consislora_core import catalog
from ..consislora_core.catalog import Pair, Result, ResultsSheet
from ..consislora_core.files import inside
from ..consislora_core.lora_file import ImageLora
from . import drawing, folders, graph, sockets
from .sockets import CATEGORY, ConsisLora, aliases

ONE, ALL = "one pair per run", "all pairs in one run"
FACTS = ("stage", "image_hash", "steps", "rank", "seed")  # of an adapter, for the sheet


class CatalogJob(NamedTuple):
    """One pair on its way through the workflow. folder: of the catalogue."""

    name: str
    key: str
    content: str
    style: str
    folder: Path


class Plan(NamedTuple):
    """What a catalogue is made of. problems: pictures and folders that cannot be used, by name, and why."""

    folder: Path
    pairs: list[Pair]
    problems: dict[str, str]

    @property
    def sheet(self) -> ResultsSheet:
        return ResultsSheet(self.folder / catalog.RESULTS)


class CatalogLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRACatalogLoad",
            display_name="Load Catalogue",
            category=CATEGORY,
            **aliases("batch", "load images from folder"),
            description="Pairs every content picture with every style picture of two folders, and passes over "
            "what the catalogue has already.",
            inputs=[
                io.String.Input(
                    "contents",
                    default="catalogue/contents",
                    multiline=True,
                    tooltip="A folder of pictures inside ComfyUI's input folder, or several folders and files, "
                    "one a line.",
                ),
                io.String.Input(
                    "styles",
                    default="catalogue/styles",
                    multiline=True,
                    tooltip="The same for the pictures whose look is wanted.",
                ),
                io.String.Input(
                    "catalogue",
                    default="catalogue",
                    tooltip="Folder inside ComfyUI's output folder for the results and their sheet, results.csv.",
                ),
                io.String.Input(
                    "name",
                    default=catalog.NAME,
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
            ],
            outputs=[
                io.Image.Output(display_name="content", is_output_list=True, tooltip="The content picture."),
                io.Image.Output(display_name="style", is_output_list=True, tooltip="The style picture."),
                sockets.CatalogJob.Output(display_name="job", is_output_list=True, tooltip="For Save Catalogue."),
                io.String.Output(
                    display_name="name", is_output_list=True, tooltip="The name that the result will have."
                ),
                io.String.Output(
                    display_name="report", tooltip="What comes now, what is done, and which files cannot be used."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, contents, styles, catalogue, name, run, index):
        plan = planned(contents, styles, catalogue, name)
        files = sorted({path for pair in plan.pairs for path in (pair.content, pair.style)})
        stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
        results = plan.sheet.read()
        done = [one.done(one.key, plan.folder) for one in map(results.get, (pair.name for pair in plan.pairs)) if one]
        # Of no use to anyone but ComfyUI, which writes it into the picture's metadata.
        return hashlib.sha256(
            str([stats, list(plan.problems), sorted(results), done]).encode(errors="backslashreplace")
        ).hexdigest()

    @classmethod
    def execute(cls, contents, styles, catalogue, name, run, index) -> io.NodeOutput:
        plan = planned(contents, styles, catalogue, name)
        if not plan.pairs:
            problems = [f"{name}: {problem}" for name, problem in plan.problems.items()]
            raise ValueError(catalog.told("The catalogue", problems or ["contents or styles is empty. Name a folder."]))
        results = plan.sheet.read()
        desk = Desk(dict(plan.problems))
        jobs = []
        for pair in plan.pairs if run == ALL else [plan.pairs[index % len(plan.pairs)]]:
            if desk.open(pair.content) is None or desk.open(pair.style) is None:
                continue
            key = catalog.picture_key(pair.content, pair.style)
            if pair.name not in results or not results[pair.name].done(key, plan.folder):
                jobs.append((pair, CatalogJob(pair.name, key, pair.content.name, pair.style.name, plan.folder)))
        note_bad_files(plan, results, desk)
        report = told(plan, results, [job.name for _, job in jobs], desk.problems)
        logging.info("ConsisLoRA catalogue: %s", report)
        graph.show_text(cls.hidden, report)
        if not jobs:
            return io.NodeOutput(*4 * [[ExecutionBlocker(None)]], report)
        images = zip(*((desk.open(pair.content), desk.open(pair.style)) for pair, _ in jobs), strict=True)
        return io.NodeOutput(*map(list, images), [job for _, job in jobs], [job.name for _, job in jobs], report)


class CatalogSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConsisLoRACatalogSave",
            display_name="Save Catalogue",
            category=CATEGORY,
            **aliases("batch", "save images to folder"),
            is_output_node=True,
            description="Writes a result of the catalogue as PNG, with its workflow, and its row in results.csv.",
            inputs=[
                io.Image.Input("images", tooltip="The result."),
                sockets.CatalogJob.Input("job", tooltip="From Load Catalogue: name and folder of the result."),
                ConsisLora.Input(
                    "content", optional=True, tooltip="The LoRA of the content image, to be noted in sheet and picture."
                ),
                ConsisLora.Input(
                    "style", optional=True, tooltip="The LoRA of the style image, to be noted in sheet and picture."
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
    def execute(
        cls,
        images: Tensor,
        job: CatalogJob,
        content: ImageLora | None = None,
        style: ImageLora | None = None,
        report: str = "",
        accepted: bool | None = None,
        reasons: str = "",
    ) -> io.NodeOutput:
        if not images.isfinite().all():
            raise ValueError(
                "The picture holds values that are not numbers (NaN or infinity): model or VAE failed. "
                "Run the VAE in fp32 if it is SDXL's own, or lower the guidance."
            )
        names = [job.name, *(f"{job.name}_{number}" for number in range(2, len(images) + 1))]
        paths = [inside(job.folder, f"{name}.png") for name in names]
        result = Result(
            job.name,
            job.key,
            job.content,
            job.style,
            ";".join(path.relative_to(job.folder).as_posix() for path in paths),
            adapter(content),
            adapter(style),
            **graph.numbers_behind(cls.hidden, "images", catalog.SETTINGS),
            scores=report,
            accepted={None: "", True: "yes", False: "no"}[accepted],
            reason=reasons,
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        texts = graph.workflow_texts(cls.hidden) | {"consislora": facts(result, content, style)}
        try:
            for image, path in zip(images, paths, strict=True):
                catalog.write_picture(drawing.to_picture(image), path, texts)
            ResultsSheet(job.folder / catalog.RESULTS).record([result])
        except (OSError, NotImplementedError) as error:  # the second where a network folder has no locks
            raise ValueError(
                f"{job.name} could not be saved to {job.folder}: {error}. Free some space, make the "
                f"folder writable, or close {catalog.RESULTS} in other programs; then queue the pair again."
            ) from error
        relative = [path.relative_to(folders.output_folder()) for path in paths]
        shown = [{"filename": one.name, "subfolder": one.parent.as_posix(), "type": "output"} for one in relative]
        return io.NodeOutput("\n".join(one.as_posix() for one in relative), ui={"images": shown})


class Desk:
    """Pictures by their path, each opened once; what cannot be used joins the problems."""

    def __init__(self, problems: dict[str, str]):
        self.pictures: dict[Path, Tensor | None] = {}
        self.problems = problems

    def open(self, path: Path) -> Tensor | None:
        """1 h w 3, 0 to 1; None for a file that cannot be used."""
        if path not in self.pictures:
            try:
                self.pictures[path] = torch.from_numpy(np.array(catalog.open_picture(path)))[None] / 255
            except ValueError as error:
                self.pictures[path] = None
                self.problems[shown_name(path)] = str(error)
        return self.pictures[path]


def planned(contents: str, styles: str, catalogue: str, name: str) -> Plan:
    """Raises ValueError for names that lead elsewhere."""
    root, folder = folders.input_folder(), inside(folders.output_folder(), catalogue)
    things, looks = catalog.find_pictures(root, contents), catalog.find_pictures(root, styles)
    pairs = catalog.pair_up(things.paths, looks.paths, name)
    for pair in pairs:
        inside(folder, f"{pair.name}.png")
    return Plan(folder, pairs, things.problems | looks.problems)


def note_bad_files(plan: Plan, results: dict[str, Result], desk: Desk) -> None:
    """The sheet has a row for each file that cannot be used, until it can."""
    bad = [Result(name, error=problem) for name, problem in desk.problems.items()]
    good = {shown_name(path) for path, picture in desk.pictures.items() if picture is not None}
    listed = {shown_name(path) for pair in plan.pairs for path in (pair.content, pair.style)} | desk.problems.keys()
    noted = {name for name, result in results.items() if result.error and not result.key}
    outdated = noted & good | noted - listed
    if outdated or any(results.get(result.name) != result for result in bad):
        plan.sheet.record(bad, outdated)


def told(plan: Plan, results: dict[str, Result], coming: list[str], problems: dict[str, str]) -> str:
    done = sum(
        pair.name in results and results[pair.name].done(results[pair.name].key, plan.folder) for pair in plan.pairs
    )
    count = f"{done} of {len(plan.pairs)} pairs are done."
    lines = [f"Now: {', '.join(coming)}." if coming else "Nothing to do in this run."]
    if not coming and done == len(plan.pairs):
        lines = ["Everything is done. To have a result made again, delete its picture."]
    passed_over = [f"- {name}: {problem}" for name, problem in problems.items()]
    return "\n".join([*lines, count, *(["Passed over:"] if passed_over else []), *passed_over])


def shown_name(path: Path) -> str:
    return path.relative_to(folders.input_folder()).as_posix()


def adapter(lora: ImageLora | None) -> str:
    """A LoRA in a few words: its title if it came from a file, and what it was trained from."""
    metadata = lora.metadata if lora else {}
    facts = [f"{name} {metadata[f'consislora.{name}']}" for name in FACTS if f"consislora.{name}" in metadata]
    return ", ".join(filter(None, [metadata.get("modelspec.title"), *facts]))


def facts(result: Result, content: ImageLora | None, style: ImageLora | None) -> str:
    """The sheet's row and the LoRAs' metadata, to stand in the picture as JSON."""
    row = {name: value for name, value in catalog.as_row(result).items() if value not in ("", None)}
    return json.dumps(
        {**row, **{f"{role}_lora": lora.metadata for role, lora in [("content", content), ("style", style)] if lora}}
    )
