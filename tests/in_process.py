"""ComfyUI in this process, and the pack loaded as ComfyUI loads it: for tests and benchmarks."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui"))


def load_comfy(base: Path, cpu: bool = True) -> ModuleType:
    """Imports ComfyUI, with `base` as its base directory and the attention that it chooses itself."""
    sys.path.insert(0, str(COMFYUI))
    from comfy.cli_args import args

    # ComfyUI reads these on import.
    args.cpu = cpu
    args.base_directory = str(base)
    import comfy.sd

    return comfy


def load_pack() -> ModuleType:
    """Loads the pack as ComfyUI does: by path, under a name of its own, with all nodes. ComfyUI must be loaded."""
    spec = importlib.util.spec_from_file_location("consislora_pack", ROOT / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pack
    spec.loader.exec_module(pack)
    extension = asyncio.run(pack.comfy_entrypoint())
    asyncio.run(extension.get_node_list())
    return pack
