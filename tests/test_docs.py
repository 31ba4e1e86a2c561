"""README and docs: links lead somewhere, every figure stands in a results file, and the code of a page runs."""

import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import torch

from consislora_core import lora_file

ROOT = Path(__file__).resolve().parent.parent
READMES = sorted(ROOT.glob("README*.md"))
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
PROOF = ROOT / "docs" / "proof.md"

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|^    .*?$|`[^`]*`", re.DOTALL | re.MULTILINE)
NO_FIGURE = re.compile(r"SD 1\.5|\d{4}\.\d{5}|\]\([^)]*\)")  # a model's name, a paper's number, an address
# What somebody measured or set: a number with a point, in percent, or with a unit. Versions have two points.
FIGURE = re.compile(r"(?<![\w.-])(\d+\.\d+(?![\d.])|\d+(?= ?%| (?:times|GB|MB|ms|s|minutes|hours)\b))")
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?")


def read(path):
    return path.read_text(encoding="utf-8")


def figures(text):
    return set(FIGURE.findall(NO_FIGURE.sub(" ", CODE.sub(" ", text))))


def sources(text, page):
    """What the files of this repository say that a text links, pages of docs aside."""
    paths = {page.parent.joinpath(link.partition("#")[0]).resolve() for link in LINK.findall(text) if "://" not in link}
    return [read(path) for path in paths if path.suffix in (".md", ".py", ".toml", ".txt") and path not in DOCS]


def holds(text, figure):
    """Whether a text has the figure, or a number that becomes it when rounded."""
    unit = Decimal(1).scaleb(-len(figure.partition(".")[2]))
    numbers = map(Decimal, NUMBER.findall(text))
    return any(number.quantize(unit, ROUND_HALF_UP) == Decimal(figure) for number in numbers)


def words(text):
    """A text without markup, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"\]\([^)]*\)|[*`\[\]]", "", text))


def proof_rows():
    """The rows of the tables about the README: its own words, and where they are from."""
    tables = read(PROOF).partition("## In numbers")[2].partition("## Printed by tests")[0]
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
    assert figures(read(page)) <= figures(read(ROOT / "README.md"))


@pytest.mark.parametrize("page", [page for page in DOCS if page != PROOF], ids=lambda page: page.name)
def test_the_figures_of_a_section_are_in_the_files_that_it_links_and_those_of_a_row_in_one_line(page):
    for section in re.split(r"^## ", read(page), flags=re.MULTILINE):
        named = sources(section, page)
        if "(proof.md)" in section:
            named.append(read(PROOF).partition("## Printed by tests")[2])
        lines = [line for text in named for line in text.splitlines()]
        for line in CODE.sub("", section).splitlines():
            found = figures(line)
            if line.startswith("|"):
                assert not found or any(all(holds(text, figure) for figure in found) for text in lines), line
            else:
                assert all(any(holds(text, figure) for text in named) for figure in found), line


def test_the_code_for_python_trains_a_unet_of_diffusers(tmp_path, monkeypatch, capsys):
    from reference import diffusers_denoiser, diffusers_unet, relative_error, run

    (code,) = re.findall(r"```python\n(.*?)```", read(ROOT / "docs" / "python.md"), re.DOTALL)
    long, short = "steps=1500, transition_step=500, rank=64", "steps=4, transition_step=2, rank=4"
    assert long in code
    monkeypatch.chdir(tmp_path)
    unet, logged = diffusers_unet(), run("stage1_content")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    cond = logged["prompt_embeds"], logged["pooled_prompt_embeds"], logged["time_ids"][None]
    page = dict(zip(("unet", "z_0", "text", "pooled", "time_ids"), (unet, logged["z_0"], *cond), strict=True))
    exec(code.replace(long, short), page)

    after = unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert capsys.readouterr().out.count("noise loss") == 2
    lora = lora_file.read(tmp_path / "crown.safetensors")
    assert lora.parts.keys() == {"content", "style"} and lora.metadata["consislora.prompt"] == "A [c]"
    assert all(layer.up.abs().sum() > 0 for part in lora.parts.values() for layer in part.values())
    x, sigma = logged["z_0"] * 2, page["sigmas"][500:501]
    with torch.no_grad():
        ours, theirs = page["denoise"](x, sigma, cond), diffusers_denoiser(unet).denoise(x, sigma, cond)
    assert relative_error(ours, theirs) < 1e-6
