"""`python benchmarks/photos.py --checkpoint NAME --contents DIR --styles DIR --clip NAME --dino NAME [--pairs N]`

The paper's table on photographs of your own: every content image in the style of every style image, by ConsisLoRA as in
the paper, by this pack's presets with recolourings, without structure lock and with it, by B-LoRA and by a plain LoRA,
drawn in a real ComfyUI on SDXL.
Content is scored by DINO and style by CLIP, as in Table 1 of arXiv 2503.10614; beside it stands how well each LoRA
draws its own picture again.

It starts the ComfyUI in COMFYUI_PATH, with its models, or takes a running one that has this pack (`--server`). A NAME
is one that Load Checkpoint or Load CLIP Vision lists. LoRAs, pictures and results are in `--work`: a run that was
stopped goes on there, and makes nothing twice. `--trial` shows in minutes that everything works, on the demo model and
with a CLIP and a DINOv2 of random weights, so that its scores mean nothing.
"""

import argparse
import asyncio
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from benchmarks.common import set_up

    set_up("demo", ("torch", "einops", "psutil", "aiohttp", "tqdm"))

from PIL import Image, ImageOps
from tqdm import tqdm

from batch.comfy_client import (
    HEADER,
    ComfyClient,
    Denied,
    Refused,
    Unreachable,
    WorkflowError,
    failure_text,
    headers_in,
)
from batch.fill_workflow import INPUTS, server_problems
from batch.job_runner import JobRunner
from batch.run import Batch, server_name, to_url
from benchmarks.common import table
from benchmarks.photo_graphs import (
    CONTENDERS,
    DEMO,
    PLAIN,
    TINY_ENCODERS,
    USUAL,
    VAE,
    Base,
    Graphs,
    Plan,
    Task,
    listed_encoders,
    sdxl,
)
from benchmarks.photo_report import REPORT, Report
from catalogue.api_form import Workflow
from catalogue.names import portable
from catalogue.pictures import SUFFIXES, open_picture
from catalogue.sheets import RESULTS, Result, ResultsSheet, error_text
from consislora_core.files import written_whole
from consislora_core.schedule import SHORTER
from demo.run import IMAGES
from demo.server import PACK, ComfyServer, ServerError

TRIAL_STEPS = 0.002  # of the paper's
TRIAL_PICTURES = {"contents": "*-flat.png", "styles": "*-h*.png"}  # of the demo
PATIENCE, PATIENCE_WITH_OWN = 3600, 60  # seconds to wait for a server that does not answer, and for one started here
SECONDS, PLAIN_SECONDS = 0.043, 1.2  # of a training step on an H200: results/training_gpu.md


class Studio:
    """Makes pictures at a server, and keeps them in the folder `work`.

    The server keeps the trained LoRAs, except plain ones, of which `work` notes the file.
    """

    def __init__(self, client: ComfyClient, graphs: Graphs, work: Path, bar: tqdm):
        self.client, self.graphs, self.work, self.bar = client, graphs, work, bar
        self.runner = JobRunner(client, bar.write)
        self.sheet = ResultsSheet(work / RESULTS)
        self.known = self.sheet.read()
        self.plain_loras: dict[str, str | WorkflowError] = {}

    async def make(self, task: Task) -> Result:
        """The picture of a task, made before or now; of one that failed, the reason."""
        self.bar.set_postfix_str(task.name)
        try:
            batch = Batch(await self._workflow(task), self.work / "pictures" / "photos.csv", self.work)
        except WorkflowError as error:
            return self._recorded(Result(task.name, error=str(error)))
        if problems := batch.local_problems([task.job]):
            raise ValueError(error_text(task.name, problems))
        order = batch.order(task.job)
        known = self.known.get(task.name)
        if known and known.is_done(order.result.key, self.work):
            return known
        result, picture = await self.runner.run(order, order.read_pictures(), self._show_steps(task.name))
        return self._recorded(batch.saved(result, picture) if picture else result)

    def _recorded(self, result: Result) -> Result:
        self.sheet.record([result])
        if result.error:
            self.bar.write(f"{result.name}: {result.error}")
        return result

    async def _workflow(self, task: Task) -> Workflow:
        if task.contender == VAE:
            return self.graphs.through_vae()
        recipe = CONTENDERS[task.contender]
        if task.contender != PLAIN:
            return self.graphs.pair(recipe, task.seed) if task.style else self.graphs.own_picture(recipe, task.seed)
        content = await self._plain_lora(task.content, "A [c]")
        if task.style is None:
            return self.graphs.plain_own_picture(content, task.seed)
        return self.graphs.plain_pair(content, await self._plain_lora(task.style, "A [v]"), task.seed)

    async def _plain_lora(self, picture: Path, prompt: str) -> str:
        """The name of the file of a plain LoRA, trained before or now. Raises WorkflowError, also of an earlier try."""
        image = server_name(picture)
        training, name = self.graphs.plain_training(CONTENDERS[PLAIN], f"{INPUTS}/{image}", prompt)
        if name not in self.plain_loras:
            note = self.work / "plain_loras" / name
            listed = await self.client.get("/models/loras")
            if not (note.exists() and note.read_text() in listed):
                try:
                    await self._train_plain(training, image, picture.read_bytes())
                except WorkflowError as error:
                    self.plain_loras[name] = error
                    raise
                listed = await self.client.get("/models/loras")
                note.parent.mkdir(exist_ok=True)
                with written_whole(note) as unfinished:  # the last: of a training that was cut off there may be a file
                    unfinished.write_text(max(file for file in listed if file.startswith(name)))
            self.plain_loras[name] = note.read_text()
        if isinstance(self.plain_loras[name], WorkflowError):
            raise self.plain_loras[name]
        return self.plain_loras[name]

    async def _train_plain(self, training: Workflow, image: str, data: bytes) -> None:
        if not await self.client.has_upload(data, image, INPUTS):
            await self.client.upload(data, image, INPUTS)
        entry = await self.client.run(training, self._show_steps("plain LoRA"))
        if entry is None:
            raise Unreachable("The server was restarted.")
        if error := failure_text(entry):
            raise WorkflowError(error)

    def _show_steps(self, name: str):
        def on_event(kind: str, data: dict | bytes) -> None:
            if kind == "progress":
                self.bar.set_postfix_str(f"{name}, step {data['value']} of {data['max']}")

        return on_event


def main() -> str | int:
    """The exit status: 0, 1 if pictures failed, or a text that says why the program could not go on."""
    options = parse()
    try:
        base = DEMO if options.trial else sdxl(options.checkpoint)
        plan = planned(options, base.side)
        with server_url(options) as url:
            return asyncio.run(run(options, plan, base, url))
    except KeyboardInterrupt:
        return "Stopped. The same command goes on from here."
    except (Unreachable, Denied, ServerError) as error:
        return f"{error}\nThe same command goes on from here."
    except OSError as error:
        what = f"{error.filename or options.work}: {error.strerror or error}"
        return f"{what}. Once that is fixed, the same command goes on from here."
    except (ValueError, Refused) as error:
        return str(error)


def parse() -> argparse.Namespace:
    lines = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(description=lines[1], epilog=lines[2])
    models = {"checkpoint": "the base model", "clip": "CLIP, for style", "dino": "DINOv2, for content"}
    for name, what in models.items():
        parser.add_argument(f"--{name}", metavar="NAME", help=f"{what}, as ComfyUI lists it")
    for name in ("contents", "styles"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"the {name[:-1]} images")
    parser.add_argument("--pairs", type=count, metavar="N", help="at most so many, of the first images")
    parser.add_argument("--seeds", type=count, default=1, metavar="N", help="pictures a pair (default: 1)")
    parser.add_argument(
        "--scale", type=float, metavar="S", help="training steps, as a part of the paper's (default: 1)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=CONTENDERS, metavar="NAME", default=USUAL, help=", ".join(CONTENDERS)
    )
    parser.add_argument("--server", type=to_url, metavar="URL", help="a running ComfyUI, such as 127.0.0.1:8188")
    parser.add_argument("--work", type=Path, metavar="DIR", default=PACK / "benchmarks" / "work" / "photos")
    parser.add_argument("--trial", action="store_true", help="the demo model and its pictures, a few steps")
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.trial:
        options.scale = options.scale or TRIAL_STEPS
        if options.server:
            parser.error("--trial starts a ComfyUI of its own: leave --server out.")
        return options
    options.scale = options.scale or 1.0
    if missing := [f"--{name}" for name in (*models, "contents", "styles") if not getattr(options, name)]:
        parser.error(f"{', '.join(missing)} missing. --trial needs none.")
    return options


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


@contextmanager
def server_url(options: argparse.Namespace) -> Iterator[str]:
    """The running server, or one that is started with the models in COMFYUI_PATH."""
    if options.server:
        yield options.server
        return
    base, comfyui = options.work / "comfyui", Path(os.environ["COMFYUI_PATH"])
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    if options.trial:
        shutil.copy(PACK / "benchmarks" / "tiny_vision.py", base / "custom_nodes")
    models = {name: name for name in ("checkpoints", "clip_vision")}
    paths = base / "models.yaml"
    paths.write_text(json.dumps({"comfyui": {"base_path": str(comfyui.resolve() / "models"), **models}}))
    with ComfyServer(base, comfyui, "--extra-model-paths-config", str(paths)) as server:
        yield server.url


async def run(options: argparse.Namespace, plan: Plan, base: Base, url: str) -> int:
    """Makes all pictures, and reports after each contender; 1 if some failed. Raises ValueError for problems."""
    encoders = TINY_ENCODERS if options.trial else listed_encoders(options.clip, options.dino)
    patience = PATIENCE if options.server else PATIENCE_WITH_OWN
    async with ComfyClient(url, patience, tqdm.write, headers_in(os.environ.get(HEADER, ""))) as client:
        graphs = Graphs(await client.get("/object_info"), base, encoders, options.scale)
        problems = [
            problem for graph in graphs.every(plan.contenders) for problem in server_problems(graph, graphs.info)
        ]
        if problems:
            raise ValueError(error_text("This run", list(dict.fromkeys(problems))))
        print(announcement(plan, graphs), flush=True)
        report = Report(plan, graphs, options.work, await client.get("/system_stats"))
        with tqdm(total=sum(len(plan.tasks(name)) for name in (VAE, *plan.contenders)), unit="picture") as bar:
            studio = Studio(client, graphs, options.work, bar)
            failed = 0
            for name in (VAE, *plan.contenders):
                for task in plan.tasks(name):
                    result = await studio.make(task)
                    failed += bool(result.error)
                    bar.update()
                    if not result.error:
                        report.made[task] = result
                if name != VAE:
                    text = report.write()
    print(text, f"This report: {options.work / REPORT}", sep="\n")
    if failed:
        print(f"{failed} pictures failed, for the reasons in {RESULTS} there. The same command tries them again.")
    return int(bool(failed))


def planned(options: argparse.Namespace, side: int) -> Plan:
    """The first images of both folders, as squares in `--work`. Raises ValueError for files that are no pictures."""
    files = {name: picture_files(getattr(options, name), name) for name in ("contents", "styles")}
    if options.pairs:
        contents = min(len(files["contents"]), max(1, math.isqrt(options.pairs)))
        files["styles"] = files["styles"][: max(1, options.pairs // contents)]
        contents = min(len(files["contents"]), max(1, options.pairs // len(files["styles"])))
        files["contents"] = files["contents"][:contents]
    squares = {name: [squared(file, options.work / "pictures" / name, side) for file in files[name]] for name in files}
    return Plan(list(dict.fromkeys(options.only)), *squares.values(), options.seeds)


def picture_files(folder: Path | None, name: str) -> list[Path]:
    """The pictures of a folder, or those of the demo for a trial. Raises ValueError."""
    if folder is None:
        return sorted(IMAGES.glob(TRIAL_PICTURES[name]))
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    stems = [portable(file.stem).casefold() for file in found]
    if twice := [file.name for file, stem in zip(found, stems, strict=True) if stems.count(stem) > 1]:
        raise ValueError(f"{folder}: {' and '.join(twice)} have one name. Rename one of them.")
    if not found:
        raise ValueError(f"There are no pictures in {folder}. Put PNG, JPEG or WebP files there.")
    return found


def squared(file: Path, folder: Path, side: int) -> Path:
    """The middle square of a picture, as a PNG. Raises ValueError for a file that is no picture."""
    path = folder / f"{portable(file.stem)}.png"
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        ImageOps.fit(open_picture(file), (side, side), Image.Resampling.LANCZOS).save(unfinished, "PNG")
    return path


def announcement(plan: Plan, graphs: Graphs) -> str:
    """How much there is to train and to draw."""
    lines, seconds, trained = [], 0.0, set()
    for name in plan.contenders:
        recipe = CONTENDERS[name]
        by_content, by_style = (SHORTER.get(preset, 1) for preset in recipe.presets)
        image, style = graphs.scaled(recipe.steps), graphs.scaled(recipe.style_steps)
        of_style = math.ceil(image / by_style) + math.ceil(style / by_style)
        trainings = len(plan.contents) + len(plan.styles) * (2 if style else 1)
        steps = len(plan.contents) * math.ceil(image / by_content) + len(plan.styles) * of_style
        if recipe.training in trained:
            trainings = steps = 0
        trained.add(recipe.training)
        seconds += steps * (PLAIN_SECONDS if name == PLAIN else SECONDS)
        lines.append([name, recipe.label, trainings, steps, len(plan.own(name)) + len(plan.pairs(name))])
    header = ["", "contender", "trainings", "their steps", "pictures"]
    return (
        f"{len(plan.contents)} content images, {len(plan.styles)} style images, seeds a pair: {plan.seeds}.\n\n"
        f"{table(header, lines)}\nOn SDXL and an H200 so many steps take about {seconds / 3600:.1f} hours, by the "
        f"{SECONDS} s a step that were measured there, and {PLAIN_SECONDS} s of ComfyUI's own trainer (plain). What "
        "an earlier run has made is not made again.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
