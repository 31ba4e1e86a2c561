"""`python benchmarks/frames_memory.py`: a film of up to 64 frames through the real queue, and cancelled in the middle.

A ComfyUI with the demo model queues the workflow frames_demo with films of 8, 16, 32 and 64 frames, in few steps. Each
goes through in three parts, up to the sampler, the sampler, and the rest, and the server's memory is read all the time.
The longest is sampled again, cancelled half way, and once more. Reports, also in benchmarks/results/frames_memory.md:
by how much memory grows in each part, and what a cancel leaves. Exits with 1 if sampling the longest film takes over
5 % more than sampling the shortest, or if the film after the cancel is another one.
"""

import argparse
import copy
import os
import runpy
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FRAMES = (8, 16, 32, 64)
STEPS = 1  # of sampling
ALLOWED = 0.05
SIDE = 256  # of a picture, as the demo model draws it
REPORT = ROOT / "benchmarks" / "results" / "frames_memory.md"
SAMPLER = "ConsisLoRASampler"
BEFORE, SAMPLING, AFTER = "up to the sampler", "the sampler", "the rest"


class Film(NamedTuple):
    """What was measured of one. growth: in bytes, of the server's memory in each part, at its peak."""

    growth: dict[str, int]
    seconds: float  # of the sampler
    pictures: list[bytes]


class Cancelled(NamedTuple):
    """What was found of the film that was cancelled, and of the same one, which was queued behind it."""

    ended: str  # ComfyUI's last message of it
    at: str  # step of steps
    frames: int
    is_same: bool  # as without a cancel


def workflow(frames: int, seed: int = 0) -> dict:
    """The shared workflow, in few steps. seed: changes no film, but has ComfyUI sample again."""
    from prompts import two_steps

    prompt = two_steps("frames_demo")
    for node in prompt.values():
        if node["class_type"] == SAMPLER:
            node["inputs"] |= {"steps": STEPS, "seed": seed}
        if node["class_type"] == "LoadVideo":
            node["inputs"]["file"] = f"{frames}.mp4"
    return prompt


def parts_of(prompt: dict) -> dict[str, dict]:
    """The workflow up to each part's end: what ComfyUI has done already, it keeps."""
    (sampler,) = (name for name, node in prompt.items() if node["class_type"] == SAMPLER)
    after = {sampler}
    while more := {name for name, node in prompt.items() if linked(node) & after} - after:
        after |= more
    begun = {name: node for name, node in prompt.items() if name not in after}
    begun["start"] = saved(prompt[sampler]["inputs"]["latent_image"])
    sampled = begun | {sampler: prompt[sampler], "end": saved([sampler, 0])}
    return {BEFORE: begun, SAMPLING: sampled, AFTER: copy.deepcopy(prompt) | sampled}


def linked(node: dict) -> set[str]:
    return {value[0] for value in node["inputs"].values() if isinstance(value, list)}


def saved(latent: list) -> dict:
    return {"class_type": "SaveLatent", "inputs": {"samples": latent, "filename_prefix": "frames"}}


def measure(server, pid: int, frames: int) -> Film:
    from images import write_film

    from benchmarks.trainers import peak_growth

    write_film(server.base / "input" / f"{frames}.mp4", frames)
    growth, seconds = {}, {}
    for name, part in parts_of(workflow(frames)).items():
        began = time.monotonic()
        with peak_growth(pid=pid) as grown:
            entry = server.run(part, timeout=3600)
        growth[name], seconds[name] = grown[0], time.monotonic() - began
    return Film(growth, seconds[SAMPLING], pictures_of(server, entry))


def pictures_of(server, entry: dict) -> list[bytes]:
    """The frames of the film that a workflow saved; the animated WebP beside it leaves equal ones out."""
    import av

    with av.open(next(file for file in server.images(entry) if file.suffix == ".mp4")) as film:
        return [frame.to_ndarray().tobytes() for frame in film.decode(video=0)]


def cancel_half_way(server, frames: int, wanted: list[bytes]) -> Cancelled:
    prompt, reached = workflow(frames, seed=1), []

    def cancel(kind: str, data) -> None:
        if kind == "progress" and prompt[data["node"]]["class_type"] == SAMPLER and 2 * data["value"] >= data["max"]:
            if not reached:
                server.cancel()
            reached.append(f"step {data['value']} of {data['max']}")

    first, second = server.queue(prompt), server.queue(prompt)
    ended, _ = server.wait(first, timeout=3600, on_event=cancel)["status"]["messages"][-1]
    pictures = pictures_of(server, server.wait(second, timeout=3600))
    return Cancelled(ended, reached[0], len(pictures), pictures == wanted)


def report_of(films: dict[int, Film], found: Cancelled, flat: float) -> str:
    from benchmarks.common import comfyui_version, table, template

    def mb(size: float) -> str:
        return f"{size / 1e6:.1f} MB"

    latent, picture = 4 * 4 * (SIDE // 8) ** 2, 4 * 3 * SIDE**2
    rows = [
        [frames, mb(frames * latent), mb(frames * picture), *map(mb, film.growth.values()),
         f"{film.seconds / frames:.1f} s"] for frames, film in films.items()
    ]  # fmt: skip
    header = ["frames", "their latents", "their pictures", *(f"growth, {part}" for part in (BEFORE, SAMPLING, AFTER))]
    (text,) = template("frames_memory")
    return text.format(
        date=date.today(), comfyui=comfyui_version(), steps=STEPS, allowed=ALLOWED, flat=flat, most=max(films),
        few=min(films), table=table([*header, "sampling a frame"], rows), latent=latent / 1e3, picture=picture / 1e6,
        sdxl_latent=16 * latent / 1e3, sdxl_picture=16 * picture / 1e6, ended=found.ended, at=found.at,
        frames=found.frames, same="the same" if found.is_same else "OTHERS",
    )  # fmt: skip


def main(counts: list[int]) -> bool:
    """Prints and saves the report; whether all is within bounds."""
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]  # python put benchmarks/ there
    import psutil

    from benchmarks.common import GIVE_BACK
    from demo.run import IMAGES
    from demo.server import ComfyServer

    os.environ |= GIVE_BACK  # of the server, or what it keeps for later would count as well
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(Path(folder), Path(os.environ["COMFYUI_PATH"])) as server,
    ):
        (pid,) = (child.pid for child in psutil.Process().children() if "main.py" in " ".join(child.cmdline()))
        for file in IMAGES.glob("*.png"):
            server.upload(file)
        measure(server, pid, min(counts))  # ComfyUI loads what it needs
        films = {frames: measure(server, pid, frames) for frames in counts}
        found = cancel_half_way(server, max(counts), films[max(counts)].pictures)
    least, most = (films[frames].growth[SAMPLING] for frames in (min(counts), max(counts)))
    flat = most / least - 1
    report = report_of(films, found, flat)
    print(report)
    REPORT.write_text(report, encoding="utf-8")
    return flat <= ALLOWED and found.ended == "execution_interrupted" and found.frames == max(counts) and found.is_same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    options = parser.parse_args()
    runpy.run_path(str(ROOT / "bootstrap.py"))["enter"]("tests")
    sys.exit(not main(options.frames))
