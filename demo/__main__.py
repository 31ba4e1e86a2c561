"""`python demo [--serve] [--output DIR]`: gets everything ready, then shows what the pack does."""

import argparse
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python demo", description="Shows what ConsisLoRA does, in a real ComfyUI.")
    parser.add_argument(
        "--serve", action="store_true", help="only open ComfyUI in the browser, with the workflow ready"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=ROOT / "demo" / "output", help="where the pictures go"
    )
    options = parser.parse_args()
    runpy.run_path(str(ROOT / "bootstrap.py"))["enter"]("demo")
    sys.path[0] = str(ROOT)  # python put demo/ there, where neither `demo` nor `consislora_core` is found
    from demo import run

    run.main(Path(os.environ["COMFYUI_PATH"]), options.output.resolve(), options.serve)


if __name__ == "__main__":
    main()
