"""A job sheet over two workers of Ray on this machine, one of which is killed."""

import asyncio
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
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


needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason='Ray has no package for this machine, or pip install ".[cluster]"'
)


@needs_ray
@pytest.mark.parametrize("comfyui", [[sys.executable, "-c", "print('no CUDA')"], ["no_such_program"]], ids=len)
def test_a_worker_whose_comfyui_does_not_start_says_why_and_leaves_nothing(comfyui):
    from batch.ray_workers import Worker
    from batch.scheduler import WorkerLost

    async def start() -> tuple[Worker, str]:
        worker = Worker(comfyui)
        with pytest.raises(WorkerLost) as lost:
            await worker.start()
        return worker, str(lost.value)

    worker, said = asyncio.run(start())
    assert "no CUDA" in said or "no_such_program does not run" in said
    assert not Path(worker.folder.name).exists()


@pytest.mark.slow
@needs_ray
def test_with_one_of_two_workers_killed_every_job_is_in_the_sheet_once(command, tmp_path):
    process, output = at_work(command)
    one, other = comfyuis(tmp_path / "base")
    one.parent().kill()
    output += process.communicate()[0]
    assert process.returncode == 0, output.decode()
    assert b"was lost (its process ended); the job goes on elsewhere." in output
    check_every_job_is_there_once(tmp_path / "jobs_results")
    assert comfyuis(tmp_path / "base") == []


def at_work(command: list[str], **options) -> tuple[subprocess.Popen, bytes]:
    """The batch once both workers are at work, and its output so far."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    output = b""
    while not re.search(rb"[ab] \d, [ab] \d\]", output):
        output += process.stdout.read1()
        assert process.poll() is None, output.decode()
    return process, output


def check_every_job_is_there_once(folder: Path) -> None:
    with (folder / RESULTS).open(encoding="utf-8-sig", newline="") as file:
        rows = [row["name"] for row in csv.DictReader(file)]
    assert sorted(rows) == sorted(NAMES)
    results = ResultsSheet(folder / RESULTS).read()
    assert all(result.is_done(result.key, folder) for result in results.values())
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(f"{name}.png" for name in NAMES)
    assert len({open_picture(path).tobytes() for path in folder.glob("*.png")}) == len(NAMES)


HOSTS = {"consislora_one": "10.77.0.1", "consislora_two": "10.77.0.2"}  # network namespaces and their addresses
PORT = 6379
# Otherwise Ray takes half a minute to see that a machine is cut off.
IMPATIENT = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}


def run_ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def cluster(monkeypatch):
    """Two machines of a Ray cluster, as two network namespaces with a cable between; on the first the batch is run."""
    for name, value in IMPATIENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ADDRESS", f"10.77.0.1:{PORT}")
    for host in HOSTS:
        run_ip("netns", "add", host)
    (one, first), (two, second) = HOSTS.items()
    run_ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two)
    for host, address in HOSTS.items():
        run_ip("-n", host, "address", "add", f"{address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            run_ip("-n", host, "link", "set", device, "up")
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--block"]
    # Sockets have short paths.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
        commands = {one: [*ray, f"--node-ip-address={first}", *head]}
        commands[two] = [*ray, f"--node-ip-address={second}", f"--address={first}:{PORT}"]
        machines = [
            subprocess.Popen(["ip", "netns", "exec", host, *command], stdout=subprocess.DEVNULL)
            for host, command in commands.items()
        ]
        yield one
        for host in HOSTS:
            for process in map(psutil.Process, map(int, run_ip("netns", "pids", host).split())):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            run_ip("netns", "delete", host)
        for machine in machines:
            machine.wait()


def may_divide_the_network() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") is not None


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(not may_divide_the_network(), reason="network namespaces are for root on Linux")
def test_with_one_of_two_machines_cut_off_every_job_is_in_the_sheet_once(command, cluster, tmp_path):
    process, output = at_work(["ip", "netns", "exec", cluster, *command])
    run_ip("-n", cluster, "link", "set", "cable", "down")
    output += process.communicate()[0]
    assert process.returncode == 0, output.decode()
    assert b"was lost" in output and b"; the job goes on elsewhere." in output
    check_every_job_is_there_once(tmp_path / "jobs_results")
