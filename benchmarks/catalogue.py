"""`python benchmarks/catalogue.py [--jobs 200]`: a long sheet through the real queue, with LoRAs trained before.

A ComfyUI with the demo model makes every job of a sheet as `python batch` sends it. Reports, also in
benchmarks/results/catalogue.md: whether every picture and entry is there, by how much the server's memory after all
jobs differs from that after half of them, and how much longer a job took in the last fifth than in the first. Exits
with 1 if something is missing, or memory differs by more than 2 %.
"""

import argparse
import asyncio
import csv
import os
import runpy
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = 0.02
PICTURES = ("crown-flat.png", "umbrella-high-contrast.png")
STEPS = 4
REPORT = ROOT / "benchmarks" / "results" / "catalogue.md"


def lay_out(folder: Path, jobs: int) -> Path:
    """Writes the sheet, with its pictures beside it. The first job trains the LoRAs of all."""
    for name in PICTURES:
        (folder / name).write_bytes((ROOT / "demo" / "images" / name).read_bytes())
    with (folder / "jobs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["content", "style", "name", "seed", "steps", "content_strength"])
        rows.writerows([*PICTURES, f"job {n:04}", n, STEPS, 0.5 + n / jobs] for n in range(jobs))
    return folder / "jobs.csv"


def measure(count: int, folder: Path) -> bool:
    """Prints and saves the report; whether all is there and within bounds."""
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # python put benchmarks/ there
    import psutil
    from prompts import two_steps

    from batch.comfy_client import ComfyClient
    from batch.job_runner import JobRunner
    from batch.run import Batch
    from benchmarks.common import comfyui_version, template
    from catalogue.sheets import RESULTS, ResultsSheet, read_jobs
    from demo.server import ComfyServer

    sheet = lay_out(folder, count)
    jobs, output = read_jobs(sheet), folder / "results"
    with ComfyServer(folder / "comfyui", Path(os.environ["COMFYUI_PATH"])) as comfyui:
        (process,) = (child for child in psutil.Process().children() if "main.py" in " ".join(child.cmdline()))

        async def run(half: list) -> int:
            async with ComfyClient(comfyui.url, patience=60) as client:
                batch = Batch(two_steps("catalogue_demo"), sheet, output)
                assert batch.local_problems(half) == []
                await batch.run_all(half, JobRunner(client))
            return process.memory_info().rss

        sizes = [asyncio.run(run(part)) for part in (jobs[: count // 2], jobs[count // 2 :])]
    results = ResultsSheet(output / RESULTS).read()
    present = [job for job in jobs if results[job.name].is_done(results[job.name].key, output)]
    seconds = [results[job.name].seconds for job in jobs]
    fifth = max(1, count // 5)
    late, early = (statistics.median(part) for part in (seconds[-fifth:], seconds[1 : fifth + 1]))
    growth = sizes[1] / sizes[0] - 1
    shown = " and ".join(f"{size / 1e6:.0f} MB" for size in sizes)
    (text,) = template("catalogue")
    report = text.format(
        date=date.today(), comfyui=comfyui_version(), count=count, half=count // 2, steps=STEPS, present=len(present),
        allowed=ALLOWED, shown=shown, growth=growth, fifth=fifth, slower=late / early,
    )  # fmt: skip
    print(report)
    REPORT.write_text(report, encoding="utf-8")
    return len(present) == count and abs(growth) <= ALLOWED


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=200)
    options = parser.parse_args()
    runpy.run_path(str(ROOT / "bootstrap.py"))["enter"]("tests")
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(not measure(options.jobs, Path(folder)))
