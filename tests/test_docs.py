"""README and docs: links lead somewhere, and every figure stands in a results file."""

import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = sorted(ROOT.glob("README*.md"))
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
PROOF = ROOT / "docs" / "proof.md"

LINK = re.compile(r'(?:\]\(|src=")([^)\s"]+)')
CODE = re.compile(r"```.*?```|^    .*?$|`[^`]*`", re.DOTALL | re.MULTILINE)
NO_FIGURE = re.compile(r"SD 1\.5|\d{4}\.\d{5}|\]\([^)]*\)")  # a model's name, a paper's number, an address
# What somebody measured or set: a number with a point, in percent, or with a unit. Versions have two points.
FIGURE = re.compile(r"(?<![\w.-])(\d+\.\d+(?!\.?\d)|\d+(?= ?%| (?:times|GB|MB|ms|s|minutes|hours)\b))")
INTERVAL = re.compile(r"\([^()]* to [^()]*\)")
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+\b)?")


def read(path):
    return path.read_text(encoding="utf-8")


def figures(text):
    return FIGURE.findall(NO_FIGURE.sub(" ", CODE.sub(" ", text)))


def sources(text, page):
    """What the files of this repository say that a text links, without intervals; pages of docs aside."""
    paths = {page.parent.joinpath(link.partition("#")[0]).resolve() for link in LINK.findall(text) if "://" not in link}
    return [
        INTERVAL.sub("", read(path))
        for path in paths
        if path.suffix in (".md", ".py", ".toml", ".txt") and path not in DOCS
    ]


def holds(text, *found):
    """Whether a text has these figures, one after another, or numbers that become them when rounded."""
    numbers = map(Decimal, NUMBER.findall(text))
    return all(any(is_rounded(number, figure) for number in numbers) for figure in found)


def is_rounded(number, figure):
    unit = Decimal(1).scaleb(-len(figure.partition(".")[2]))
    return number.quantize(unit, ROUND_HALF_UP) == Decimal(figure)


def words(text):
    """A text without markup, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"\]\([^)]*\)|[*`\[\]]", "", text))


def proof_rows():
    """The rows of the tables about the README: its own words, and where they are from."""
    tables = read(PROOF).partition("## In numbers")[2].partition("## Printed by")[0]
    rows = [line.strip("|").split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    return [(words(claim).strip(), source) for claim, source, *_ in rows if claim.strip() != "the README says"]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_is_there(page):
    for link in LINK.findall(read(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short():
    assert read(ROOT / "README.md").count("\n") <= 150


@pytest.mark.parametrize(("claim", "source"), proof_rows(), ids=lambda text: text[:30])
def test_a_claim_is_in_the_readme_word_for_word_and_its_figures_in_the_file_it_names(claim, source):
    assert claim in words(read(ROOT / "README.md"))
    named = sources(source, PROOF)
    assert named or "`python" in source
    for figure in figures(claim) if named else ():
        assert any(holds(text, figure) for text in named), figure


def test_every_figure_of_the_readme_is_in_a_claim():
    text = words(CODE.sub(" ", read(ROOT / "README.md")))
    for claim, _ in proof_rows():
        text = text.replace(claim, "")
    assert not figures(text)


@pytest.mark.parametrize("page", [page for page in READMES if page.name != "README.md"], ids=lambda page: page.name)
def test_a_translated_readme_has_no_figure_of_its_own(page):
    assert set(figures(read(page))) <= set(figures(read(ROOT / "README.md")))


@pytest.mark.parametrize("page", [page for page in DOCS if page != PROOF], ids=lambda page: page.name)
def test_the_figures_of_a_section_are_in_the_files_that_it_links_and_those_of_a_row_in_a_line(page):
    for section in re.split(r"^## ", read(page), flags=re.MULTILINE):
        named = sources(section, page)
        if "(proof.md)" in section:
            named.append(read(PROOF).partition("## Printed by")[2])
        lines = [line for text in named for line in text.splitlines()]
        for line in CODE.sub("", section).splitlines():
            found = figures(line)
            if line.startswith("|"):
                assert not found or any(holds(text, *found) for text in lines), line
            else:
                assert all(any(holds(text, figure) for text in named) for figure in found), line
