"""A job sheet over two workers of Ray on this machine, one of which is killed."""

import csv
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from conftest import COMFYUI, ROOT
from prompts import two_steps

from catalogue.pictures import open_picture
from catalogue.sheets import RESULTS, ResultsSheet
from demo.run import IMAGES
from demo.server import link_folder

CROWN, UMBRELLA = "crown-flat.png", "umbrella-high-contrast.png"
NAMES = [f"{pair} {number}" for number in range(5) for pair in "ab"]
STEPS = 40  # so that a job takes long enough for the second worker to come while there is work


@pytest.fixture
def command(tmp_path) -> list[str]:
    """Spreads a sheet of ten jobs over two workers."""
    for name in (CROWN, UMBRELLA):
        (tmp_path / name).write_bytes((IMAGES / name).read_bytes())
    with (tmp_path / "jobs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "content", "style", "seed", "steps"])
        for number, name in enumerate(NAMES):
            rows.writerow([name, *((CROWN, UMBRELLA) if name[0] == "a" else (UMBRELLA, CROWN)), number, STEPS])
    (tmp_path / "quick.json").write_text(json.dumps(two_steps("catalogue_demo")))
    base = tmp_path / "base"
    (base / "custom_nodes").mkdir(parents=True)
    link_folder(base / "custom_nodes" / "ComfyUI-ConsisLoRA", ROOT)
    comfyui = f"'{sys.executable}' '{COMFYUI / 'main.py'}' --cpu --disable-api-nodes --base-directory '{base}'"
    arguments = [tmp_path / "jobs.csv", "--workflow", tmp_path / "quick.json", "--workers", 2, "--comfyui", comfyui]
    return [sys.executable, ROOT / "batch", *map(str, arguments)]


def comfyuis(base: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if str(COMFYUI / "main.py") in line and str(base) in line:
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason='Ray has no package for this machine, or pip install ".[cluster]"')
def test_with_one_of_two_workers_killed_every_job_is_in_the_sheet_once(command, tmp_path):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = b""
    while not re.search(rb"[ab] \d, [ab] \d\]", output):  # both are at work
        output += process.stdout.read1()
        assert process.poll() is None, output.decode()
    one, other = comfyuis(tmp_path / "base")
    one.parent().kill()
    output += process.communicate()[0]
    assert process.returncode == 0, output.decode()
    assert b"was lost (its process ended); the job goes on elsewhere." in output
    folder = tmp_path / "jobs_results"
    with (folder / RESULTS).open(encoding="utf-8-sig", newline="") as file:
        rows = [row["name"] for row in csv.DictReader(file)]
    assert sorted(rows) == sorted(NAMES)
    results = ResultsSheet(folder / RESULTS).read()
    assert all(result.is_done(result.key, folder) for result in results.values())
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(f"{name}.png" for name in NAMES)
    assert len({open_picture(path).tobytes() for path in folder.glob("*.png")}) == len(NAMES)
    assert comfyuis(tmp_path / "base") == []
