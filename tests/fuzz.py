"""`python tests/fuzz.py [--minutes 10]`: damaged LoRA files, checkpoints, pictures and sheets, by hypothesis.

A reader may refuse a file with a ValueError, and nothing else: no other error, no more than seconds, no more than 1 GB.
What breaks one is printed; it belongs into that reader's tests.
"""

import argparse
import io
import json
import logging
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
MOST_MEMORY = 10**9
SECONDS = 5  # for one file, on a busy machine
HEADER = b"content,style,name,prompt,seed,content_strength\n"
SHEETS = [HEADER + b'a.png,b.png,x,"a [c], big",7,0.5\n', HEADER.replace(b",", b";") + b"a;b;;;;0,5\n"]
JSON_SHEETS = [json.dumps([{"content": "a", "style": "b", "seed": 7, "cfg": 1.5, "name": None}]).encode()]


def pictures() -> list[bytes]:
    from PIL import Image

    found = []
    kinds = "PNG RGBA, PNG I;16, JPEG CMYK, WEBP RGB, TIFF RGB, GIF P"
    for kind, mode in map(str.split, kinds.split(",")):
        data = io.BytesIO()
        Image.new(mode, (24, 16)).save(data, kind)
        found.append(data.getvalue())
    return found


KEY = "0" * 64
STATE = {"step": (), "weights.0": (2, 3)}


def stored(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """A LoRA and a checkpoint, as the store writes them."""
    import torch

    from consislora_core.lora_file import ImageLora, LoraLayer
    from consislora_core.store import Store

    layer = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    state = {name: torch.ones(shape) for name, shape in STATE.items()}
    store = Store(folder, MOST_MEMORY)
    store.keep(KEY, ImageLora({"content": {"transformer_blocks.0.attn1.to_q": layer}}, {}), [0.5])
    store.save_checkpoint(KEY, SimpleNamespace(state_dict=lambda: state), [(0.5,)])
    return [(folder / f"{KEY}.lora").read_bytes()], [(folder / f"{KEY}.checkpoint").read_bytes()]


def targets(folder: Path) -> dict[str, tuple[list[bytes], Callable]]:
    """File names, what is damaged, and what reads it."""
    from catalogue.pictures import open_picture
    from catalogue.sheets import ResultsSheet, read_jobs
    from consislora_core import lora_file
    from consislora_core.store import Store

    store, (loras, checkpoints) = Store(folder, MOST_MEMORY), stored(folder)
    trainer = SimpleNamespace(loras=1, state_shapes=lambda: STATE, load_state_dict=lambda state: None)
    return {
        "a.safetensors": (loras, lora_file.read),
        f"{KEY}.lora": (loras, lambda path: store.find(KEY)),
        f"{KEY}.checkpoint": (checkpoints, lambda path: store.resume(KEY, trainer)),
        "a.png": (pictures(), open_picture),
        "jobs.csv": (SHEETS, read_jobs),
        "jobs.json": (JSON_SHEETS, read_jobs),
        "results.csv": ([b"name,key,files,seed\na,1,a.png,7\n"], lambda path: ResultsSheet(path).read()),
    }


def fuzz(minutes: float, folder: Path) -> int:
    """How many files were read."""
    from hypothesis import HealthCheck, given, seed, settings
    from hypothesis import strategies as st

    @st.composite
    def damaged(draw, good: list[bytes]) -> bytes:
        data = bytearray(draw(st.sampled_from(good)))
        for _ in range(draw(st.integers(1, 8))):
            at = draw(st.integers(0, len(data)))
            data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
        return bytes(data)

    strict = settings(max_examples=300, deadline=1000 * SECONDS, database=None, suppress_health_check=list(HealthCheck))
    logging.disable()  # the store tells of each file that it sets aside
    deadline, count, tried = time.monotonic() + 60 * minutes, 0, targets(folder)
    while time.monotonic() < deadline:
        for name, (good, read) in tried.items():
            given_files = given(st.one_of(damaged(good), st.binary(max_size=200)))
            seed(count)(strict(given_files(refusing(read, folder / name))))()
        count += 1
        print(f"{count * strict.max_examples * len(tried)} files", end="\r", flush=True)
    return count * strict.max_examples * len(tried)


def refusing(read: Callable, path: Path) -> Callable[[bytes], None]:
    def check(data):
        path.write_bytes(data)
        with suppress(ValueError):
            read(path)

    return check


def most_memory() -> int:
    """Bytes that this process had at most."""
    import psutil

    known = psutil.Process().memory_info()
    if hasattr(known, "peak_wset"):
        return known.peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    runpy.run_path(str(ROOT / "bootstrap.py"))["enter"]("tests")
    sys.path[0] = str(ROOT)  # python put tests/ there
    with tempfile.TemporaryDirectory() as folder:
        count = fuzz(options.minutes, Path(folder))
    memory = most_memory()
    print(f"Nothing broke in {count} files. Memory at most: {memory / 1e6:.0f} MB")
    sys.exit(memory > MOST_MEMORY)
