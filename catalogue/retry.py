"""Makes a result again: reads the workflow in its picture, finds its sources, and gives it another seed."""

import json
import os
import secrets
from pathlib import Path, PurePosixPath

from PIL import Image

from . import escape_text
from .api_form import LOAD, SAVE, Workflow, is_workflow, single_node, with_upstream
from .names import composed, inside, result_name
from .pictures import FORMATS, MAX_PIXELS, SUFFIXES, find_pictures, picture_key
from .sheets import Result

ONE = "one pair per run"
RETRY = "consislora_retry_of"  # in a queued workflow's extra_pnginfo: the name of the first try
SEEDS = 2**48  # which every node takes, and every spreadsheet keeps
Sources = tuple[Path | None, Path | None]
EXIF_MODEL = 0x0110  # where ComfyUI's WebP files have their workflow, after "prompt:"


def embedded_workflow(picture: Path) -> Workflow:
    """The workflow in API form that ComfyUI wrote into a picture. Raises ValueError if there is none."""
    try:
        with Image.open(picture, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError("too large")
            text = opened.info.get("prompt") or str(opened.getexif().get(EXIF_MODEL, "")).removeprefix("prompt:")
        workflow = json.loads(text)
        if not is_workflow(workflow):
            raise ValueError("another form")
    except (OSError, ValueError, SyntaxError, RecursionError):
        raise ValueError(
            f"{escape_text(picture.name)} has no workflow in it: another program has saved it, it is a JPEG or "
            "TIFF, or ComfyUI was started with --disable-metadata. Queue the pair in ComfyUI itself."
        ) from None
    return workflow


def sources_of(root: Path, picture: Path, result: Result) -> Sources:
    """The content and the style picture of a result, as `find_sources` gives them.

    Where there is no workflow in the picture, as after another program has saved it, by their names in the sheet.
    """
    try:
        workflow = embedded_workflow(picture)
        single_node(workflow, LOAD)
    except ValueError:
        return _chosen(result, _files_named(root, result.content), _files_named(root, result.style))
    return find_sources(root, workflow, result)


def find_sources(root: Path, workflow: Workflow, result: Result) -> Sources:
    """The content and the style picture of a result inside ComfyUI's input folder; None for one that is not found."""
    inputs = workflow[single_node(workflow, LOAD)]["inputs"]
    return _chosen(
        result, *(_candidates(root, inputs.get(f"{role}s"), getattr(result, role)) for role in ("content", "style"))
    )


def _chosen(result: Result, contents: list[Path], styles: list[Path]) -> Sources:
    if len(contents) > 1 or len(styles) > 1:  # files of one name in several folders
        pairs = ((content, style) for content in contents for style in styles)
        if pair := next((pair for pair in pairs if picture_key(*pair) == result.key), None):
            return pair
    return contents[0] if contents else None, styles[0] if styles else None


def _candidates(root: Path, listed: object, name: str) -> list[Path]:
    paths = find_pictures(root, listed).paths if isinstance(listed, str) else []
    return [path for path in paths if escape_text(path.name) == name] or (paths if len(paths) == 1 else [])


def _files_named(root: Path, name: str) -> list[Path]:
    """The picture files of a name, wherever they are inside `root`."""
    name = composed(PurePosixPath(name).name)
    found = [
        Path(folder, file)
        for folder, _, files in os.walk(root)
        for file in files
        if escape_text(composed(file)) == name and Path(file).suffix.lower() in SUFFIXES
    ]
    return sorted(path for path in found if path.is_file() and path.resolve().is_relative_to(root.resolve()))


def retry_workflow(root: Path, catalogue: str, picture: Path, result: Result) -> dict:
    """What to post to ComfyUI's /prompt to have a result made again with another seed, under a name of its own.

    root: the input folder. catalogue: the name of its folder. Raises ValueError that says why it cannot be.
    """
    workflow = embedded_workflow(picture)
    for node in workflow.values():
        node.pop("is_changed", None)  # or ComfyUI would not look again what has changed
    load, save = (single_node(workflow, kind) for kind in (LOAD, SAVE))
    sources = find_sources(root, workflow, result)
    if None in sources:
        raise ValueError(
            f"The {'content' if sources[0] is None else 'style'} image is not in the input folder any more."
        )
    contents, styles = (path.relative_to(root).as_posix() for path in sources)
    first = result.retry_of or result.name
    node, name = _seed_input(workflow, save)
    workflow[node]["inputs"][name] = seed = secrets.randbelow(SEEDS)
    retry_name = result_name(f"{first}_seed{seed}")
    inside(root, retry_name)
    workflow[load]["inputs"] |= {
        "contents": contents, "styles": styles, "catalogue": catalogue, "name": retry_name, "run": ONE, "index": 0
    }  # fmt: skip
    return {"prompt": workflow, "extra_data": {"extra_pnginfo": {RETRY: first}}}


def first_try(extra_pnginfo: object) -> str:
    """The name of the first try, in the run of a `retry_workflow`; empty in others."""
    name = extra_pnginfo.get(RETRY) if isinstance(extra_pnginfo, dict) else None
    return escape_text(name) if isinstance(name, str) else ""


def _seed_input(workflow: Workflow, save: str) -> tuple[str, str]:
    """The node and input with the seed from which the picture was sampled; no seed of a training."""
    link = workflow[save]["inputs"].get("images")
    upstream = with_upstream(workflow, link[0]) if isinstance(link, list) else []
    seeds = [
        (node, name)
        for node in upstream
        for name in ("seed", "noise_seed")
        if type(workflow[node]["inputs"].get(name)) is int
    ]
    ours = [(node, name) for node, name in seeds if "content_guidance" in workflow[node]["inputs"]]
    samplers = [
        (node, name) for node, name in seeds if not {"rank", "recolourings"} & workflow[node]["inputs"].keys()
    ]  # of which the last one is the first to sample
    if not ours and not samplers:
        raise ValueError("The workflow in the picture has no sampler with a seed of its own.")
    return (ours or samplers[-1:])[0]
