"""The review page in a real browser on the real server: what people decide is in the sheet, and nobody else can."""

import hashlib
import io
import json
import re
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request

import pytest
from browser import in_language
from conftest import ROOT
from filelock import FileLock
from images import cut_out, write_png
from PIL import Image
from prompts import quick
from test_help import LANGUAGES, open_without_proxy

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
        write_png(picture.convert("RGB"), folder / "one.png", workflow)
    data = (folder / "one.png").read_bytes()
    for result in results:
        (folder / result.files).write_bytes(data)
    (folder / "one.png").unlink()
    sheet = ResultsSheet(folder / RESULTS)
    sheet.record(results)
    return sheet


def result(name: str, edges: float = 0.5, **facts) -> Result:
    given = dict(files=f"{name}.png", scores=SCORES % edges, seed=7, content_strength=0.8) | facts
    return Result(**dict(name=name, key="key", content=f"{SUBJECT}.png", style=f"{STYLE}.png") | given)


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
    page.evaluate("localStorage.setItem('consislora.review.name', JSON.stringify('editor'))")
    yield page
    assert not page.errors
    page.close()


def look(page, server, sheet: ResultsSheet, shown: str):
    """Opens a catalogue, and waits until a result's picture is there."""
    page.goto(f"{server.url}/consislora/review?{urllib.parse.urlencode({'catalogue': sheet.path.parent.name})}")
    wait_for(page, shown)


def wait_for(page, name: str):
    page.wait_for_function(SHOWS, arg=name)


SHOWS = """name => {
    const picture = document.querySelector("#result .made")
    return document.querySelector("#result strong")?.textContent === name && picture.complete && picture.naturalWidth
}"""


def decided(page, sheet: ResultsSheet) -> dict[str, str]:
    """The decisions in the sheet, once the page has sent all of its own."""
    page.locator("body[data-saving='0']").wait_for()
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
    assert (row.decision_reason, row.decided_by, row.reason) == (
        "Wrong colours",
        "editor",
        "1: edges 0.10 is below 0.30",
    )
    page.reload()
    wait_for(page, "b")
    page.get_by_text("Rejected by editor").wait_for()


def test_filters_show_what_they_say_and_a_decision_leaves_the_undecided(page, server, three):
    look(page, server, three, "b")
    assert names(page) == ["b", "c", "a"]
    page.get_by_role("radio", name="Rejected by the gate").click()
    assert names(page) == ["b"]
    page.get_by_role("radio", name="Undecided").click()
    page.keyboard.press("a")
    wait_for(page, "c")
    assert names(page) == ["c", "a"]
    page.get_by_role("radio", name="Accepted").click()
    assert names(page) == ["b"]
    decided(page, three)


def test_the_header_says_what_it_counts_and_its_sums_are_those_of_the_filters(page, server):
    tries = [result(f"{pair}{again}", retry_of=f"{pair}0" if again else "", decision="rejected", decided_by="editor",
                    decided_at="2026-01-01", decision_reason=reason)
             for pair in "ab" for again, reason in enumerate(["dark", "dark", "flat"])]  # fmt: skip
    sheet = catalogue(server, "counted", [*tries, result("c"), result("gone")])
    (sheet.path.parent / "gone.png").unlink()
    look(page, server, sheet, "a0")
    texts = [page.locator(f"#{line} span").all_text_contents() for line in ("wanted", "tries")]
    assert texts[0] == ["4 pictures wanted:", "2 rejected", "2 undecided"]
    assert texts[1] == ["7 tries:", "1 no longer there", "6 rejected (dark 4, flat 2)"]
    counts = page.locator("#filters b").all_text_contents()
    assert counts == ["7", "1", "0", "6", "0"]
    page.locator(".row", has_text="c").click()
    wait_for(page, "c")
    page.keyboard.press("r")
    page.get_by_role("textbox").fill("dark")
    page.keyboard.press("Enter")
    page.get_by_text("7 rejected (dark 5, flat 2)").wait_for()
    assert page.locator("#filters [data-filter=rejected] b").text_content() == "7"
    page.evaluate("localStorage.removeItem('consislora.review.reasons')")


def test_of_two_who_decide_at_once_the_second_is_told(page, chromium, server, three):
    look(page, server, three, "b")
    page.route("**/results?*", lambda route: route.abort())  # as on a slow line: it does not hear of the other
    with chromium.new_page() as other:
        look(other, server, three, "b")
        other.evaluate("localStorage.setItem('consislora.review.name', JSON.stringify('another'))")
        other.keyboard.press("r")
        other.get_by_role("textbox").fill("too dark")
        other.keyboard.press("Enter")
        assert decided(other, three) == {"b": "rejected"}
    page.bring_to_front()  # a page behind others draws nothing
    page.keyboard.press("a")
    page.get_by_text("b: It has changed meanwhile.").wait_for()
    page.unroute("**/results?*")
    page.get_by_text("Rejected by another").wait_for()
    assert three.read()["b"].decision_reason == "too dark"
    page.evaluate("localStorage.setItem('consislora.review.name', JSON.stringify('editor'))")


def test_while_the_server_is_away_nothing_looks_decided(page, server, three):
    look(page, server, three, "b")
    page.route(f"{server.url}/**", lambda route: route.abort())  # as when it was killed
    page.keyboard.press("a")
    page.get_by_text("b: ComfyUI does not answer.").wait_for()
    page.locator("body[data-saving='0']").wait_for()
    assert page.locator("#filters [data-filter=undecided] b").text_content() == "3"
    assert page.locator("#accept").get_attribute("aria-pressed") == "false"
    page.keyboard.press("End")
    page.locator("#result .made.missing").wait_for(state="attached")
    page.unroute(f"{server.url}/**")
    wait_for(page, "a")  # by itself
    page.keyboard.press("a")
    assert decided(page, three) == {"a": "accepted"}


def test_nothing_is_lost_while_a_batch_writes_into_the_same_sheet(page, server, three):
    look(page, server, three, "b")

    def write():
        for number in range(40):
            three.record([Result(f"batch {number}", "key", error="failed")])

    batch = threading.Thread(target=write)
    with FileLock(f"{three.path}.lock"):  # a decision waits for it
        page.keyboard.press("a")
        wait_for(page, "c")
        batch.start()
    for name in ("a", None):
        page.keyboard.press("a")
        if name:
            wait_for(page, name)
    batch.join()
    assert decided(page, three) == {"a": "accepted", "b": "accepted", "c": "accepted"}
    assert len(three.read()) == 43


def test_a_thousand_results_take_few_rows_and_few_pictures(page, server):
    sheet = catalogue(server, "thousand", [result(f"n{number:04}", number / 1000) for number in range(1000)])
    asked = []
    page.on("request", lambda request: "of=" not in request.url and "size=192" in request.url and asked.append(request))
    look(page, server, sheet, "n0000")
    page.keyboard.press("End")
    wait_for(page, "n0999")
    assert page.locator(".row").count() < 40
    assert len(asked) < 80
    page.keyboard.press("a")
    assert decided(page, sheet) == {"n0999": "accepted"}
    page.locator("#list").evaluate("list => list.scrollTop = 0")
    page.locator(".row .name", has_text="n0000").wait_for()
    seconds = page.evaluate(STEPS, 100)
    print(f"a step from one result to the next: {1000 * seconds:.1f} ms")
    assert seconds < 0.1


STEPS = """count => {
    const began = performance.now()
    for (let i = 0; i < count; i++) document.body.dispatchEvent(
        new KeyboardEvent("keydown", { key: "ArrowUp", bubbles: true }))
    return (performance.now() - began) / 1000 / count
}"""


def test_names_and_reasons_are_text(page, server):
    evil = "_lt_img src=x onerror=window.hacked=1_gt_"  # what a file may be called
    facts = dict(files="evil.png", reason=EVIL, accepted="no", retry_of=EVIL, scores=json.dumps({"mean": {EVIL: 0.5}}))
    sheet = catalogue(server, "evil", [Result(EVIL, "key", EVIL, evil, decision="rejected", decision_reason=EVIL,
                                              decided_by=EVIL, decided_at="2026-01-01", **facts)])  # fmt: skip
    look(page, server, sheet, EVIL)
    page.keyboard.press("r")
    page.get_by_role("textbox").fill(EVIL)
    page.keyboard.press("Enter")
    decided(page, sheet)
    page.keyboard.press("r")
    page.locator("#reasons").get_by_text(EVIL).wait_for()
    page.keyboard.press("Escape")
    assert sheet.read()[EVIL].decision_reason == EVIL
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[onerror]").count() == 0
    page.evaluate("localStorage.removeItem('consislora.review.reasons')")


def test_a_key_that_follows_a_decision_at_once_does_not_lose_it(page, server, three):
    look(page, server, three, "b")
    page.evaluate("""() => {
        const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }))
        press("r")
        document.querySelector("#reasons .take").click()
        press("r")
    }""")
    page.keyboard.press("Escape")
    assert decided(page, three) == {"b": "rejected"}


def test_a_picture_that_nobody_can_see_is_not_accepted(page, server, three):
    (three.path.parent / "b.png").write_bytes(b"no picture")
    page.goto(f"{server.url}/consislora/review?catalogue={three.path.parent.name}")
    page.locator("#result .made.missing").wait_for(state="attached")
    page.keyboard.press("a")
    page.get_by_text("The picture is not loaded yet").wait_for()
    assert decided(page, three) == {}


def test_an_accepted_picture_that_another_program_has_saved_over_waits_for_another_decision(page, server, three):
    look(page, server, three, "b")
    page.keyboard.press("a")
    wait_for(page, "c")
    assert decided(page, three) == {"b": "accepted"}
    path, before = three.path.parent / "b.png", three.path.read_bytes()
    with Image.open(path) as picture:
        picture.convert("RGB").transpose(Image.Transpose.ROTATE_180).save(path)  # without the workflow
    page.get_by_role("radio", name="Undecided").locator("b", has_text="3").wait_for()  # without a reload
    look(page, server, three, "b")
    page.get_by_text("changed since it was accepted").wait_for()
    page.wait_for_function("document.querySelector('#content img').naturalWidth > 0")
    page.keyboard.press("c")  # over which the content image is there too
    page.wait_for_function("document.querySelector('#result .photo img').naturalWidth > 0")
    page.keyboard.press("m")
    page.get_by_text("has no workflow in it").wait_for()
    assert three.path.read_bytes() == before
    page.keyboard.press("a")
    wait_for(page, "c")
    decided(page, three)
    page.get_by_role("radio", name="Accepted").click()
    wait_for(page, "b")
    assert page.get_by_text("changed since").count() == 0
    assert three.read()["b"].decided_pictures == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_rejected_picture_is_made_again_at_once_not_the_next_one(page, server, three):
    queued = []

    def take(route):  # instead of a model
        queued.append(route.request.post_data_json)
        route.fulfill(json={"exec_info": {"queue_remaining": 1}})

    page.route("**/prompt", take)
    with Image.open(three.path.parent / "b.png") as picture:
        workflow = json.loads(picture.info["prompt"])
    workflow["2"]["inputs"]["images"] = ["3", 0]
    workflow["3"] = {"class_type": "KSampler", "inputs": {"seed": 7}}
    with Image.open(IMAGES / f"{SUBJECT}.png") as picture:
        write_png(picture.convert("RGB"), three.path.parent / "b.png", workflow)
    look(page, server, three, "b")
    page.get_by_role("radio", name="Undecided").click()
    page.keyboard.press("r")
    page.get_by_label("Reject and make again").wait_for()
    page.keyboard.press("0")
    page.keyboard.press("1")
    page.get_by_text("Queued with a new seed: b.").wait_for()
    wait_for(page, "c")
    page.keyboard.press("r")
    page.keyboard.press("1")  # the next one is only rejected
    wait_for(page, "a")
    page.keyboard.press("m")
    page.get_by_text("a: The workflow in the picture has no").wait_for()
    page.unroute("**/prompt")
    assert decided(page, three) == {"b": "rejected", "c": "rejected"}
    (again,) = filter(None, queued)
    assert again["extra_data"]["extra_pnginfo"]["consislora_retry_of"] == "b"
    assert again["prompt"]["1"]["inputs"]["name"].startswith("b_seed")


def test_an_open_page_fills_by_itself_and_says_when_all_is_decided(page, server):
    output, aside = server.base / "output", server.base / "output_aside"
    output.rename(aside)  # what other tests have made
    try:
        output.mkdir()
        page.goto(f"{server.url}/consislora/review")
        page.get_by_text("No catalogue yet").wait_for()
        sheet = catalogue(server, "new", [result("a", scores="")])
        wait_for(page, "a")
        page.get_by_role("radio", name="Undecided").click()
        page.keyboard.press("a")
        page.get_by_text("All decided. Files and results.csv are in output/new").wait_for()
        assert decided(page, sheet) == {"a": "accepted"}
        page.get_by_role("radio", name="Rejected").click()  # there is no gate
        page.get_by_text("Nothing here").wait_for()
        assert page.locator("#order").is_hidden()  # nor a score
    finally:
        shutil.rmtree(output)
        aside.rename(output)


def test_a_cut_out_and_its_result_lie_on_the_same_ground(page, server):
    sheet = catalogue(server, "cut_out", [result("a", content="cut-out.png")])
    drawn = cut_out(SUBJECT)
    drawn.save(server.base / "input" / "review" / "contents" / "cut-out.png")
    with Image.open(sheet.path.parent / "a.png") as picture:
        write_png(drawn, sheet.path.parent / "a.png", json.loads(picture.info["prompt"]))
    look(page, server, sheet, "a")
    page.keyboard.press("c")
    page.wait_for_function("document.querySelector('#result .photo img').naturalWidth > 0")
    for ground in ("white", "grey", "dark"):
        page.keyboard.press("g")
        shot = Image.open(io.BytesIO(page.locator("#result .stage").screenshot())).convert("RGB")
        left, right = (shot.getpixel((shot.width // 2 + side * shot.height // 4, 20)) for side in (-1, 1))
        assert left == right and left == {"white": (255,) * 3, "grey": (155,) * 3, "dark": (20,) * 3}[ground]
    page.evaluate("localStorage.removeItem('consislora.review.ground')")


def test_a_button_copies_what_is_accepted_and_says_what_it_left_out(page, server, three):
    again = result("a_seed12", files="a_seed12.png", retry_of="a")
    sheet = catalogue(server, three.path.parent.name, [again])
    look(page, server, three, "b")
    page.locator(".row", has_text="a_seed12").click()
    wait_for(page, "a_seed12")
    page.keyboard.press("a")
    page.locator(".row", has_text="b").click()
    wait_for(page, "b")
    page.keyboard.press("a")
    decided(page, sheet)
    with Image.open(sheet.path.parent / "b.png") as picture:
        picture.transpose(Image.Transpose.ROTATE_180).save(sheet.path.parent / "b.png")
    page.get_by_role("button", name="Copy accepted").click()
    report = page.get_by_role("dialog")
    folder = f"output/{sheet.path.parent.name}/accepted"
    report.get_by_text(f"Accepted pictures in {folder}: 1, copied now: 1.").wait_for()
    report.get_by_text("1 changed since they were accepted: b").wait_for()
    report.get_by_text("1 undecided").wait_for()
    page.keyboard.press("Enter")
    report.wait_for(state="hidden")
    copied = sheet.path.parent / "accepted"
    assert {path.name for path in copied.iterdir()} == {"a.png", "accepted.csv"}
    assert (copied / "a.png").read_bytes() == (sheet.path.parent / "a_seed12.png").read_bytes()
    assert ask(server, "accepted", {"catalogue": "../input"})[0] == 400


def test_the_name_is_asked_once(page, server, three):
    page.evaluate("localStorage.removeItem('consislora.review.name')")
    look(page, server, three, "b")
    page.keyboard.press("a")
    page.get_by_role("textbox").fill("editor")
    shutil.copy(three.path.parent / "c.png", three.path.parent / "later.png")
    three.record([result("later")])  # the queue goes on meanwhile
    page.locator(".row .name", has_text="later").wait_for()
    page.keyboard.press("Enter")
    wait_for(page, "later")
    page.keyboard.press("a")
    wait_for(page, "c")
    assert decided(page, three) == {"b": "accepted", "later": "accepted"}
    assert {three.read()[name].decided_by for name in ("b", "later")} == {"editor"}


def test_a_key_right_after_a_dialog_acts_on_the_page(page, server, three):
    look(page, server, three, "b")
    for key in "r2u":  # no frame is drawn between the last two: the closed dialog still has the focus
        page.keyboard.press(key)
    wait_for(page, "b")
    assert decided(page, three) == {"b": ""}


def test_making_again_gives_another_picture_and_leaves_the_first(page, server):
    prompt = quick("catalogue_demo", contents="review/contents", styles="review/styles", catalogue="again", steps=2)
    server.run(prompt)
    sheet, name = ResultsSheet(server.base / "output" / "again" / RESULTS), f"{SUBJECT}__{STYLE}"
    first = (sheet.path.parent / f"{name}.png").read_bytes()
    store = server.base / "models" / "loras" / "consislora" / "store"
    trained = {path: path.stat().st_ino for path in store.glob("*.lora")}
    look(page, server, sheet, name)
    page.keyboard.press("m")
    page.get_by_text(f"Queued with a new seed: {name}.").wait_for()
    page.get_by_text(f"{name}_seed").first.wait_for()
    before, after = sheet.read().values()
    assert trained and trained == {path: path.stat().st_ino for path in store.glob("*.lora")}  # nothing is written anew
    assert (after.retry_of, after.content, after.key) == (name, before.content, before.key)
    assert after.seed != before.seed and after.name == f"{name}_seed{after.seed}"
    assert (sheet.path.parent / f"{name}.png").read_bytes() == first
    assert (sheet.path.parent / after.files).read_bytes() != first
    assert (after.content_adapter, after.style_adapter) == (before.content_adapter, before.style_adapter)
    assert after.seconds > 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_menu_opens_the_page_in_the_language_of_comfyui(language, frontend, server, three):
    label = json.loads((ROOT / "locales" / language / "commands.json").read_text(encoding="utf-8"))
    with in_language(frontend, language):
        with frontend.expect_popup() as opened:
            open_from_menu(frontend, label["ConsisLoRA_Review"]["label"])
        opened.value.wait_for_load_state()
        opened.value.wait_for_function("language => document.documentElement.lang === language", arg=language)
        opened.value.locator("#accept kbd").wait_for()
        opened.value.close()


def test_each_frontend_has_the_entry_in_its_menu(each_frontend):
    with each_frontend.expect_popup() as opened:
        open_from_menu(each_frontend, "Review a catalogue")
    opened.value.close()


def open_from_menu(frontend, label: str) -> None:
    frontend.locator(".comfy-menu-button-wrapper, [data-testid=comfy-menu-button]").first.click()
    frontend.get_by_role("menuitem", name="ConsisLoRA", exact=True).hover()
    frontend.get_by_role("menuitem", name=label).click()


def test_every_text_is_there_in_every_language(page, server):
    page.goto(f"{server.url}/consislora/review")
    words = page.evaluate("async () => (await import('./review/page/words.js')).WORDS")
    assert words.keys() == set(LANGUAGES)
    assert {tuple(sorted(texts)) for texts in words.values()} == {tuple(sorted(words["en"]))}
    assert len({len(texts["reasons"]) for texts in words.values()}) == 1


# What is not the page


def ask(server, route: str, body: object = None, headers: dict | None = None, **query: str) -> tuple[int, bytes]:
    """Status and answer of a route."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    url = f"{server.url}/consislora/review/{route}?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | (headers or {}))
    try:
        with open_without_proxy(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def posted(server, sheet: ResultsSheet, **changes) -> dict:
    """A decision that the server takes, but for the changes."""
    name = sheet.path.parent.name
    (row, *_) = json.loads(ask(server, "results", catalogue=name)[1])["results"]
    given = dict(catalogue=name, name=row["name"], version=row["version"], decision="accepted", reason="", by="editor")
    return given | changes


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "studio.example:8188", "Origin": "http://evil.example"},
        {"Host": "studio.example:8188", "Origin": "http://studio.example:8000"},
        {"Host": "studio.example:8188", "Origin": "null"},
        {"Host": "studio.example:8188", "Origin": "http://studio.example:8188", "Sec-Fetch-Site": "cross-site"},
    ],
)
def test_other_sites_cannot_decide(server, three, headers):
    before = three.path.read_bytes()
    assert ask(server, "decision", posted(server, three), headers)[0] == 403
    assert ask(server, "accepted", {"catalogue": three.path.parent.name}, headers)[0] == 403
    assert three.path.read_bytes() == before and not (three.path.parent / "accepted").exists()


def test_its_own_page_decides_also_under_another_name(server, three):
    headers = {"Host": "studio.example:8188", "Origin": "http://studio.example:8188"}
    assert ask(server, "decision", posted(server, three), headers)[0] == 200


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"reason": "x" * 10**6}, 413),
        ({"reason": "x" * 201}, 400),
        ({"by": "x" * 81}, 400),
        ({"by": " "}, 400),
        ({"decision": "perhaps"}, 400),
        ({"reason": 7}, 400),
        ({"name": "none"}, 409),
        ({"version": "older"}, 409),
        ({"catalogue": ".."}, 400),
    ],
)
def test_what_is_no_decision_is_refused(server, three, changes, status):
    before = three.path.read_bytes()
    answered, text = ask(server, "decision", posted(server, three, **changes))
    assert answered == status and json.loads(text)["error"]
    assert three.path.read_bytes() == before


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"[" * 5000])
def test_what_is_no_json_is_refused(server, body):
    assert ask(server, "decision", body)[0] == 400


def test_a_form_is_no_decision(server, three):
    form = {"Content-Type": "text/plain"}
    assert ask(server, "decision", posted(server, three), form)[0] == 400


@pytest.mark.parametrize(
    "name",
    ["..", "../output", "/etc", "%2e%2e", "..\\..", "C:\\Windows", "x/../..", "link", "nul", "a\0b", "none", "\ud800"],
)
def test_no_folder_outside_the_output_folder_is_a_catalogue(server, tmp_path, name):
    ResultsSheet(tmp_path / RESULTS).record([result("secret")])
    (tmp_path / "secret.png").write_bytes((IMAGES / f"{STYLE}.png").read_bytes())
    link = server.base / "output" / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    quoted = urllib.parse.quote(name.encode(errors="surrogatepass"))
    for route in ("results", "summary", "picture", "retry"):
        status, text = ask(server, f"{route}?catalogue={quoted}&name=secret&x=")
        assert status == 400 and json.loads(text)["error"]
    assert "link" not in json.loads(ask(server, "catalogues")[1])


def test_no_file_outside_of_a_catalogue_is_a_picture(server, tmp_path, request):
    secret = tmp_path / "secret.png"
    secret.write_bytes((IMAGES / f"{STYLE}.png").read_bytes())
    sheet = catalogue(server, "outside", [result("good")])
    folder = sheet.path.parent
    (folder / "link.png").symlink_to(secret)
    files = [
        "../review/x.png",
        "../../input/review/contents/crown-flat.png",
        str(secret),
        "link.png",
        "results.csv",
        "",
    ]
    sheet.record([result(f"bad{number}", files=file) for number, file in enumerate(files)])
    assert [row["name"] for row in json.loads(ask(server, "results", catalogue="outside")[1])["results"]] == [
        "good",
        "bad4",
    ]
    for number in range(len(files)):
        assert ask(server, "picture", catalogue="outside", name=f"bad{number}")[0] == 400
    assert ask(server, "picture", catalogue="outside", name="good")[0] == 200


def test_a_workflow_in_a_picture_leads_to_no_file_outside_the_input_folder(server, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes((IMAGES / f"{STYLE}.png").read_bytes())
    sheet = catalogue(server, "lured", [result("good")])
    for contents in ("..", str(tmp_path), "../output/lured/good.png", 7, ["1", 0]):
        load = {"class_type": "ConsisLoRACatalogLoad", "inputs": {"contents": contents, "styles": contents}}
        with Image.open(IMAGES / f"{SUBJECT}.png") as picture:
            write_png(picture.convert("RGB"), sheet.path.parent / "good.png", {"1": load})
        for role in ("content", "style"):
            assert ask(server, "picture", catalogue="lured", name="good", of=role)[0] == 400


def test_a_picture_that_the_browser_has_is_not_sent_again(server, three):
    query = dict(catalogue=three.path.parent.name, name="a", size="192")
    url = f"{server.url}/consislora/review/picture?{urllib.parse.urlencode(query)}"
    with open_without_proxy(url) as answer:
        tag, kind, length = answer.headers["ETag"], answer.headers["Content-Type"], len(answer.read())
    assert kind == "image/jpeg" and length < 20_000
    assert ask(server, "picture", None, {"If-None-Match": tag}, **query)[0] == 304
    assert ask(server, "picture", **query | {"size": "5000"})[0] == 400
