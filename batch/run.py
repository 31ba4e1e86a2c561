"""Makes every picture of a job sheet in a running ComfyUI, and goes on where it stopped."""

import argparse
import asyncio
import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from batch.server import Refused, Server, Unreachable, failure
from batch.workflow import ADAPTERS, INPUTS, Workflow, catalogue_folder, filled, mismatched, refused
from consislora_core import catalog
from consislora_core.catalog import Job, Result, ResultsSheet
from consislora_core.files import inside, written_whole

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows" / "api"
ATTEMPTS = 3  # a job at which the server breaks down as often is left


def main(arguments: list[str] | None = None) -> int | str:
    """What the program ends with: 0, 1 if jobs failed, or in words why it could not go on."""
    options = parsed(arguments)
    try:
        return asyncio.run(run(options))
    except KeyboardInterrupt:
        return "Stopped. The server finishes the job it is at; the same command goes on from here."
    except Unreachable as error:
        return f"{error} Start ComfyUI, or name its address with --server. The same command goes on from here."
    except (ValueError, OSError, Refused) as error:
        return str(error)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python batch", description=__doc__)
    parser.add_argument("sheet", type=Path, help="CSV or JSON, a row a picture: content, style, and what else differs")
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where pictures go (default: beside the sheet)")
    parser.add_argument(
        "--workflow",
        type=Path,
        default=WORKFLOWS / "catalogue_sdxl.json",
        metavar="FILE",
        help="API form, with Load and Save Catalogue (default: %(default)s)",
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="the base model, as Load Checkpoint lists it")
    parser.add_argument("--dry-run", action="store_true", help="only check every job, and tell all problems")
    parser.add_argument(
        "--patience", type=float, default=3600, metavar="S", help="how long to wait for a server that is away"
    )
    return parser.parse_args(arguments)


async def run(options: argparse.Namespace) -> int:
    """Raises ValueError that tells every problem, before any job is sent."""
    jobs = catalog.read_jobs(options.sheet)
    workflow = read_workflow(options.workflow, options.checkpoint)
    output = options.output or options.sheet.with_name(f"{options.sheet.stem}_results")
    async with Server(options.server, 0 if options.dry_run else options.patience, tqdm.write) as server:
        batch = Batch(server, workflow, options.sheet, output)
        problems = batch.local_problems(jobs)
        try:
            problems += await batch.server_problems(jobs) if not problems else []
        except Unreachable as error:
            print(f"{error} The jobs are not checked against it.")
        if problems:
            raise ValueError(catalog.told(options.sheet.name, problems))
        if options.dry_run:
            print(f"{len(jobs)} jobs, no problems found.")
            return 0
        return await batch.make_all(jobs)


def read_workflow(path: Path, checkpoint: str | None) -> Workflow:
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        loaders = [node for node in workflow.values() if "ckpt_name" in node["inputs"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is no workflow in API form. In ComfyUI use File > Export (API).") from None
    for node in loaders if checkpoint else []:
        node["inputs"]["ckpt_name"] = checkpoint
    return workflow


class Batch:
    """The jobs of a sheet on their way through a server. output: folder of the results."""

    def __init__(self, server: Server, workflow: Workflow, sheet: Path, output: Path):
        self.server, self.workflow, self.folder, self.output = server, workflow, sheet.parent, output
        self.there = catalogue_folder(sheet.stem)  # on the server
        self.names: dict[str, str] = {}  # of pictures on the server, by what the sheet calls them
        self.uploaded: set[str] = set()

    def local_problems(self, jobs: list[Job]) -> list[str]:
        """Pictures that do not open, and what the workflow cannot do."""
        problems: dict[str, str] = {}
        for job in jobs:
            for column in ("content", "style"):
                picture = getattr(job, column)
                if picture not in self.names and picture not in problems:
                    try:
                        self.names[picture] = server_name(self.folder / picture)
                    except ValueError as error:
                        problems[picture] = f"{job.name}, column {column}: {error}"
        found = list(problems.values())
        for job in jobs:
            try:
                filled(self.workflow, job, "", "", self.there)
            except ValueError as error:
                found.append(f"{job.name}: {error}")
        return found

    async def server_problems(self, jobs: list[Job]) -> list[str]:
        """What the server would not take. For jobs that have no `local_problems`."""
        info = await self.server.get("/object_info")
        if info is None:
            return [f"{self.server.url} is no ComfyUI. Name its address with --server."]
        loras = {getattr(job, column) for job in jobs for column in ADAPTERS} - {None}
        metadata = {name: await self.server.get("/view_metadata/loras", filename=name) or {} for name in loras}
        found = {}
        for job in jobs:
            for problem in [*refused(self.filled(job)[0], info), *mismatched(job, metadata)]:
                found.setdefault(problem, f"{job.name}: {problem}")  # of the workflow itself, said once
        return list(found.values())

    def filled(self, job: Job) -> tuple[Workflow, str]:
        return filled(self.workflow, job, self.names[job.content], self.names[job.style], self.there)

    async def make_all(self, jobs: list[Job]) -> int:
        """Makes what is not done; 1 if any failed."""
        sheet = ResultsSheet(self.output / catalog.RESULTS)
        results, failed = sheet.read(), 0
        with tqdm(total=len(jobs), unit="job") as bar:
            for job in jobs:
                prompt, key = self.filled(job)
                if job.name not in results or not results[job.name].done(key, self.output):
                    bar.set_postfix_str(job.name)
                    started = time.monotonic()
                    result = await self.make(job, prompt, key, Steps(bar, job.name))
                    sheet.record([replace(result, seconds=round(time.monotonic() - started, 1))])
                    if result.error:
                        failed += 1
                        bar.write(f"{job.name}: {result.error}")
                bar.update()
        print(
            f"{len(jobs) - failed} of {len(jobs)} are in {self.output}.",
            *["Failed ones are in its sheet."] * (failed > 0),
        )
        return int(failed > 0)

    async def make(self, job: Job, prompt: Workflow, key: str, progress: Callable[[int, int], None]) -> Result:
        """Raises Unreachable."""
        result = Result(job.name, key, job.content, job.style)
        try:
            for picture in (job.content, job.style):
                await self.upload(picture)
            for _ in range(ATTEMPTS):
                entry = await self.server.run(prompt, progress)
                if entry:
                    error = failure(entry)
                    return replace(result, error=error) if error else await self.bring_home(result)
                tqdm.write(f"{job.name}: the server has lost it; queued again.")
        except Refused as error:
            return replace(result, error=str(error))
        return replace(result, error=f"the server was restarted at it {ATTEMPTS} times. Look into the server's log.")

    async def upload(self, picture: str) -> None:
        if picture not in self.uploaded:
            await self.server.upload(self.folder / picture, self.names[picture], INPUTS)
            self.uploaded.add(picture)

    async def bring_home(self, result: Result) -> Result:
        """Fetches the picture and its row, both under the name that we gave the job."""
        data = await self.server.file(f"{result.key}.png", self.there)
        sheet = await self.server.file(catalog.RESULTS, self.there)
        if data is None or sheet is None:
            return replace(result, error="the workflow ended without a picture. Look into the server's log.")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()
        path = inside(self.output, f"{result.name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished:
            unfinished.write_bytes(data)
        file = path.relative_to(self.output).as_posix()
        row = catalog.read_results(catalog.RESULTS, sheet).get(result.key, result)
        return replace(row, name=result.name, key=result.key, content=result.content, style=result.style, files=file)


class Steps:
    """Shows on the bar how far the job at hand is."""

    def __init__(self, bar: tqdm, name: str):
        self.bar, self.name = bar, name

    def __call__(self, step: int, steps: int) -> None:
        self.bar.set_postfix_str(f"{self.name}, step {step} of {steps}")


def server_name(picture: Path) -> str:
    """What a picture is called on the server: by its bytes. Raises ValueError for one that does not open."""
    catalog.open_picture(picture)
    return catalog.picture_key(picture) + picture.suffix.lower()
