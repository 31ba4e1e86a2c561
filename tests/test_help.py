"""Node help and node texts in three languages: whole, up to date, and where the frontend expects them."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
from prompts import load_script

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ["en", "ja", "zh"]
SLOTS = ["inputs", "outputs"]
LONGEST_PAGE = 420  # words
MARKUP = set("{}@|")  # what the frontend's translations do not take as plain text

Defs = dict[str, dict]  # node texts by node id, as in a nodeDefs.json

open_without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@pytest.fixture(scope="module")
def nodes(server) -> Defs:
    """Our nodes as the server describes them."""
    info = server.get("/object_info")
    ours = {name: node for name, node in info.items() if node["python_module"] == "custom_nodes.ComfyUI-ConsisLoRA"}
    assert ours
    return ours


@pytest.fixture(scope="module")
def schema_texts(nodes, build) -> Defs:
    return {name: build.node_texts(node) for name, node in nodes.items()}


@pytest.fixture(scope="module")
def build():
    return load_script(ROOT / "locales" / "build.py")


@pytest.fixture(scope="module")
def page(server, nodes):
    """A help page, from the address that the frontend asks for. A page that is not there raises an HTTPError.

    English is the page without a language, which the frontend falls back to, and so do readers of other languages.
    """

    def fetch(name: str, language: str) -> str:
        pack = nodes[name]["python_module"].split(".")[1]
        with open_without_proxy(f"{server.url}/extensions/{pack}/docs/{file(name, language)}") as answer:
            return answer.read().decode("utf-8")

    return fetch


def file(name: str, language: str) -> str:
    return f"{name}.md" if language == "en" else f"{name}/{language}.md"


def defs(language: str) -> Defs:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def flat(tree: dict, path: str = "") -> dict[str, str]:
    """All texts by their path, such as ConsisLoRALoad.inputs.lora_name.tooltip; an empty branch is a text too."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) and value else {path + key: value}
    return found


def rows(page: str) -> list[str]:
    """The first cells of all table rows that are about an input or output."""
    return re.findall(r"^\| ([^|]*`[^|]*) \|", page, re.MULTILINE)


def expected_rows(schema: dict, shown: dict) -> list[str]:
    """Each holds a label and, where that is another, the name in the schema."""
    pairs = [(shown[slots][key]["name"], slot["name"]) for slots in SLOTS for key, slot in schema[slots].items()]
    return [f"`{name}`" if label == name else f"{label} `{name}`" for label, name in pairs]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_help_where_the_frontend_asks_for_it(language, nodes, page):
    headings = {name: re.findall("^## .+", page(name, language), re.MULTILINE) for name in nodes}
    assert {len(found) for found in headings.values()} == {3}  # inputs, outputs, pitfalls


def test_there_is_no_help_for_a_node_or_a_language_that_is_not_ours(nodes):
    pages = {path.relative_to(ROOT / "web" / "docs").as_posix() for path in (ROOT / "web" / "docs").rglob("*.md")}
    assert pages == {file(name, language) for name in nodes for language in LANGUAGES}


def test_a_help_page_keeps_to_about_a_screen():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "web" / "docs").glob("*.md")}
    words = {name: len(re.findall(r"[^\s|]+", page)) for name, page in pages.items()}
    assert {name: count for name, count in words.items() if count > LONGEST_PAGE} == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_help_page_has_a_row_for_every_input_and_output_and_no_other(language, schema_texts, page):
    shown = defs(language)
    for name, schema in schema_texts.items():
        assert sorted(rows(page(name, language))) == sorted(expected_rows(schema, shown[name])), name


@pytest.mark.parametrize(
    ("language", "saving", "loading"),
    [
        ("en", "Save Checkpoint", "Load LoRA before Save Checkpoint"),
        ("ja", "チェックポイントを保存", "「LoRAを読み込む」を「チェックポイントを保存」の前"),
        ("zh", "保存Checkpoint", "“加载LoRA”接在“保存Checkpoint”之前"),
    ],
)
def test_help_says_what_save_checkpoint_saves_after_apply(language, saving, loading):
    page = (ROOT / "web" / "docs" / file("ConsisLoRAApply", language)).read_text(encoding="utf-8")
    assert any(saving in line and "LoRA" in line for line in page.splitlines())
    assert loading in page


@pytest.mark.parametrize("language", LANGUAGES)
def test_node_texts_are_there_for_every_input_and_output_and_no_other(language, schema_texts):
    translated, schema = flat(defs(language)), flat(schema_texts)
    assert translated.keys() == schema.keys()
    assert [path for path, text in translated.items() if not text and schema[path]] == []


def test_english_node_texts_are_what_the_generator_makes(build, server):
    text = build.FILE.read_text(encoding="utf-8")
    assert text == build.file_text(server.get("/object_info")), "run `python locales/build.py` beside a running ComfyUI"


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_nothing_but_labels_stays_english(language, schema_texts):
    english, translated = flat(schema_texts), flat(defs(language))
    sentences = [path for path in english if path.endswith((".tooltip", ".description", ".display_name"))]
    assert [path for path in sentences if translated[path] == english[path]] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_frontend_takes_every_text_as_it_is(language):
    assert [path for path, text in flat(defs(language)).items() if MARKUP & set(text)] == []


def test_the_server_offers_the_node_texts_in_every_language(server):
    offered = server.get("/i18n")
    for language in LANGUAGES:
        assert defs(language).items() <= offered[language]["nodeDefs"].items()
