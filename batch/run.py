"""Makes every picture of a job sheet in a running ComfyUI, and goes on where it stopped."""

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from batch.comfy_client import HEADER, ComfyClient, Denied, Refused, Unreachable, headers_in
from batch.fill_workflow import LORAS, catalogue_folder, fill_workflow, lora_problems, server_problems
from batch.job_runner import JobRunner, Keep, Order, check_is_there
from batch.scheduler import Scheduler, WorkerLost
from catalogue.api_form import SAVE, Workflow, is_workflow
from catalogue.names import as_spelled, inside
from catalogue.pictures import SUFFIXES, open_picture, picture_key
from catalogue.review import changed_results, newer_decisions
from catalogue.sheets import RESULTS, Job, Result, ResultsSheet, error_text, read_jobs
from catalogue.summary import SUMMARY, summarise, summary_text
from consislora_core.files import write_file

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows" / "api"
COMFYUI = ROOT.parent.parent / "main.py"  # this pack is in its custom_nodes
THIS = [sys.executable, str(COMFYUI)]
SAVING = {"size": ["as made", "as the photo"], "format": ["PNG", "WebP", "JPEG", "TIFF"], "bits": ["8", "16"]}


def main(arguments: list[str] | None = None) -> int | str:
    """The exit status: 0, 1 if jobs failed, or a text that says why the program could not go on."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a console may lack the letters of a name
    options = parse(arguments)
    try:
        return asyncio.run(run(options))
    except KeyboardInterrupt:
        what = "Its running jobs were cut off" if options.workers else "The server finishes its running job"
        return f"Stopped. {what}; the same command goes on from here."
    except Unreachable as error:
        return f"{error} Start ComfyUI, or name its address with --server. The same command goes on from here."
    except (Denied, WorkerLost) as error:
        return f"{error}\nThe same command goes on from here."
    except OSError as error:
        # The second is the name of a file that could not be replaced; none: of what is being written.
        what = f"{error.filename2 or error.filename or options.output}: {error.strerror or error}"
        return f"{what}. Once that is fixed, the same command goes on."
    except (ValueError, Refused) as error:
        return str(error)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    epilog = f"{HEADER} in the environment is sent as a header, such as 'Authorization: Bearer ...'."
    parser = argparse.ArgumentParser(prog="python batch", description=__doc__, epilog=epilog)
    parser.add_argument(
        "sheet", type=Path, help="CSV or JSON, one picture a line: content, style, and what else differs"
    )
    parser.add_argument("--server", type=to_url, default="127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where pictures go (default: beside the sheet)")
    parser.add_argument(
        "--workflow",
        type=Path,
        default=WORKFLOWS / "catalogue_sdxl.json",
        metavar="FILE",
        help="API form, with Load and Save Catalogue (default: %(default)s)",
    )
    parser.add_argument("--checkpoint", metavar="NAME", help="the base model, as Load Checkpoint lists it")
    for name, values in SAVING.items():
        parser.add_argument(f"--{name}", choices=values, help="of the results (default: as in the workflow)")
    parser.add_argument("--dry-run", action="store_true", help="only check every job, and report all problems")
    parser.add_argument(
        "--patience",
        type=to_seconds,
        default=3600,
        metavar="S",
        help="how long to wait for a server that does not answer",
    )
    parser.add_argument(
        "--workers",
        type=to_count,
        metavar="N",
        help="instead of a server: start this many ComfyUIs, on all machines of a Ray cluster",
    )
    parser.add_argument(
        "--comfyui",
        type=split_command,
        default=THIS,
        metavar="COMMAND",
        help="starts a worker's ComfyUI (default: the one that this pack is in), "
        "as in 'python /srv/ComfyUI/main.py --lowvram'",
    )
    options = parser.parse_args(arguments)
    options.output = options.output or options.sheet.with_name(f"{options.sheet.stem}_results")
    return options


def split_command(text: str) -> list[str]:
    """The words of a command line, which may have quotes. On Windows a backslash separates folders."""
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.commenters = True, ""
    if os.sep == "\\":
        words.escape = ""
    return list(words)


def to_seconds(text: str) -> float:
    """A number of seconds. Raises ArgumentTypeError for what is none."""
    with suppress(ValueError):
        if (seconds := float(text)) >= 0:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, such as 3600")


def to_count(text: str) -> int:
    """A number of workers. Raises ArgumentTypeError for what is none."""
    with suppress(ValueError):
        if (count := int(text)) > 0:
            return count
    raise argparse.ArgumentTypeError(f"{text!r} is no number of workers, such as 4")


def to_url(text: str) -> str:
    """The address of a server. Raises ArgumentTypeError, which does not name it: it may hold a password."""
    text = text.strip()
    url = text if "://" in text else f"http://{text}"
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    raise argparse.ArgumentTypeError("no address of a server, such as 127.0.0.1:8188 or https://host/path")


async def run(options: argparse.Namespace) -> int:
    """Runs all jobs. Raises ValueError that lists every problem, before any job is sent."""
    jobs = read_jobs(options.sheet)
    workflow = read_workflow(options.workflow, options.checkpoint, saving(options))
    batch = Batch(workflow, options.sheet, options.output)
    if problems := batch.local_problems(jobs):
        raise ValueError(error_text(options.sheet.name, problems))
    async with job_runner(options) as runner:
        try:
            problems = await batch.server_problems(jobs, runner.get)
        except Unreachable as error:
            if not options.dry_run:
                raise
            print(f"{error} The jobs are not checked against it.")
        if problems:
            raise ValueError(error_text(options.sheet.name, problems))
        if options.dry_run:
            print(f"{len(jobs)} jobs, no problems found.")
            return 0
        return await batch.run_all(jobs, runner)


@asynccontextmanager
async def job_runner(options: argparse.Namespace) -> AsyncIterator[JobRunner | Scheduler]:
    """What runs the jobs: one server, or workers."""
    if options.workers:
        if options.comfyui == THIS and not COMFYUI.exists():
            raise ValueError(f"There is no {COMFYUI}. Say with --comfyui what starts ComfyUI.")
        try:
            from batch.ray_workers import ray_scheduler
        except ImportError:
            raise ValueError('--workers needs Ray. In this pack\'s folder: pip install ".[cluster]"') from None
        async with ray_scheduler(options.workers, options.comfyui, tqdm.write) as scheduler:
            yield scheduler
    else:
        headers = headers_in(os.environ.get(HEADER, ""))
        patience = 0 if options.dry_run else options.patience
        async with ComfyClient(options.server, patience, tqdm.write, headers) as client:
            yield JobRunner(client, tqdm.write)


def saving(options: argparse.Namespace) -> dict[str, str]:
    """The inputs of Save Catalogue that the command line names."""
    return {name: getattr(options, name) for name in SAVING if getattr(options, name)}


def read_workflow(path: Path, checkpoint: str | None, save_as: Mapping[str, str] = {}) -> Workflow:
    """A workflow in API form, with another checkpoint if one is named. save_as: other inputs of Save Catalogue.

    Raises ValueError for another kind of file, and for a checkpoint that the workflow does not load.
    """
    try:
        workflow = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (ValueError, RecursionError):
        workflow = None
    if not is_workflow(workflow):
        raise ValueError(f"{path} is not a whole workflow in API form. In ComfyUI use File > Export (API).")
    loaders = [node for node in workflow.values() if "ckpt_name" in node["inputs"]]
    if checkpoint and not loaders:
        raise ValueError(f"{path} has no Load Checkpoint for --checkpoint. Leave that out, or name another workflow.")
    for node in loaders if checkpoint else ():
        node["inputs"]["ckpt_name"] = checkpoint
    for node in workflow.values():
        if node["class_type"] == SAVE:
            node["inputs"] |= save_as
    return workflow


class Batch:
    """Turns the jobs of a sheet into orders, and saves their results in the folder `output`."""

    def __init__(self, workflow: Workflow, sheet: Path, output: Path):
        self.workflow, self.folder, self.output = workflow, sheet.parent, output
        self.server_folder = catalogue_folder(sheet.stem)
        self.names: dict[str, str] = {}  # of pictures on the server, by their name in the sheet
        self.metadata: dict[str, dict] = {}  # of LoRA files on the server, by name

    def local_problems(self, jobs: list[Job]) -> list[str]:
        """Pictures that do not open, and jobs that the workflow cannot do."""
        problems: dict[str, str] = {}
        for job in jobs:
            for column in ("content", "style"):
                picture = getattr(job, column)
                if picture not in self.names and picture not in problems:
                    try:
                        self.names[picture] = server_name(self.path(picture))
                    except ValueError as error:
                        problems[picture] = f"{job.name}, column {column}: {error}"
        found = list(problems.values())
        for job in jobs:
            try:
                fill_workflow(self.workflow, job, "", "", self.server_folder, {})
            except ValueError as error:
                found.append(f"{job.name}: {error}")
        return found

    def path(self, picture: str) -> Path:
        """The file of a picture in the sheet."""
        return as_spelled(self.folder / picture)

    async def server_problems(self, jobs: list[Job], get: Callable[..., Awaitable]) -> list[str]:
        """What the server would refuse, for jobs without `local_problems`. get: reads from the server."""
        info = await get("/object_info")
        for name in {getattr(job, column) for job in jobs for column in LORAS} - {None}:
            self.metadata[name] = await get("/view_metadata/loras", lacking=True, filename=name) or {}
        found = {}
        for job in jobs:
            for problem in [*server_problems(self.order(job).workflow, info), *lora_problems(job, self.metadata)]:
                found.setdefault(problem, f"{job.name}: {problem}")  # one line for a problem of the workflow itself
        return list(found.values())

    def order(self, job: Job) -> Order:
        """A job as the server gets it, with its pictures as they are now. Raises ValueError for one that does not open,
        and as `fill_workflow` does."""
        content, style = map(self._name_now, (job.content, job.style))
        workflow, key = fill_workflow(self.workflow, job, content, style, self.server_folder, self.metadata)
        return Order(
            Result(job.name, key, job.content, job.style),
            workflow,
            self.server_folder,
            {content: self.path(job.content), style: self.path(job.style)},
            frozenset([f"content {job.content_lora or content}", f"style {job.style_lora or style}"]),
        )

    def _name_now(self, picture: str) -> str:
        """The name of a picture on the server. It is opened only if it has changed."""
        path = self.path(picture)
        with suppress(OSError):
            if name_by_bytes(path) == self.names[picture]:
                return self.names[picture]
        self.names[picture] = server_name(path)
        return self.names[picture]

    async def run_all(self, jobs: list[Job], runner: JobRunner | Scheduler) -> int:
        """Runs the jobs that are not done; 1 if any is not in the sheet then, or has failed."""
        sheet, task = ResultsSheet(self.output / RESULTS), asyncio.current_task()

        def stop_if_cancelled() -> None:
            """Of Ctrl-C asyncio only takes note, from Python 3.11 on, until the task waits for something of its own."""
            if hasattr(task, "cancelling") and task.cancelling():
                raise asyncio.CancelledError

        with tqdm(total=len(jobs), unit="job") as bar:

            def keep(result: Result, picture: bytes | None) -> None:
                bar.update()
                known = sheet.entries().get(result.name)
                if known and known.is_done(result.key, self.output):
                    return  # by another batch in this folder, and people may have decided about that picture
                sheet.record([self.saved(result, picture) if picture else result], waiting=stop_if_cancelled)
                if result.error:
                    bar.write(f"{result.name}: {result.error}")

            await runner.run_all(self.left(jobs, sheet, keep, bar.update), keep, bar.set_postfix_str)
        if isinstance(runner, JobRunner):  # the folders of workers end with them
            await self.bring_review(sheet, runner, stop_if_cancelled)
        results = sheet.read()
        summary = summarise(results.values(), changed_results(self.output, results.values()))
        write_file(self.output / SUMMARY, json.dumps(summary, ensure_ascii=False, indent=1).encode())
        done = sum(job.name in results and not results[job.name].error for job in jobs)
        print(f"{done} of {len(jobs)} are in {self.output}.", *["Failed ones are in its sheet."] * (done < len(jobs)))
        print(summary_text(summary))
        return int(done < len(jobs))

    def left(self, jobs: list[Job], sheet: ResultsSheet, keep: Keep, skip: Callable[[], object]) -> Iterator[Order]:
        """The orders of the jobs that nobody has done when their turn comes.

        One whose pictures no longer open fails, unless it has a result. Raises OSError if all its pictures are gone.
        """
        for job in jobs:
            known = sheet.entries().get(job.name)
            try:
                order = self.order(job)
            except ValueError as error:
                for picture in (job.content, job.style):
                    check_is_there(self.path(picture).parent)
                if known and not known.error:
                    skip()
                else:
                    keep(Result(job.name, content=job.content, style=job.style, error=str(error)), None)
                continue
            if known and known.is_done(order.result.key, self.output):
                skip()
            else:
                yield order

    async def bring_review(self, sheet: ResultsSheet, runner: JobRunner, waiting: Callable[[], None]) -> None:
        """Brings what people did on the server's review page: pictures made again there, and decisions."""
        names = {result.key: name for name, result in sheet.read().items() if not result.retry_of}
        theirs = {}
        for result in (await runner.results(self.server_folder)).values():
            first = result.retry_of or result.name
            if first in names:
                theirs[names[first] + result.name.removeprefix(first)] = result
        for name in theirs.keys() - sheet.read().keys():
            result = theirs[name]
            if result.files and (picture := await runner.client.file(result.files, self.server_folder)):
                first = sheet.read()[names[result.retry_of]]
                ours = replace(result, name=name, content=first.content, style=first.style, retry_of=first.name)
                sheet.record([self.saved(ours, picture)], waiting=waiting)
        if newer := newer_decisions(sheet.read(), theirs):
            with sheet.edited(waiting) as records:
                for name, decision in newer.items():
                    records[name] |= decision

    def saved(self, result: Result, picture: bytes) -> Result:
        """Writes a picture; the result with its file's name, whose suffix was in `result.files`. Raises OSError."""
        path = inside(self.output, result.name + Path(result.files).suffix)
        write_file(path, picture)
        return replace(result, files=path.relative_to(self.output).as_posix())


def server_name(picture: Path) -> str:
    """The name of a picture on the server. Raises ValueError for one that does not open."""
    open_picture(picture)
    return name_by_bytes(picture)


def name_by_bytes(picture: Path) -> str:
    suffix = picture.suffix.lower()
    return picture_key(picture) + (suffix if suffix in SUFFIXES else "")
