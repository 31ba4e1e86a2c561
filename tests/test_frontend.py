"""What people do in ComfyUI's frontend: run workflows, turn the pad, watch training, stop it, read the help."""

import base64
import json
import re
import shutil
import time

import pytest
from browser import TOGGLE_APP, UP, cancel, drop, in_language, look_at, open_app, queue, queued, setting, turn
from images import write_film
from playwright.sync_api import TimeoutError as PageTimeout
from prompts import FEW, graph
from test_help import LANGUAGES, ROOT, file
from test_workflows import NAMES

from demo.run import IMAGES

GUIDANCE, STRENGTHS = (["content_" + what, "style_" + what] for what in ("guidance", "strength"))
# The nodes on which a workflow ends, each with its pictures.
ENDS = {
    "catalogue_cut_out_demo": ["ConsisLoRACatalogSave"],
    "catalogue_demo": ["ConsisLoRACatalogSave"],
    "content_only_demo": ["SaveImage"],
    "dual_guidance_demo": ["SaveImage"],
    "evaluate_and_gate_demo": ["ConsisLoRAEvaluate"],
    "frames_demo": ["LossGraphNode", "SaveAnimatedWEBP"],
    "multi_reference_demo": ["LossGraphNode", "SaveImage"],
    "strength_grid_demo": ["PreviewImage", "SaveImage"],
    "structure_lock_demo": ["SaveImage"],
    "style_only_demo": ["SaveImage"],
    "train_and_stylise_demo": ["LossGraphNode", "SaveImage"],
    "train_content_demo": ["LossGraphNode"],
    "train_style_demo": ["LossGraphNode"],
}
MAIN = "train_and_stylise_demo"
ALL_SHOW_PICTURES = """kinds => kinds.every(kind => app.graph.nodes.some(({ type }) => type === kind))
    && app.graph.nodes.filter(({ type }) => kinds.includes(type)).every(
        ({ imgs }) => imgs?.length && imgs.every(({ naturalWidth }) => naturalWidth))"""
# Adds the node, selects it and opens its help, each again if need be: newer frontends offer no help for what was
# selected before they knew all nodes, and after a reload they open the last workflow some time later.
SHOWS_HELP = """([name, words]) => {
    if (document.querySelector(".node-help-content")?.textContent.includes(words)) return true
    if (app.graph.nodes.map(({ type }) => type).join() !== name) {
        app.graph.clear()
        app.graph.add(LiteGraph.createNode(name))
    }
    const [node] = app.graph.nodes, button = document.querySelector("[data-testid=info-button]")
    if (performance.now() < node.clicked + 3000) return  // a second click would close it
    if (button && app.canvas.selectedItems.has(node)) {
        node.clicked = performance.now()
        return void button.click()
    }
    app.canvas.deselectAll()
    app.canvas.selectNode(node)
}"""
PICTURES_SHOW = """count => {
    const pictures = [...document.querySelectorAll(".node-help-content img")]
    return pictures.length === count && pictures.every(({ naturalWidth }) => naturalWidth)
}"""


@pytest.fixture(params=["canvas", "vue"])
def renderer(request, each_frontend):
    """Both ways in which the frontend draws nodes."""
    setting(each_frontend, "Comfy.VueNodes.Enabled", request.param == "vue")
    yield request.param
    setting(each_frontend, "Comfy.VueNodes.Enabled", False)


@pytest.fixture(scope="module")
def catalogue(server):
    for folder, name in (("contents", "crown-flat"), ("styles", "umbrella-high-contrast")):
        path = server.base / "input" / "catalogue" / folder
        path.mkdir(parents=True, exist_ok=True)
        shutil.copy(IMAGES / f"{name}.png", path)


def opened(frontend, name: str, changes: dict, kind: str) -> int:
    """Opens a workflow with other values of widgets, and shows its one node of a kind; that node's id."""
    drop(frontend, name, saved_as_tests_do(graph(name)))
    turn(frontend, changes)
    return look_at(frontend, kind)


def saved_as_tests_do(graph: dict) -> dict:
    return json.loads(json.dumps(graph).replace('"consislora/', '"workflows/'))


def values(frontend, node: int, names: list[str]) -> list[float]:
    return [queued(frontend)[str(node)]["inputs"][name] for name in names]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_demo") and name != MAIN])
def test_a_dropped_workflow_is_queued_and_ends_with_pictures_on_its_nodes(name, frontend, trained, catalogue, server):
    if name == "frames_demo":
        write_film(server.base / "input" / "crown-turning.mp4", 2)  # shorter than the film of this name
    run_dropped(frontend, name)


def test_a_webp_of_the_catalogue_opens_its_workflow_on_the_canvas(each_frontend, catalogue, server):
    made = graph("catalogue_demo")
    folder = f"webp {time.time_ns()}"  # another for each frontend
    folders = {"contents": "catalogue/contents", "styles": "catalogue/styles", "catalogue": folder, "name": ""}
    prompt = {
        "1": {"class_type": "ConsisLoRACatalogLoad", "inputs": {**folders, "run": "one pair per run", "index": 0}},
        "2": {"class_type": "ConsisLoRACatalogSave", "inputs": {"images": ["1", 0], "job": ["1", 2], "format": "WebP"}},
    }
    queued = server.post("/prompt", {"prompt": prompt, "extra_data": {"extra_pnginfo": {"workflow": made}}})
    (file,) = server.images(server.wait(queued["prompt_id"], 600, lambda kind, data: None))
    each_frontend.evaluate("app.graph.clear()")
    each_frontend.evaluate(
        """async data => {
            const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0))
            await app.handleFile(new File([bytes], "result.webp", { type: "image/webp" }))
        }""",
        base64.b64encode(file.read_bytes()).decode(),
    )
    each_frontend.wait_for_function("count => app.graph.nodes.length === count", arg=len(made["nodes"]))


def test_a_workflow_of_the_demo_opens_with_its_pictures(each_frontend, server):
    """Those that are missing alone: what the user has under such a name stays."""
    # A page that is loaded again opens the workflow that it had last, and may bring the pictures before it can say so.
    drop(each_frontend, "dual_guidance_demo", graph("dual_guidance_demo"))
    each_frontend.wait_for_timeout(3000)  # until it has been noted
    style, content = (server.base / "input" / f"{name}.png" for name in ("balloon-halftone", "crown-flat"))
    style.unlink(missing_ok=True)
    content.write_bytes((IMAGES / "owl-flat.png").read_bytes())
    each_frontend.reload()
    each_frontend.wait_for_function(UP)
    drop(each_frontend, MAIN, graph(MAIN))
    each_frontend.get_by_text(f"input folder: {style.name}").first.wait_for()
    assert style.read_bytes() == (IMAGES / style.name).read_bytes()
    assert content.read_bytes() == (IMAGES / "owl-flat.png").read_bytes()
    each_frontend.wait_for_function(ALL_SHOW_PICTURES, arg=["LoadImage"])
    assert each_frontend.get_by_text(re.compile(r"issues? found|Missing")).count() == 0
    shutil.copy(IMAGES / content.name, content)


def test_each_frontend_does_the_main_job(each_frontend, trained):
    run_dropped(each_frontend, MAIN)


def run_dropped(frontend, name: str) -> None:
    """Drops a workflow, queues it, and waits for pictures on the nodes on which it ends.

    Once more if there are none: on a busy machine the frontend has left a finished run without them.
    """
    try:
        run_once(frontend, name, timeout=60_000)
    except PageTimeout:
        run_once(frontend, name, timeout=120_000, file=f"{name}_again")  # the newest keep a file's pictures


def run_once(frontend, name: str, timeout: int, file: str = "") -> None:
    drop(frontend, file or name, saved_as_tests_do(graph(name)))
    turn(frontend, {**FEW, "content_steps": 2, "style_steps": 1})
    assert not frontend.evaluate(ALL_SHOW_PICTURES, ENDS[name])
    queue(frontend)
    frontend.wait_for_function(ALL_SHOW_PICTURES, arg=ENDS[name], timeout=timeout)


def test_the_app_mode_of_newer_frontends_shows_pictures_prompt_strengths_and_the_result(each_frontend, trained, server):
    """Nodes, links and the inputs of training stay out of sight."""
    version = each_frontend.evaluate("__COMFYUI_FRONTEND_VERSION__")
    if int(version.split(".")[1]) < 49:
        pytest.skip(f"{version} shows nothing of a workflow there, or we have not tried")
    drop(each_frontend, "as_app", saved_as_tests_do(graph(MAIN)))
    turn(each_frontend, {**FEW, "seed": 7})  # a prompt that no other test queues
    open_app(each_frontend)
    shown = each_frontend.get_by_test_id("linear-widgets")
    for label in ["Content image", "Style image", "Prompt", *GUIDANCE, *STRENGTHS, "seed"]:
        shown.get_by_text(label, exact=True).wait_for()
    assert shown.get_by_text("learning_rate").count() == 0
    (before,) = server.get("/history?max_items=1")
    queue(each_frontend)
    while any(server.get("/queue").values()) or before in server.get("/history?max_items=1"):
        each_frontend.wait_for_timeout(100)
    made = server.images(*server.get("/history?max_items=1").values())
    (picture,) = (file for file in made if file.parent == server.base / "output")
    panel = each_frontend.get_by_test_id("linear-center-panel")
    panel.locator(f"img[src*={picture.stem}]").first.wait_for()
    each_frontend.evaluate(TOGGLE_APP)


def test_the_pad_turns_two_widgets_which_are_queued_and_saved(each_frontend, renderer, server):
    frontend = each_frontend
    node = opened(frontend, "dual_guidance_demo", {}, "ConsisLoRASampler")
    drag(frontend, (0.5, 0.5), (0.75, 0.75))
    assert values(frontend, node, GUIDANCE) == [3.0, 1.0]
    field = frontend.locator(FIELD)
    field.focus()
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowDown"):
        frontend.keyboard.press(key)
    assert values(frontend, node, GUIDANCE) == [3.1, 0.1]
    frontend.locator(".consislora-pad select").select_option("strength")
    field.press("ArrowLeft")
    assert values(frontend, node, STRENGTHS) == [0.95, 1.0]

    saved = saved_from(frontend, server, f"pad_{renderer}_{id(frontend)}")
    frontend.reload()
    frontend.wait_for_function("window.app?.graph && window.app.vueAppReady")
    drop(frontend, "again", saved)
    assert values(frontend, node, GUIDANCE + STRENGTHS) == [3.1, 0.1, 0.95, 1.0]
    frontend.locator(".consislora-pad .across").get_by_text("0.95").wait_for()  # shows them, and its own choice


FIELD = ".consislora-pad .field"


def drag(page, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drags over the pad, between places given as shares of its width and its height, from the top left."""
    for close in page.locator(".p-toast-close-button").all():  # a question of the frontend's, over the pad
        close.click()
    page.locator(FIELD).hover()  # once the canvas has come to rest
    box = page.locator(FIELD).bounding_box()
    (x, y), (to_x, to_y) = ((box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(to_x, to_y, steps=3)
    page.mouse.up()


def test_turning_one_axis_leaves_the_other_alone_also_outside_the_pad(each_frontend, renderer):
    """The pad reaches from 0 to 4; the widgets, to which the values are set elsewhere, from 0 to 10."""
    frontend = each_frontend
    node = opened(frontend, "dual_guidance_demo", {}, "ConsisLoRASampler")
    turn(frontend, {"content_guidance": 7.33, "style_guidance": 1.23})  # as an extension does, without any event
    frontend.locator(".consislora-pad .across").get_by_text("7.33").wait_for()
    frontend.locator(FIELD).press("ArrowUp")
    assert values(frontend, node, GUIDANCE) == [7.33, 1.3]
    drag(frontend, (0.99, 1 - 1.3 / 4), (0.99, 0.5))  # the knob, along the edge at which it stands for 7.33
    assert values(frontend, node, GUIDANCE) == [7.33, 2.0]
    frontend.locator(FIELD).press("ArrowRight")
    assert values(frontend, node, GUIDANCE) == [7.4, 2.0]


PROMOTE = """([id, name]) => {
    const { node } = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]))
    const [inner] = node.subgraph.nodes
    const slot = node.subgraph.addInput(name, "FLOAT")
    slot.connect(inner.inputs.find(({ widget }) => widget?.name === name), inner)
    return [node.id, inner.id]
}"""


def test_in_a_subgraph_the_pad_turns_the_promoted_widget_outside(each_frontend, renderer):
    frontend = each_frontend
    node = opened(frontend, "dual_guidance_demo", {}, "ConsisLoRASampler")
    host, inner = frontend.evaluate(PROMOTE, [node, "style_guidance"])
    frontend.locator(FIELD).wait_for(state="hidden")  # drawn once from outside, as nobody looks in sooner
    frontend.evaluate(SET_OUTSIDE, [host, "style_guidance", 2.5])
    frontend.evaluate(LOOK_AT_INNER, [host, inner])
    frontend.locator(".consislora-pad .up").get_by_text("2.50").wait_for()
    frontend.locator(FIELD).press("ArrowRight")
    assert values(frontend, f"{host}:{inner}", GUIDANCE) == [0.6, 2.5]
    frontend.locator(FIELD).press("ArrowUp")
    assert values(frontend, f"{host}:{inner}", GUIDANCE) == [0.6, 2.6]
    frontend.evaluate("app.canvas.setGraph(app.graph)")


SET_OUTSIDE = """([host, name, value]) => {
    app.graph.getNodeById(host).widgets.find((widget) => widget.name === name).value = value
}"""
LOOK_AT_INNER = """([host, inner]) => {
    const { subgraph } = app.graph.getNodeById(host)
    const node = subgraph.getNodeById(inner)
    app.canvas.setGraph(subgraph)
    app.canvas.ds.scale = 0.8
    app.canvas.ds.offset = [1000 - node.pos[0], 250 - node.pos[1]]
    app.canvas.setDirty(true, true)
}"""


def saved_from(frontend, server, name: str) -> dict:
    """The workflow on the canvas, as the frontend saves it."""
    frontend.locator("#graph-canvas").focus()
    frontend.keyboard.press("Control+s")
    frontend.get_by_role("dialog").get_by_role("textbox").fill(name)
    frontend.keyboard.press("Enter")
    path = server.base / "user" / "default" / "workflows" / f"{name}.json"
    while not (path.exists() and path.stat().st_size):
        frontend.wait_for_timeout(100)
    return json.loads(path.read_text(encoding="utf-8"))


def test_training_shows_its_loss_and_stops_on_cancel(frontend, server, trained):
    changes = {"steps": 100_000, "transition_step": 10, "seed": 5}
    opened(frontend, "train_content_demo", changes, "ConsisLoRATrainImage")
    queue(frontend)
    curve = frontend.locator(".consislora-loss polyline")
    curve.first.wait_for(state="attached")
    frontend.get_by_text("reconstruction").first.wait_for()
    frontend.get_by_text(re.compile(r"\d+:\d\d left, \d+\.\d GB free")).wait_for()
    cancel(frontend)
    frontend.get_by_text("Execution has been interrupted").first.wait_for()
    while any(server.get("/queue").values()):  # the frontend hears of it a moment before the history does
        time.sleep(0.1)
    (last,) = server.get("/history?max_items=1").values()
    assert last["status"]["messages"][-1][0] == "execution_interrupted"


def test_the_loss_of_every_step_is_there_in_the_end(frontend, trained):
    opened(frontend, "train_content_demo", {**FEW, "seed": 6}, "ConsisLoRATrainImage")
    queue(frontend)
    frontend.get_by_text(re.compile(r"took \d+:\d\d, at least \d+\.\d GB free")).wait_for()
    turn(frontend, FEW | {"seed": 0})
    queue(frontend)
    frontend.get_by_text("trained before").wait_for()
    assert frontend.get_by_text("4 / 4").count() == 1
    points = [curve.get_attribute("points") for curve in frontend.locator(".consislora-loss polyline").all()]
    assert [len(curve.split()) for curve in points] == [2, 2]


# What the server sends to every page while a node trains.
LOSS = """([node, first, losses]) => comfyAPI.api.api.dispatchEvent(new CustomEvent("consislora.loss",
    { detail: { node, first, losses, phases: [["noise", 100], ["reconstruction", 100]], caption: null } }))"""


def test_a_page_that_is_opened_while_a_node_trains_draws_each_step_at_its_place(frontend):
    node = opened(frontend, "train_content_demo", {}, "ConsisLoRATrainImage")
    frontend.evaluate(LOSS, [str(node), 90, [0.5] * 20])
    frontend.evaluate(LOSS, [str(node), 110, [0.25]])
    frontend.get_by_text("reconstruction 0.250 · 111 / 200").wait_for()
    points = [curve.get_attribute("points").split() for curve in frontend.locator(".consislora-loss polyline").all()]
    across = [[200 / 300 * float(point.split(",")[0]) for point in curve] for curve in points]  # in steps
    assert [len(curve) for curve in across] == [10, 11]
    assert (across[0][0], across[1][-1]) == pytest.approx((90.5, 110.5), abs=0.1)
    frontend.evaluate(LOSS, [str(node), 0, [0.125] * 2])  # the next training
    frontend.get_by_text("noise 0.125 · 2 / 200").wait_for()


def test_the_loss_of_a_node_in_another_workflow_is_drawn_on_no_node_of_its_number(frontend):
    opened(frontend, "train_content_demo", {}, "ConsisLoRATrainImage")
    other = look_at(frontend, "VAEEncode")
    frontend.evaluate(LOSS, [str(other), 0, [0.5]])
    assert frontend.locator(".consislora-loss").count() == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_opens_for_each_node(language, frontend, server):
    ours = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
    with in_language(frontend, language):
        for name in ours:
            page = (ROOT / "web" / "docs" / file(name, language)).read_text(encoding="utf-8")
            frontend.wait_for_function(SHOWS_HELP, arg=[name, plain(page.splitlines()[0])], polling=200)
            frontend.wait_for_function(PICTURES_SHOW, arg=page.count("!["))


def plain(markdown: str) -> str:
    return re.sub(r"[*`]", "", markdown)
