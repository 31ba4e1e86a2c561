"""ComfyUI's frontend in a real browser, and what people do in it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Page, sync_playwright

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]
# A page whose files come from elsewhere may not open a websocket to this machine.
QUIET += ["--disable-features=LocalNetworkAccessChecks"]
# The frontend searches ComfyUI's registry for unpublished nodes; a server without API nodes forbids it that. Newer
# frontends ask for a list of jobs, which ComfyUI 0.3.75 does not keep; older ones how large a missing checkpoint is.
ELSEWHERE = ("Failed to load resource", "Content Security Policy", "JobsApiError", "Error fetching file size")

UP = "window.app?.graph && window.app.vueAppReady"
TOGGLE_APP = "app.extensionManager.command.execute('Comfy.ToggleLinear')"
SETTING = "([id, value]) => app.ui.settings.setSettingValueAsync(id, value)"


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


@contextmanager
def browser() -> Iterator[BrowserContext]:
    """While it is up, nothing else in this process can run an event loop."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        context = running.new_context(viewport={"width": 1800, "height": 1000})
        context.set_default_timeout(120_000)  # a busy machine takes minutes to draw its first page
        yield context
        running.close()


def opened(context: BrowserContext, server, static: Path | None = None) -> Page:
    """ComfyUI's frontend, up and empty; `page.complaints` gathers what it reports as errors.

    static: the files of another frontend than the server's own, which then only answers its questions.
    """
    server.post("/settings", {"Comfy.TutorialCompleted": True})  # or the template browser opens over the canvas
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda said: said.type == "error" and complain(page, said.text))
    page.on("pageerror", lambda error: complain(page, str(error)))
    if static:
        page.route(
            lambda url: file_at(static, url), lambda route: route.fulfill(path=file_at(static, route.request.url))
        )
    page.goto(f"{server.url}/api/system_stats")
    page.evaluate("localStorage.clear()")  # or newer frontends open the workflow that an earlier page had last
    page.goto(server.url)
    page.wait_for_function(UP)
    return page


def file_at(static: Path, url: str) -> Path | None:
    """The file of a frontend that a URL asks for."""
    path = static / (urlsplit(url).path.lstrip("/") or "index.html")
    return path if path.is_file() else None


def complain(page: Page, text: str) -> None:
    if not any(reason in text for reason in ELSEWHERE):
        page.complaints.append(text)


def setting(page: Page, name: str, value) -> None:
    page.evaluate(SETTING, [name, value])


@contextmanager
def in_language(page: Page, language: str) -> Iterator[None]:
    """The frontend in a language, and in English again afterwards, for the tests that follow."""
    _choose_language(page, language)
    try:
        yield
    finally:
        _choose_language(page, "en")


def _choose_language(page: Page, language: str) -> None:
    setting(page, "Comfy.Locale", language)
    page.reload()
    page.wait_for_function(UP)


def drop(page: Page, name: str, graph: dict) -> None:
    """Drops a workflow file onto the canvas, and waits until it is open."""
    # While a file opens, the frontend blocks its window, and fails at a drop before that has faded out.
    page.wait_for_function("!document.querySelector('.p-blockui-mask')")
    page.evaluate("app.graph.clear()")
    file = page.evaluate_handle(
        """([name, text]) => {
            const dropped = new DataTransfer()
            dropped.items.add(new File([text], name, { type: "application/json" }))
            return dropped
        }""",
        [f"{name}.json", json.dumps(graph)],
    )
    page.dispatch_event("#graph-canvas", "drop", {"dataTransfer": file})
    page.wait_for_function(
        """([name, count]) => app.graph.nodes.length === count
            && app.extensionManager.workflow.activeWorkflow?.filename.startsWith(name)""",
        arg=[name, len(graph["nodes"])],
    )


def open_app(page: Page) -> None:
    """Shows the open workflow in the app mode of newer frontends, in place of the graph."""
    page.evaluate(TOGGLE_APP)
    page.get_by_test_id("linear-widgets").wait_for()
    page.wait_for_timeout(2000)
    for tour in page.get_by_role("button", name="Skip", exact=True).all():  # which the newest offer to a new profile
        tour.click()


def turn(page: Page, changes: dict) -> None:
    """Sets every widget of these names."""
    page.evaluate(
        """changes => {
            for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
                if (widget.name in changes) widget.value = changes[widget.name]
        }""",
        changes,
    )


def look_at(page: Page, kind: str, scale: float = 0.8, top: int = 200) -> int:
    """Brings the one node of a type into view, and leaves room above it for its tools; its id."""
    (node,) = page.evaluate("kind => app.graph.nodes.filter(({ type }) => type === kind).map(({ id }) => id)", kind)
    page.evaluate(
        """([id, scale, top]) => {
            const node = app.graph.getNodeById(id), { ds } = app.canvas
            ds.scale = scale
            ds.offset = [800 / scale - node.pos[0], top / scale - node.pos[1]]
            app.canvas.setDirty(true, true)
        }""",
        [node, scale, top],
    )
    return node


def queue(page: Page) -> None:
    page.keyboard.press("Control+Enter")


def cancel(page: Page) -> None:
    page.keyboard.press("Control+Alt+Enter")


def queued(page: Page) -> dict:
    """What the canvas would queue, in API form."""
    return page.evaluate("async () => (await app.graphToPrompt()).output")
