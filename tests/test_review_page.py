"""The review page in a real browser on the real server: what people decide is in the sheet, and nobody else can."""

import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from browser import in_language
from conftest import ROOT
from filelock import FileLock
from PIL import Image
from prompts import quick
from test_help import LANGUAGES, open_without_proxy

from catalogue.pictures import write_picture
from catalogue.sheets import RESULTS, Result, ResultsSheet
from demo.run import IMAGES

SUBJECT, STYLE = "crown-flat", "balloon-halftone"
SCORES = '{"mean": {"edges": %s, "silhouette": 0.5}}'
EVIL = "<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module", autouse=True)
def sources(server):
    for folder, name in (("contents", SUBJECT), ("styles", STYLE)):
        path = server.base / "input" / "review" / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{name}.png").write_bytes((IMAGES / f"{name}.png").read_bytes())


def catalogue(server, name: str, results: list[Result]) -> ResultsSheet:
    """A catalogue of results, each with the picture of the style image, which carries the workflow of a run."""
    folder = server.base / "output" / name
    load = {"contents": "review/contents", "styles": "review/styles", "catalogue": name, "name": "", "index": 0}
    workflow = {
        "1": {"class_type": "ConsisLoRACatalogLoad", "inputs": load},
        "2": {"class_type": "ConsisLoRACatalogSave", "inputs": {"images": ["1", 1], "job": ["1", 2]}},
    }
    with Image.open(IMAGES / f"{SUBJECT}.png") as picture:
        write_picture(picture.convert("RGB"), folder / "one.png", {"prompt": json.dumps(workflow)})
    data = (folder / "one.png").read_bytes()
    for result in results:
        (folder / result.files).write_bytes(data)
    (folder / "one.png").unlink()
    sheet = ResultsSheet(folder / RESULTS)
    sheet.record(results)
    return sheet


def result(name: str, edges: float = 0.5, **facts) -> Result:
    given = dict(files=f"{name}.png", scores=SCORES % edges, seed=7, content_strength=0.8) | facts
    return Result(name, "key", f"{SUBJECT}.png", f"{STYLE}.png", **given)


@pytest.fixture
def three(server, request) -> ResultsSheet:
    """Three results; the second has the lowest score, and the gate rejected it."""
    rejected = dict(accepted="no", reason="1: edges 0.10 is below 0.30")
    name = re.sub(r"\W+", "_", request.node.name)
    return catalogue(server, name, [result("a", 0.9), result("b", 0.1, **rejected), result("c", 0.6)])


@pytest.fixture(scope="module")
def page(chromium, server):
    page = chromium.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"{server.url}/consislora/review")
    page.evaluate("localStorage.setItem('consislora.review.name', JSON.stringify('Maria'))")
    yield page
    assert not page.errors
    page.close()


def look(page, server, sheet: ResultsSheet, shown: str):
    """Opens a catalogue, and waits until a result's picture is there."""
    page.goto(f"{server.url}/consislora/review?{urllib.parse.urlencode({'catalogue': sheet.path.parent.name})}")
    wait_for(page, shown)


def wait_for(page, name: str):
    page.wait_for_function(
        """name => document.querySelector("#result strong")?.textContent === name
            && document.querySelector("#result .made").complete && document.querySelector("#result .made").naturalWidth""",
        arg=name,
    )


def decided(page, sheet: ResultsSheet) -> dict[str, str]:
    """The decisions in the sheet, once the page has sent all of its own."""
    page.wait_for_function("window.reviewIsSaved()")
    return {name: result.decision for name, result in sheet.read().items() if result.decided_at}


def names(page) -> list[str]:
    return page.locator(".row .name").all_text_contents()


def test_keys_decide_and_take_back_and_all_is_there_after_a_reload(page, server, three):
    look(page, server, three, "b")  # which has the lowest score
    page.keyboard.press("r")
    page.keyboard.press("2")
    wait_for(page, "c")
    page.keyboard.press("a")
    wait_for(page, "a")
    page.keyboard.press("a")
    assert decided(page, three) == {"a": "accepted", "b": "rejected", "c": "accepted"}
    page.keyboard.press("u")
    page.keyboard.press("u")
    wait_for(page, "c")
    assert decided(page, three) == {"a": "", "b": "rejected", "c": ""}
    row = three.read()["b"]
    assert (row.decision_reason, row.decided_by, row.reason) == ("Wrong colours", "Maria", "1: edges 0.10 is below 0.30")
    page.reload()
    wait_for(page, "b")
    page.get_by_text("Rejected by Maria").wait_for()


if __name__ == "__main__":
    pass
