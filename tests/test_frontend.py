"""What people do with our nodes in ComfyUI's frontend: turn the pad, watch training, stop it, read the help."""

import json
import time

import pytest
from prompts import graph

SETTING = "([id, value]) => app.ui.settings.setSettingValueAsync(id, value)"
QUEUED = "async () => (await app.graphToPrompt()).output"
GUIDANCE, STRENGTH = (["content_" + what, "style_" + what] for what in ("guidance", "strength"))
HELP = {"en": "Pitfalls", "ja": "注意点", "zh": "注意事项"}


@pytest.fixture(params=["canvas", "vue"])
def renderer(request, frontend):
    """Both ways in which the frontend draws nodes."""
    frontend.evaluate(SETTING, ["Comfy.VueNodes.Enabled", request.param == "vue"])
    yield request.param
    frontend.evaluate(SETTING, ["Comfy.VueNodes.Enabled", False])


def opened(frontend, name: str, changes: dict, kind: str) -> int:
    """Opens a workflow with other values of widgets, and looks at its one node of a kind; that node's id."""
    frontend.evaluate("graph => app.loadGraphData(graph)", saved_as_tests_do(graph(name)))
    (node,) = frontend.evaluate(
        """([changes, kind]) => {
            for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
                if (widget.name in changes) widget.value = changes[widget.name]
            return app.graph.nodes.filter(node => node.type === kind).map(node => node.id)
        }""",
        [changes, kind],
    )
    frontend.evaluate(
        """id => {
            const node = app.graph.getNodeById(id), { ds } = app.canvas
            ds.scale = 0.8
            ds.offset = [500 - node.pos[0], 250 - node.pos[1]]
            app.canvas.setDirty(true, true)
        }""",
        node,
    )
    return node


def saved_as_tests_do(graph: dict) -> dict:
    return json.loads(json.dumps(graph).replace('"consislora/', '"workflows/'))


def values(frontend, node: int, names: list[str]) -> list[float]:
    return [frontend.evaluate(QUEUED)[str(node)]["inputs"][name] for name in names]


def test_the_pad_turns_two_widgets_which_are_queued_and_saved(frontend, renderer):
    node = opened(frontend, "dual_guidance_demo", {}, "ConsisLoRASampler")
    field = frontend.locator(".consislora-pad .field")
    field.wait_for()
    box = field.bounding_box()
    frontend.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    frontend.mouse.down()
    frontend.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.75 * box["height"], steps=3)
    frontend.mouse.up()
    assert values(frontend, node, GUIDANCE) == [3.0, 1.0]
    field.focus()
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowDown"):
        frontend.keyboard.press(key)
    assert values(frontend, node, GUIDANCE) == [3.1, 0.1]
    frontend.locator(".consislora-pad select").select_option("strength")
    field.press("ArrowLeft")
    assert values(frontend, node, STRENGTH) == [0.95, 1.0]

    frontend.evaluate("async () => app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize())))")
    assert values(frontend, node, GUIDANCE + STRENGTH) == [3.1, 0.1, 0.95, 1.0]
    frontend.locator(".consislora-pad .across").get_by_text("0.95").wait_for()  # shows them, and its own choice


def test_a_queued_workflow_ends_with_a_picture_on_the_node(frontend, server, trained):
    node = opened(frontend, "dual_guidance_demo", {"steps": 2}, "SaveImage")
    frontend.evaluate("app.queuePrompt(0)")
    frontend.wait_for_function("id => app.graph.getNodeById(id).imgs?.length === 1", arg=node)
    told = frontend.evaluate("id => app.nodeOutputs[id].images[0].filename", node)
    assert (server.base / "output" / told).exists()


def test_training_shows_its_loss_and_stops_when_it_is_told_to(frontend, server, trained):
    changes = {"steps": 100_000, "transition_step": 10, "seed": 5}
    opened(frontend, "train_content_demo", changes, "ConsisLoRATrainImage")
    frontend.evaluate("app.queuePrompt(0)")
    curve = frontend.locator(".consislora-loss polyline")
    curve.first.wait_for(state="attached")
    frontend.get_by_text("reconstruction").first.wait_for()
    frontend.evaluate("app.extensionManager.command.execute('Comfy.Interrupt')")
    frontend.get_by_text("Execution has been interrupted").first.wait_for()
    while any(server.get("/queue").values()):  # the frontend hears of it a moment before the history does
        time.sleep(0.1)
    (last,) = server.get("/history?max_items=1").values()
    assert last["status"]["messages"][-1][0] == "execution_interrupted"


def test_the_loss_of_every_step_is_there_in_the_end(frontend, trained):
    changes = {"steps": 4, "transition_step": 2, "learning_rate": 0.01, "reconstruction_learning_rate": 0.01}
    opened(frontend, "train_content_demo", changes, "ConsisLoRATrainImage")  # trained before
    frontend.evaluate("app.queuePrompt(0)")
    frontend.get_by_text("4 / 4").wait_for()
    points = [curve.get_attribute("points") for curve in frontend.locator(".consislora-loss polyline").all()]
    assert [len(curve.split()) for curve in points] == [2, 2]


def test_help_opens_in_three_languages(frontend):
    for language, heading in HELP.items():
        in_language(frontend, language)
        node = opened(frontend, "dual_guidance_demo", {}, "ConsisLoRADemoModel")
        frontend.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", node)
        frontend.get_by_test_id("info-button").click()
        frontend.locator(".node-help-content").get_by_text(heading, exact=True).wait_for()
    in_language(frontend, "en")


def in_language(frontend, language: str) -> None:
    frontend.evaluate(SETTING, ["Comfy.Locale", language])
    frontend.reload()
    frontend.wait_for_function("window.app?.graph && window.app.vueAppReady")
