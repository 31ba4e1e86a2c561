"""`python tests/make_pictures.py WORK`: makes the pictures of the template browser, help pages, README and registry.

It runs every demo workflow as it is, in a real ComfyUI, and looks at some of them in a real browser. WORK keeps
ComfyUI's folders, so that a second run trains nothing anew; the first takes some fifteen minutes on one CPU core.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    runpy.run_path(sys.path[-1] + "/bootstrap.py")["enter"]("tests")

from browser import browser, cancel, drop, look_at, open_app, opened, queue, setting, turn
from conftest import NEWEST_FRONTEND, fetch_frontend
from images import cut_out, write_film
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Page
from prompts import FOLDER, api, graph

from demo.run import IMAGES, STYLES, Clock, nodes
from demo.server import ComfyServer
from demo.sheet import CELL, GAP, LABEL

ROOT = Path(__file__).resolve().parent.parent
HELP = ROOT / "web" / "docs"
PAGE, CAPTION = (480, 320), "drawn by the demo model"
SUBJECT, STYLE, STYLE_2, SUBJECT_2 = "crown-flat", "balloon-halftone", "cherry-blossom-halftone", "owl-flat"
# For each use what goes in, and the nodes that show what comes out.
SHOWN = {
    "train_and_stylise": ([SUBJECT, STYLE], ["SaveImage"]),
    "train_content": ([SUBJECT], ["LossGraphNode"]),
    "train_style": ([STYLE], ["LossGraphNode"]),
    "dual_guidance": ([SUBJECT, STYLE], ["SaveImage"]),
    "content_only": ([SUBJECT], ["SaveImage"]),
    "style_only": ([STYLE], ["SaveImage"]),
    "frames": ([SUBJECT, STYLE], ["SaveAnimatedWEBP"]),
    "multi_reference": ([SUBJECT, STYLE, STYLE_2], ["SaveImage"]),
    "strength_grid": ([], ["SaveImage"]),
    "evaluate_and_gate": ([], ["ConsisLoRAEvaluate"]),
    "structure_lock": ([SUBJECT, STYLE], ["SaveImage"]),
    "catalogue": ([SUBJECT, SUBJECT_2, STYLE], ["ConsisLoRACatalogSave"]),
    "catalogue_cut_out": ([f"{SUBJECT}-cut-out", STYLE], ["ConsisLoRACatalogSave"]),
}
NODE = """kind => {
    const { pos: [x, y], size: [width, height] } = app.graph.nodes.find(({ type }) => type === kind)
    return [[x - 10, y - 40], [x + width + 10, y + height + 10]]
}"""
WORKFLOW = """() => {
    const sides = app.graph.groups.map(({ pos: [x, y], size: [width, height] }) => [x, y, x + width, y + height])
    const most = (pick, i) => pick(...sides.map(side => side[i]))
    return [[most(Math.min, 0) - 10, most(Math.min, 1) - 10], [most(Math.max, 2) + 10, most(Math.max, 3) + 10]]
}"""
SAMPLER_AND_RESULT = """() => {
    const [sampler, result] = ["ConsisLoRASampler", "SaveImage"].map(kind =>
        app.graph.nodes.find(({ type }) => type === kind))
    const [x, y] = sampler.pos, right = result.pos[0] + result.size[0]
    return [[x - 10, y + 65], [right + 10, y + sampler.size[1] + 10]]  // below what the frontend lays over the canvas
}"""
SHOWN_PICTURE = """() => {
    const picture = app.graph.nodes.find(({ type }) => type === "SaveImage").imgs?.[0]
    return picture?.naturalWidth ? picture.src : undefined
}"""
AT_STEP = """step => {
    const words = document.querySelector('.consislora-loss .words')?.textContent
    return Number(words?.match(/([0-9]+) [/] /)?.[1]) >= step
}"""
ICON, BANNER = (400, 400), (1260, 540)  # what the registry takes: at most 400 pixels; 21:9
CATALOGUE = {"contents": [SUBJECT, SUBJECT_2], "styles": [STYLE]}
CHECK, GREYS = 12, ("#fff", "#d8d8d8")  # what shows through a transparent picture: squares of so many pixels


def draw(server: ComfyServer, use: str) -> list[Path]:
    """What a workflow draws, all pairs of the catalogue at once."""
    prompt = api(f"{use}_demo")
    for node in nodes(prompt, "ConsisLoRACatalogLoad"):
        prompt[node]["inputs"]["run"] = "all pairs in one run"
        if use == "catalogue_cut_out":
            prompt[node]["inputs"]["contents"] = "catalogue/cut_outs"
    entry = server.run(prompt, timeout=7200, on_event=Clock(prompt))
    ends = [node for kind in SHOWN[use][1] for node in nodes(prompt, kind)]
    return server.images({"outputs": {node: entry["outputs"][node] for node in ends}})


def draw_thumbnail(images: list[Path], drawn: list[Path], caption: str = "") -> Image.Image:
    """What goes in, one under the other, and to the right of it what comes out."""
    page = Image.new("RGB", PAGE, "white")
    height = page.height - (24 if caption else 0)
    left = 0
    if images:
        left = min(140, height // len(images))
        paste_grid(page, images, (0, 0, left, height), columns=1)
        draw, middle = ImageDraw.Draw(page), height // 2
        draw.polygon([(left + 4, middle - 12), (left + 4, middle + 12), (left + 18, middle)], fill="#3f789e")
        left += 18
    paste_grid(page, drawn, (left, 0, page.width, height), columns=1 if len(drawn) < 3 else 2)
    if caption:
        place = (page.width - GAP, page.height - 8)
        ImageDraw.Draw(page).text(place, caption, "#555", ImageFont.load_default(14), anchor="rb")
    return page


def paste_grid(page: Image.Image, files: list[Path], box: tuple[int, int, int, int], columns: int) -> None:
    """Pictures into equal cells of a box, each as large as fits."""
    left, top, right, bottom = box
    rows = -(-len(files) // columns)
    width, height = (right - left) // columns, (bottom - top) // rows
    for i, file in enumerate(files):
        with Image.open(file) as opened:
            picture = opened.convert("RGBA")
        scale = min((width - GAP) / picture.width, (height - GAP) / picture.height)
        picture = picture.resize([round(scale * side) for side in picture.size], Image.Resampling.LANCZOS)
        x, y = left + i % columns * width, top + i // columns * height
        shown = Image.alpha_composite(checks(picture.size), picture).convert("RGB")
        page.paste(shown, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))


def some_frames(film: Path) -> list[Path]:
    """Every fourth picture of an animation, as files beside it."""
    files = []
    with Image.open(film) as opened:
        for i in range(0, opened.n_frames, 4):
            opened.seek(i)
            files.append(film.with_name(f"{film.stem}_{i}.png"))
            opened.save(files[-1])
    return files


def draw_icon(content: Path, result: Path) -> Image.Image:
    """The subject, below a diagonal in the style."""
    sides = [Image.open(file).convert("RGB").resize(ICON, Image.Resampling.LANCZOS) for file in (content, result)]
    below = Image.new("L", ICON, 0)
    ImageDraw.Draw(below).polygon([(ICON[0], 0), ICON, (0, ICON[1])], fill=255)
    icon = Image.composite(sides[1], sides[0], below)
    ImageDraw.Draw(icon).line([(ICON[0], 0), (0, ICON[1])], fill="white", width=6)
    return icon


def draw_banner(images: list[Path], result: Path) -> Image.Image:
    """The name, what goes in, and what comes out."""
    page = Image.new("RGB", BANNER, "white")
    width, height = BANNER
    paste_grid(page, images, (width // 2 - 60, GAP, width // 2 + 200, height - GAP), columns=1)
    paste_grid(page, [result], (width // 2 + 220, GAP, width - GAP, height - GAP), columns=1)
    draw, middle = ImageDraw.Draw(page), height // 2
    arrow = [(width // 2 + 202, middle - 18), (width // 2 + 202, middle + 18), (width // 2 + 226, middle)]
    draw.polygon(arrow, fill="#3f789e")
    draw.text((50, middle - 24), "ConsisLoRA", "#222", ImageFont.load_default(88), anchor="ls")
    draw.text(
        (52, middle + 30), "Style transfer that keeps the shape,", "#555", ImageFont.load_default(29), anchor="ls"
    )
    draw.text((52, middle + 68), "trained and drawn in ComfyUI", "#555", ImageFont.load_default(29), anchor="ls")
    draw.text((52, height - 24), CAPTION, "#888", ImageFont.load_default(16), anchor="ls")
    return page


def save_exactly(picture: Image.Image, path: Path) -> None:
    """As a PNG in the size that it has, with few colours."""
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def checks(size: tuple[int, int]) -> Image.Image:
    """The squares that stand for transparency."""
    page = Image.new("RGBA", size, GREYS[0])
    draw = ImageDraw.Draw(page)
    for x in range(0, size[0], CHECK):
        for y in range(x // CHECK % 2 * CHECK, size[1], 2 * CHECK):
            draw.rectangle((x, y, x + CHECK - 1, y + CHECK - 1), GREYS[1])
    return page


def draw_strip(contact_sheet: Image.Image) -> Image.Image:
    """The first picture of the README: content image + style image = results; below it, style strengths 0 to 1.3."""
    between = 30
    cells = [(0, "content image", "+"), (1, "style image", "="), (4, "result", "|"), (5, "with structure lock", "")]
    width = len(cells) * (CELL + between) - between
    small = (width + GAP) // len(STYLES) - GAP
    page = Image.new("RGB", (width, CELL + small + 2 * LABEL + GAP), "white")
    draw, below = ImageDraw.Draw(page), CELL + LABEL + GAP
    for i, (column, label, sign) in enumerate(cells):
        x = i * (CELL + between)
        draw.text((x, 4), label, "black", ImageFont.load_default(18))
        draw.text((x + CELL + between // 2, LABEL + CELL // 2), sign, "#3f789e", ImageFont.load_default(34), "mm")
        page.paste(cut_cell(contact_sheet, 0, column), (x, LABEL))
    for column, strength in enumerate(STYLES):
        x = column * (small + GAP)
        draw.text((x, below + 4), f"style {strength:g}", "black", ImageFont.load_default(16))
        page.paste(
            cut_cell(contact_sheet, 2, column).resize((small, small), Image.Resampling.LANCZOS), (x, below + LABEL)
        )
    return page


def cut_cell(contact_sheet: Image.Image, line: int, column: int) -> Image.Image:
    x, y = GAP + column * (CELL + GAP), GAP + LABEL + line * (CELL + LABEL + GAP)
    return contact_sheet.crop((x, y, x + CELL, y + CELL))


def save(picture: Image.Image, path: Path, widest: int = 640) -> None:
    """As a small JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = picture.convert("RGB")
    picture.thumbnail((widest, widest), Image.Resampling.LANCZOS)
    picture.save(path, quality=85, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def make_thumbnails(server: ComfyServer) -> None:
    folders = {f"{SUBJECT}-cut-out": server.base / "input" / "catalogue" / "cut_outs"}
    for use, (names, _) in SHOWN.items():
        drawn, images = draw(server, use), [folders.get(name, IMAGES) / f"{name}.png" for name in names]
        drawn = drawn[:1] if use == "evaluate_and_gate" else drawn
        if use == "frames":
            shutil.copy(drawn[0], ROOT / "benchmarks" / "results" / "frames.webp")
            drawn = some_frames(drawn[0])
        save(draw_thumbnail(images, drawn), FOLDER / f"{use}_demo.jpg")
        save(draw_thumbnail(images, drawn, CAPTION), FOLDER / f"{use}_sdxl.jpg")
        if use == "train_and_stylise":
            save_exactly(draw_icon(images[0], drawn[0]), ROOT / "demo" / "icon.png")
            save_exactly(draw_banner(images, drawn[0]), ROOT / "demo" / "banner.png")
        if use == "strength_grid":
            save(Image.open(drawn[0]), HELP / "ConsisLoRAStrengthGrid" / "grid.jpg")
        if use == "evaluate_and_gate":
            save(Image.open(drawn[0]), HELP / "ConsisLoRAEvaluate" / "card.jpg")


def fill_review(server: ComfyServer) -> None:
    """A catalogue with scores, a gate and several seeds; every LoRA in it is trained already."""
    prompt = api("catalogue_demo")
    (load,), (save,), (sampler,) = (
        nodes(prompt, kind) for kind in ("ConsisLoRACatalogLoad", "ConsisLoRACatalogSave", "ConsisLoRASampler")
    )
    pictures = prompt[save]["inputs"]["images"]
    scored = {"images": pictures, "content_image": [load, 0], "style_image": [load, 1]}
    prompt["scores"] = {"class_type": "ConsisLoRAEvaluate", "inputs": scored}
    bounds = dict(min_content=-1.0, min_style=-1.0, max_leakage=1.0, min_edges=0.66, min_silhouette=0.8)
    prompt["gate"] = {"class_type": "ConsisLoRAGate", "inputs": {"images": pictures, "scores": ["scores", 0], **bounds}}
    prompt[save]["inputs"] |= {"report": ["scores", 2], "reasons": ["gate", 2]}
    for seed in range(4):
        prompt[sampler]["inputs"]["seed"] = seed
        name = "{content} in halftone" + f", {seed + 1}" * bool(seed)
        prompt[load]["inputs"] |= {"catalogue": "review", "name": name, "run": "all pairs in one run"}
        server.run(prompt, timeout=7200)


def take_review(page: Page, work: Path, url: str, catalogue: str = "review") -> None:
    """The review page in its dark and its light colours: the best result is in view, some are decided."""
    page.set_viewport_size({"width": 1440, "height": 860})
    sides = []
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{url}/consislora/review?catalogue={catalogue}")
        page.evaluate("localStorage.setItem('consislora.review.name', JSON.stringify('editor'))")
        page.reload()
        for key in ("r", "1", "a", "a") if scheme == "dark" else ("End", "c"):
            page.wait_for_timeout(2000)  # until its picture is there
            page.keyboard.press(key)
        page.wait_for_timeout(7000)  # until the message has gone
        page.screenshot(path=work / "screen.png")
        sides.append(Image.open(work / "screen.png").convert("RGB"))
    save(sides[0], HELP / "ConsisLoRACatalogSave" / "review.jpg", widest=1440)
    save(sides[1], HELP / "ConsisLoRACatalogSave" / "compare.jpg", widest=1440)


def take_screenshots(page: Page, work: Path) -> None:
    setting(page, "Comfy.Minimap.Visible", False)
    drop(page, "dual_guidance_demo", graph("dual_guidance_demo"))
    finish(page)
    page.keyboard.press(".")  # the whole workflow
    save(cut_screenshot(page, work, WORKFLOW), ROOT / "demo" / "canvas.jpg", widest=1600)
    look_at(page, "ConsisLoRASampler", scale=1.0, top=110)
    save(cut_screenshot(page, work, NODE, "ConsisLoRASampler"), HELP / "ConsisLoRASampler" / "pad.jpg", widest=860)

    drop(page, "train_content_demo", graph("train_content_demo"))
    turn(page, {"seed": 1, "transition_step": 60})
    look_at(page, "ConsisLoRATrainImage", scale=1.0, top=110)
    queue(page)
    page.wait_for_function(AT_STEP, arg=141, timeout=3_600_000)
    picture = cut_screenshot(page, work, NODE, "ConsisLoRATrainImage")
    save(picture, HELP / "ConsisLoRATrainImage" / "training.jpg", widest=860)
    cancel(page)


def take_app(page: Page, work: Path) -> None:
    """The main workflow in app mode, with its result.

    ComfyUI before 0.33 does not tell this frontend that a run has ended: then its button to cancel is in the picture.
    """
    page.set_viewport_size({"width": 1360, "height": 1020})
    drop(page, "train_and_stylise_demo", graph("train_and_stylise_demo"))
    open_app(page)
    queue(page)
    picture = page.get_by_test_id("linear-center-panel").locator("img[src*=view]")
    picture.first.wait_for(timeout=3_600_000)
    page.mouse.move(640, 400)
    page.wait_for_timeout(10_000)  # until messages have gone
    page.screenshot(path=work / "screen.png")
    save(Image.open(work / "screen.png"), ROOT / "demo" / "app.jpg", widest=1280)


def take_clips(page: Page, work: Path) -> None:
    """The README's clips: a result while its style is turned up, and a LoRA while it learns."""
    drop(page, "dual_guidance_demo", graph("dual_guidance_demo"))
    page.locator(".consislora-pad select").select_option("strength")
    look_at(page, "ConsisLoRASampler", scale=1.0, top=110)
    frames = []
    for strength in STYLES:
        turn(page, {"style_strength": strength})
        finish(page)
        frames.append(cut_screenshot(page, work, SAMPLER_AND_RESULT).convert("RGB"))
    save_clip(frames, ROOT / "demo" / "pad.webp")

    drop(page, "train_content_demo", graph("train_content_demo"))
    turn(page, {"seed": 2, "transition_step": 60})
    look_at(page, "ConsisLoRATrainImage", scale=1.0, top=110)
    queue(page)
    frames = []
    for step in range(10, 300, 32):
        page.wait_for_function(AT_STEP, arg=step, timeout=3_600_000)
        frames.append(cut_screenshot(page, work, NODE, "ConsisLoRATrainImage").convert("RGB"))
    save_clip(frames, ROOT / "demo" / "training.webp")
    cancel(page)


def save_clip(frames: list[Image.Image], path: Path) -> None:
    """As an animated WebP that stays a little longer at its end."""
    lasting = [700] * (len(frames) - 1) + [1800]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=lasting, loop=0, quality=70, method=6)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def finish(page: Page) -> None:
    """Queues, and waits for a new picture."""
    before = page.evaluate(SHOWN_PICTURE)
    queue(page)
    page.wait_for_function(f"before => ![undefined, before].includes(({SHOWN_PICTURE})())", arg=before)


def cut_screenshot(page: Page, work: Path, box: str, kind: str = "") -> Image.Image:
    """A part of the canvas; box: a function that gives its corners on the canvas, for a type of node."""
    page.wait_for_timeout(2000)  # until it is drawn
    page.screenshot(path=work / "screen.png")
    corners = page.evaluate(
        f"""kind => {{
            const {{ scale, offset }} = app.canvas.ds, screen = app.canvas.canvas.getBoundingClientRect()
            return ({box})(kind).map(([x, y]) =>
                [screen.left + (x + offset[0]) * scale, screen.top + (y + offset[1]) * scale])
        }}""",
        kind,
    )
    return Image.open(work / "screen.png").crop([side for corner in corners for side in corner])


def main(work: Path) -> None:
    with ComfyServer(work / "comfyui", Path(os.environ["COMFYUI_PATH"])) as server:
        write_film(IMAGES / "crown-turning.mp4")
        for file in [*IMAGES.glob("*.png"), *IMAGES.glob("*.mp4")]:
            server.upload(file)
        for folder, names in CATALOGUE.items():
            path = server.base / "input" / "catalogue" / folder
            path.mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copy(IMAGES / f"{name}.png", path)
        cut_outs = server.base / "input" / "catalogue" / "cut_outs"
        cut_outs.mkdir(exist_ok=True)
        cut_out(SUBJECT).save(cut_outs / f"{SUBJECT}-cut-out.png")
        for use in ("catalogue", "catalogue_cut_out", "review"):  # or it is done, and draws nothing
            shutil.rmtree(server.base / "output" / use, ignore_errors=True)
        save(draw_strip(Image.open(ROOT / "demo" / "contact_sheet.png")), ROOT / "demo" / "strip.jpg", widest=1000)
        make_thumbnails(server)
        fill_review(server)
        with browser() as context:
            page = opened(context, server)
            take_screenshots(page, work)
            take_clips(page, work)
            take_review(context.new_page(), work, server.url)
            take_app(opened(context, server, fetch_frontend(NEWEST_FRONTEND, work)), work)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python tests/make_pictures.py WORK")
    main(Path(sys.argv[1]))
