"""Load and Save Catalogue on real folders: names, sizes, what is done and what is bad."""

import json
import os
import re
import shutil
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from PIL import Image

from batch.comfy_client import WorkflowError
from catalogue import pictures, tables
from catalogue.pictures import digests_key, open_cut_out, open_picture, picture_digest
from catalogue.plan import CatalogueJob, free_paths
from catalogue.review import Verdict, decide, describe_results
from catalogue.sheets import SETTINGS, Entry, Result, ResultsSheet
from catalogue.sizes import latent_size
from consislora_core.lora_file import ImageLora
from demo.run import IMAGES

FORMATS = {"PNG": ".png", "WebP": ".webp", "JPEG": ".jpg", "TIFF": ".tif"}
LORA = ImageLora({}, {"consislora.stage": "image", "consislora.image_hash": "1a2b", "consislora.prompt": "A [c]"})


@pytest.fixture
def nodes(pack):
    return pack.nodes


@pytest.fixture
def folders(pack):
    """ComfyUI's input and output folders, with two content and two style images of different sizes, and no results."""
    root, output = pack.host.paths.input_folder() / "catalogue", pack.host.paths.output_folder()
    for folder in (root, output):
        shutil.rmtree(folder, ignore_errors=True)
    for name, size in {
        "subjects/cup": (40, 20),
        "subjects/pot": (30, 50),
        "styles/ink": (8, 8),
        "styles/oil": (9, 9),
    }.items():
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (255, 0, 51)).save(path)
    return root, output


def load(nodes, **changes):
    inputs = dict(contents="catalogue/subjects", styles="catalogue/styles", catalogue="cat", name="{content}__{style}")
    return nodes.CatalogLoad.execute(**{**inputs, "run": nodes.catalogue.ALL, "index": 0, **changes}).result[:5]


def save(nodes, job, **inputs):
    return nodes.CatalogSave.execute(images=torch.rand(1, 16, 24, 3), job=job, **inputs)


def names(nodes, **changes) -> list[str]:
    """The pairs that a run would make."""
    (*_, found, report) = load(nodes, **changes)
    return found if isinstance(found[0], str) else []


def fingerprint(nodes, **changes):
    inputs = dict(contents="catalogue/subjects", styles="catalogue/styles", catalogue="cat", name="{content}__{style}")
    return nodes.CatalogLoad.fingerprint_inputs(**{**inputs, "run": nodes.catalogue.ALL, "index": 0, **changes})


def test_all_pairs_come_with_their_own_sizes(nodes, folders):
    contents, styles, jobs, found, report = load(nodes)
    assert found == ["cup__ink", "cup__oil", "pot__ink", "pot__oil"] == [job.name for job in jobs]
    assert [tuple(one.shape) for one in contents] == [(1, 20, 40, 3)] * 2 + [(1, 50, 30, 3)] * 2
    assert [tuple(one.shape) for one in styles] == [(1, 8, 8, 3), (1, 9, 9, 3)] * 2
    assert contents[0] is contents[1]  # a picture takes memory once, however many pairs it is in
    assert contents[0][0, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert report.splitlines()[1] == "0 of 4 pairs are done."


def test_one_pair_comes_by_its_index_and_after_the_last_the_first(nodes, folders):
    assert [names(nodes, run=nodes.catalogue.ONE, index=index)[0] for index in (0, 3, 4)] == [
        "cup__ink",
        "pot__oil",
        "cup__ink",
    ]


def test_a_report_lists_no_more_pairs_than_people_read(nodes, folders):
    root, _ = folders
    for number in range(20):
        shutil.copy(root / "subjects" / "cup.png", root / "subjects" / f"cup{number}.png")
    (*_, found, report) = load(nodes)
    assert len(found) == 44 and " and 14 more.\n" in report and len(report) < 800


def test_what_is_saved_is_skipped_until_its_picture_or_source_changes(nodes, folders):
    root, output = folders
    jobs = load(nodes)[2]
    before = fingerprint(nodes)
    for job in jobs[:3]:
        save(nodes, job)
    assert names(nodes) == ["pot__oil"]
    assert names(nodes, run=nodes.catalogue.ONE, index=1) == []
    assert fingerprint(nodes) != before
    (output / "cat" / "cup__ink.png").unlink()
    Image.new("RGB", (3, 3)).save(root / "styles" / "oil.png")
    assert names(nodes) == ["cup__ink", "cup__oil", "pot__oil"]


@pytest.mark.parametrize("pattern", ["{style}/{content}", "{style}\\{content}"])
def test_a_result_that_is_deleted_in_a_folder_is_noticed(nodes, folders, pattern):
    job = load(nodes, name=pattern)[2][0]
    save(nodes, job)
    before = fingerprint(nodes, name=pattern)
    (job.folder / "ink" / "cup.png").unlink()
    assert fingerprint(nodes, name=pattern) != before
    assert "ink/cup" in names(nodes, name=pattern)


def test_a_catalogue_goes_on_in_either_spelling_of_its_name(nodes, folders):
    save(nodes, load(nodes, catalogue="caf\u00e9")[2][0])
    assert len(names(nodes, catalogue="cafe\u0301")) == 3


def test_when_everything_is_done_it_says_so_and_nothing_runs(nodes, folders):
    for job in load(nodes)[2]:
        save(nodes, job)
    *blocked, report = load(nodes)
    assert all(type(one).__name__ == "ExecutionBlocker" and one.message is None for (one,) in blocked)
    assert report == "Everything is done. To have a result made again, delete its picture.\n4 of 4 pairs are done."


def test_bad_files_are_listed_and_skipped_until_they_are_good(nodes, folders):
    root, output = folders
    (root / "subjects" / "bad.png").write_bytes(b"")
    (root / "styles" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    *_, found, report = load(nodes, styles="catalogue/styles\ncatalogue/none")
    assert len(found) == 4
    assert "- catalogue/subjects/bad.png: bad.png is empty (0 bytes). Copy it again." in report
    sheet = ResultsSheet(output / "cat" / "results.csv")
    assert sorted(sheet.read()) == ["catalogue/none", "catalogue/styles/torn.jpg", "catalogue/subjects/bad.png"]
    assert names(nodes, run=nodes.catalogue.ONE, index=0) == []  # bad.png comes first
    (root / "styles" / "torn.jpg").unlink()
    Image.new("RGB", (9, 9)).save(root / "subjects" / "bad.png")
    assert len(names(nodes)) == 6
    assert sheet.read() == {}


def test_a_catalogue_of_nothing_is_refused_with_the_reasons(nodes, folders):
    with pytest.raises(ValueError, match="has 1 problem:\n- catalogue/none: there is no such folder or file"):
        load(nodes, contents="catalogue/none")
    with pytest.raises(ValueError, match="contents or styles is empty"):
        load(nodes, styles=" ")


@pytest.mark.parametrize("changes", [{"catalogue": "../x"}, {"name": "../{content}"}, {"catalogue": "/tmp"}])
def test_names_that_lead_elsewhere_are_refused(nodes, folders, changes):
    with pytest.raises(ValueError, match="is not a name inside the folder"):
        load(nodes, **changes)


def test_a_result_has_its_row_and_its_facts(nodes, folders):
    _, output = folders
    job = load(nodes, name="{style}/{content}")[2][0]
    made = save(nodes, job, content=LORA, report="content 0.9", accepted=False, reasons="too far")
    assert made.result == ("cat/ink/cup.png",)
    assert made.ui == {"images": [{"filename": "cup.png", "subfolder": "cat/ink", "type": "output"}]}
    result = ResultsSheet(output / "cat" / "results.csv").read()["ink/cup"]
    expected = Result("ink/cup", job.key, "cup.png", "ink.png", "ink/cup.png", "stage image, image_hash 1a2b")
    expected = dict(vars(expected), scores="content 0.9", accepted="no", reason="too far", finished=result.finished)
    expected["seconds"] = result.seconds
    assert vars(result) == expected
    facts = json.loads(Image.open(output / "cat" / "ink" / "cup.png").text["consislora"])
    assert (facts["name"], facts["content_lora"]["consislora.prompt"]) == ("ink/cup", "A [c]")
    assert open_picture(output / "cat" / "ink" / "cup.png").size == (24, 16)


def test_the_pairs_of_a_run_share_its_time(nodes, folders, pack, monkeypatch):
    jobs = load(nodes)[2]
    monkeypatch.setattr(pack.host.progress, "run_began", time.monotonic() - 40)
    save(nodes, jobs[0])
    assert ResultsSheet(jobs[0].folder / "results.csv").read()[jobs[0].name].seconds == pytest.approx(10, abs=2)


@pytest.mark.parametrize(("format", "suffix"), FORMATS.items())
def test_with_disable_metadata_a_picture_has_no_facts(nodes, folders, monkeypatch, format, suffix):
    monkeypatch.setattr(nodes.save_catalogue.args, "disable_metadata", True)
    save(nodes, load(nodes)[2][0], content=LORA, format=format, title="a title", rights="all mine")
    file = (folders[1] / "cat" / f"cup__ink{suffix}").read_bytes()
    assert not re.search(b"a title|all mine|consislora|A .c.", file)


@pytest.mark.parametrize(("format", "suffix"), FORMATS.items())
def test_a_catalogue_goes_on_over_results_of_every_format(nodes, folders, format, suffix):
    for job in load(nodes)[2][:3]:
        save(nodes, job, format=format)
    assert names(nodes) == ["pot__oil"]
    (folders[1] / "cat" / f"cup__ink{suffix}").unlink()
    assert names(nodes) == ["cup__ink", "pot__oil"]


@pytest.mark.parametrize(("format", "suffix"), FORMATS.items())
def test_a_result_gets_its_photos_size_though_the_photo_has_gone(nodes, folders, format, suffix):
    root, output = folders
    turned = Image.Exif()
    turned[0x0112] = 6  # shown on its side
    Image.new("CMYK", (123, 77)).save(root / "subjects" / "cup.jpg", exif=turned)
    jobs = {job.name: job for job in load(nodes, contents="catalogue/subjects/cup.jpg")[2]}
    (root / "subjects" / "cup.jpg").unlink()
    save(nodes, jobs["cup__ink"], format=format, size="as the photo")
    with Image.open(output / "cat" / f"cup__ink{suffix}") as picture:
        assert picture.size == (77, 123)


def test_xmp_has_the_results_name_and_the_rights_of_its_loras_unless_others_are_stated(nodes, folders):
    lora = ImageLora({}, LORA.metadata | {"consislora.rights": "photo: A. Smith"})
    jobs = load(nodes)[2]
    save(nodes, jobs[0], content=lora, style=lora)
    save(nodes, jobs[1], content=lora, title="The cup", creator="Studio", rights="\u00a9 Shop")
    first, second = (
        (folders[1] / "cat" / f"{job.name}.png").read_bytes().decode("utf-8", "replace") for job in jobs[:2]
    )
    assert ">cup__ink</rdf:li>" in first and ">photo: A. Smith</rdf:li>" in first and "dc:creator" not in first
    assert all(f">{text}</rdf:li>" in second for text in ("The cup", "Studio", "\u00a9 Shop"))


def test_a_tiff_is_shown_as_a_picture_that_browsers_know(nodes, folders, pack):
    (shown,) = save(nodes, load(nodes)[2][0], format="TIFF").ui["images"]
    assert shown["type"] == "temp"
    assert (pack.host.paths.temp_folder() / shown["subfolder"] / shown["filename"]).suffix == ".png"


def cut_out(folder, name: str, size=(20, 10)):
    """Blue, its left half transparent with red left under it."""
    drawn = Image.new("RGBA", size, (0, 0, 255, 255))
    drawn.paste((255, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    drawn.save(folder / f"{name}.png")


def loaded(nodes, **changes):
    inputs = dict(contents="catalogue/subjects", styles="catalogue/styles", catalogue="cat", name="")
    inputs["run"] = nodes.catalogue.ALL
    return nodes.CatalogLoad.execute(**{**inputs, "index": 0, **changes}).result[:6]


def test_the_mask_is_one_where_the_content_picture_is_opaque(nodes, folders):
    cut_out(folders[0] / "subjects", "cut")
    *_, names, _, masks = loaded(nodes, styles="catalogue/styles/ink.png")
    masks = dict(zip(names, masks, strict=True))
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "cup__ink": (1, 20, 40), "cut__ink": (1, 10, 20), "pot__ink": (1, 50, 30),
    }  # fmt: skip
    assert masks["cut__ink"][0, 5].tolist() == 10 * [0] + 10 * [1]
    assert masks["cup__ink"].eq(1).all() and masks["pot__ink"].eq(1).all()
    assert torch.equal(loaded(nodes, run=nodes.catalogue.ONE, index=2)[-1][0], masks["cut__ink"])


def left_edges(nodes, **changes) -> dict[str, list[float]]:
    """The colour at the left of each content picture, as 8 bits, by the name of its result."""
    contents, _, _, names, *_ = loaded(nodes, **changes)
    return {name: (content[0, 5, 0] * 255).tolist() for name, content in zip(names, contents, strict=True)}


def test_what_is_transparent_lies_on_the_background_that_is_chosen(nodes, folders):
    root, _ = folders
    cut_out(root / "subjects", "cut")
    cut_out(root / "styles", "through")
    Image.new("RGB", (30, 30), (250, 240, 200)).save(root / "styles" / "oil.png")
    ink, oil = [255, 0, 51], [250, 240, 200]
    cut = "catalogue/subjects/cut.png"
    white = left_edges(nodes, contents=cut)
    assert white == left_edges(nodes, contents=cut, background="#fff") == dict.fromkeys(white, [255, 255, 255])
    assert set(map(tuple, left_edges(nodes, contents=cut, background="#0a0b0c").values())) == {(10, 11, 12)}
    expected = {"cut__ink": ink, "cut__oil": oil, "cut__through": [255, 255, 255]}
    for run in ({}, {"run": nodes.catalogue.ONE, "index": 1}):
        own = left_edges(nodes, contents=cut, background="style", **run)
        assert own and all(own[name] == expected[name] for name in own)
    both = left_edges(nodes, contents=f"{cut}\ncatalogue/styles", background="style")
    assert both.items() >= {**expected, "through__ink": ink, "through__through": [255, 255, 255]}.items()
    opaque = left_edges(nodes, contents="catalogue/subjects/cup.png", background="style")
    assert set(map(tuple, opaque.values())) == {(255, 0, 51)}


def test_a_picture_without_alpha_takes_memory_once_on_every_background(nodes, folders):
    cut_out(folders[0] / "subjects", "cut")
    contents, _, _, names, *_ = loaded(nodes, background="style")
    contents = dict(zip(names, contents, strict=True))
    assert contents["cup__ink"] is contents["cup__oil"]
    assert contents["cut__ink"] is not contents["cut__oil"]


def test_cut_outs_on_the_colours_of_many_styles_come_in_as_many_runs_as_the_disk_needs(nodes, folders, monkeypatch):
    cut_out(folders[0] / "subjects", "cut")
    monkeypatch.setattr(nodes.catalogue, "disk_usage", lambda folder: SimpleNamespace(free=2 * 20 * 10 * 16))
    *_, names, report, _ = loaded(nodes, contents="catalogue/subjects/cut.png", background="style")
    assert names == ["cut__ink"] and "1 pairs come in the next run" in report


def test_a_damaged_content_picture_is_listed_once_whatever_it_lies_on(nodes, folders):
    (folders[0] / "subjects" / "bad.png").write_bytes(b"")
    for _ in range(2):
        *_, names, report, _ = loaded(nodes, background="style")
        assert len(names) == 4 and report.count("bad.png is empty") == 1


def test_a_background_that_is_no_colour_is_refused(nodes, folders):
    with pytest.raises(ValueError, match="background is 'whiet', which is no colour"):
        loaded(nodes, background="whiet")


def test_a_result_with_alpha_is_saved_with_it(nodes, folders):
    images = torch.rand(1, 16, 24, 4).mul(255).round().div(255)
    nodes.CatalogSave.execute(images=images, job=load(nodes)[2][0])
    with Image.open(folders[1] / "cat" / "cup__ink.png") as saved:
        assert saved.mode == "RGBA"
        assert list(saved.tobytes()) == images.mul(255).round().byte().flatten().tolist()


def test_a_batch_is_saved_whole(nodes, folders):
    _, output = folders
    job = load(nodes)[2][0]
    nodes.CatalogSave.execute(images=torch.rand(3, 8, 8, 3), job=job)
    result = ResultsSheet(output / "cat" / "results.csv").read()["cup__ink"]
    assert result.files == "cup__ink.png;cup__ink_2.png;cup__ink_3.png"
    assert result.is_done(job.key, output / "cat")


@pytest.mark.parametrize("order", [("cup__ink", "cup__ink_2"), ("cup__ink_2", "cup__ink")])
def test_a_batch_overwrites_no_result_of_another_pair(nodes, folders, order):
    root, output = folders
    shutil.copy(root / "styles" / "oil.png", root / "styles" / "ink_2.png")
    jobs = {job.name: job for job in load(nodes)[2]}
    for name in order:
        nodes.CatalogSave.execute(images=torch.rand(3, 8, 8, 3), job=jobs[name])
    results = ResultsSheet(output / "cat" / "results.csv").read()
    files = [file for name in order for file in results[name].files.split(";")]
    assert len(set(files)) == 6 and set(names(nodes)).isdisjoint(order)
    nodes.CatalogSave.execute(images=torch.rand(3, 8, 8, 3), job=jobs[order[0]])  # its own it may replace
    assert ResultsSheet(output / "cat" / "results.csv").read()[order[0]].files == results[order[0]].files


def test_a_batch_takes_no_name_that_differs_from_another_pairs_in_case_alone(tmp_path):
    job = CatalogueJob("cup__ink", "key", "cup.png", "ink.png", tmp_path, (8, 8))
    others = {"CUP__INK_2": Entry("", "CUP__INK_2.png", "")}
    assert [path.name for path in free_paths(job, others, ".png", 2)] == ["cup__ink.png", "cup__ink_3.png"]


NAMES = ["a;b", "=1+2", "cafe\u0301", " spaces ", "x" * 230, "-cup", "100%", "{style}", "\u00a0cup"]


@pytest.mark.parametrize("pattern", ["{content}__{style}", "", "{content} ", "{style};{content}", "\u00e9/{content}"])
def test_whatever_its_name_is_a_pair_is_made_once(nodes, folders, pattern):
    root, output = folders
    for name in NAMES:
        shutil.copy(root / "subjects" / "cup.png", root / "subjects" / f"{name}.png")
    for job in load(nodes, name=pattern, styles="catalogue/styles/ink.png")[2]:
        save(nodes, job)
    assert "Everything is done" in load(nodes, name=pattern, styles="catalogue/styles/ink.png")[4]


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_a_damaged_picture_whose_name_is_no_utf_8_does_not_stop_its_catalogue(nodes, folders):
    root, output = folders
    (root / "subjects" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"damaged")
    shutil.copy(root / "subjects" / "cup.png", root / "subjects" / os.fsdecode(b"th\xe9.png"))
    for _ in range(2):  # the second time with the sheet as the first has left it
        *_, jobs, found, report = load(nodes, styles="catalogue/styles/ink.png\n\ud83d")
        assert len(found) == 3 and report.encode()
        assert "- catalogue/subjects/caf\\udce9.png: caf\\udce9.png is no picture of a known kind." in report
        results = ResultsSheet(output / "cat" / "results.csv")
        assert sorted(results.read()) == ["\\ud83d", "catalogue/subjects/caf\\udce9.png"]
    for job in jobs:
        save(nodes, job)
    assert results.read()[jobs[-1].name].content == "th\\udce9.png"


@pytest.fixture
def large(nodes, folders):
    """300 content and 300 style images of which every pair is done but the last."""
    root, output = folders
    for side in ("subjects", "styles"):
        shutil.rmtree(root / side)
        (root / side).mkdir()
        for number in range(300):
            Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(root / side / f"photo {number}.png")
    plan = nodes.catalogue.make_plan("catalogue/subjects", "catalogue/styles", "cat", "")
    *made, _ = plan.pair_up()
    plan.folder.mkdir(parents=True)
    for pair in made:
        os.close(os.open(plan.folder / f"{pair.name}.png", os.O_CREAT))
    digests, facts = {path: picture_digest(path) for path in plan.pictures}, dict(content_adapter=100 * "x", seed=2**60)
    plan.sheet.record(
        Result(
            pair.name,
            digests_key(map(digests.get, pair[1:])),
            pair.content.name,
            pair.style.name,
            f"{pair.name}.png",
            **facts,
        )
        for pair in made
    )
    return plan.sheet


def test_a_run_of_a_large_catalogue_opens_its_own_pair_and_parses_no_sheet(nodes, large, monkeypatch):
    opened = []
    monkeypatch.setattr(pictures, "open_cut_out", lambda path: opened.append(path.name) or open_cut_out(path))
    monkeypatch.setattr(tables, "parsed_table", None)
    fingerprint(nodes)
    (*_, (job,), _, report) = load(nodes, run=nodes.catalogue.ONE, index=89_999)
    save(nodes, job)
    assert opened == [job.style, job.content]
    assert report.splitlines()[1] == "89999 of 90000 pairs are done."
    assert "Everything is done" in load(nodes)[4]


def test_pictures_of_what_is_done_are_not_opened(nodes, folders, monkeypatch):
    for job in load(nodes)[2]:
        save(nodes, job)
    monkeypatch.setattr(pictures, "open_cut_out", None)
    assert "Everything is done" in load(nodes)[4]


def test_all_pairs_together_hold_little_memory(nodes, folders):
    root, _ = folders
    for name in ("subjects/cup", "subjects/pot", "styles/ink", "styles/oil"):
        Image.new("RGB", (4000, 3000), (255, 0, 51)).save(root / f"{name}.png")
    before = psutil.Process().memory_info().rss
    contents, styles, *_ = load(nodes)
    grown = psutil.Process().memory_info().rss - before
    assert grown < 576e6 / 2, grown  # four pictures in fp32 are 576 MB; malloc may keep one's 8-bit copies, 100 MB
    assert contents[3].shape == (1, 3000, 4000, 3) and contents[3][0, -1, -1].tolist() == pytest.approx([1, 0, 0.2])
    contents[3].mul_(0.5)
    assert styles[3][0, 0, 0].tolist() == pytest.approx([1, 0, 0.2])


def test_all_pairs_come_in_as_many_runs_as_the_disk_needs(nodes, folders, monkeypatch):
    monkeypatch.setattr(nodes.catalogue, "disk_usage", lambda folder: SimpleNamespace(free=2 * 40 * 20 * 12))
    (*_, jobs, found, report) = load(nodes)
    assert found == ["cup__ink"]
    assert "3 pairs come in the next run" in report
    save(nodes, jobs[0])
    assert names(nodes) == ["cup__oil"]


def test_of_two_servers_at_one_pair_the_later_saves_over_nothing_that_a_person_has_decided_about(nodes, folders):
    _, output = folders
    job = load(nodes)[2][0]
    sheet = ResultsSheet(output / "cat" / "results.csv")
    save(nodes, job)
    save(nodes, job)  # until then the later one counts
    (shown, *_) = describe_results(sheet)
    decide(sheet, job.name, shown["version"], Verdict("accepted", "", "editor"))
    before = sheet.path.read_bytes(), (output / "cat" / "cup__ink.png").read_bytes()
    with pytest.raises(ValueError, match="Another ComfyUI has made cup__ink meanwhile"):
        save(nodes, job)
    assert (sheet.path.read_bytes(), (output / "cat" / "cup__ink.png").read_bytes()) == before
    (output / "cat" / "cup__ink.png").unlink()
    save(nodes, job)
    assert sheet.read()["cup__ink"].decision == ""


@pytest.mark.skipif(os.name == "nt", reason="the limit is one of Unix")
def test_a_disk_that_has_no_room_for_the_opened_pictures_is_named(nodes, folders, pack):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ValueError, match=f"File too large: '{pack.host.paths.temp_folder()}'. Free some space"):
            load(nodes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_waiting_for_the_sheet_of_results_is_cancelled(nodes, folders, comfy):
    import comfy.model_management as management

    _, output = folders
    job = load(nodes)[2][0]
    job.folder.mkdir(parents=True)
    management.interrupt_current_processing()
    with FileLock(output / "cat" / "results.csv.lock"), pytest.raises(management.InterruptProcessingException):
        save(nodes, job)


def test_opening_the_pictures_of_a_large_catalogue_is_cancelled(nodes, folders, comfy, monkeypatch):
    import comfy.model_management as management

    opened, decode = [], nodes.catalogue.decode

    def cancelling(*args, **kwargs):
        opened.append(args)
        management.interrupt_current_processing()
        return decode(*args, **kwargs)

    monkeypatch.setattr(nodes.catalogue, "decode", cancelling)
    with pytest.raises(management.InterruptProcessingException):
        load(nodes)
    assert len(opened) == 2  # the first pair


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(0, 8, 8, 3), "images holds no picture"),
        (torch.zeros(1, 0, 8, 3), "images holds no picture"),
        (torch.zeros(8, 8, 3), r"images has shape \(8, 8, 3\)"),
        (torch.zeros(1, 8, 8, 2), r"images has shape \(1, 8, 8, 2\)"),
        (torch.full((1, 8, 8, 3), float("inf")), "not numbers"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(nodes, folders, images, words):
    with pytest.raises(ValueError, match=words):
        nodes.CatalogSave.execute(images=images, job=load(nodes)[2][0])


@pytest.mark.parametrize("size", ["as made", "as the photo"])
@pytest.mark.parametrize(("format", "suffix"), FORMATS.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_pictures_of_every_kind_are_saved(nodes, folders, format, suffix, dtype, size):
    job = load(nodes)[2][0]
    for shape in [(1, 1, 1, 3), (1, 8, 8, 1), (1, 8, 8, 4)]:  # one pixel, grey, alpha
        images = torch.full(shape, 0.2, dtype=dtype)
        images[..., 3:] = 1
        for bits in "8", "16":
            nodes.CatalogSave.execute(images=images, job=job, format=format, bits=bits, size=size)
            shown = open_picture(folders[1] / "cat" / f"cup__ink{suffix}")
            assert shown.size == ((40, 20) if size == "as the photo" else shape[2:0:-1])
            assert all(abs(value - 51) <= 1 for value in shown.getpixel((0, 0)))


def test_settings_are_those_of_the_nearest_node_before(pack):
    graph = {
        "1": {"inputs": {"seed": 1, "steps": 1500, "rank": 4}},
        "2": {"inputs": {"content": ["1", 0], "seed": 2, "steps": 20, "cfg": ["4", 0], "content_strength": True}},
        "3": {"inputs": {"samples": ["2", 0], "vae": ["gone", 0]}},
        "4": {"inputs": {"cfg": 7.5, "again": ["2", 0]}},
        "5": {"inputs": {"images": ["3", 0], "seed": 9}},
    }
    hidden = type("Hidden", (), {"prompt": graph, "unique_id": "5"})
    found = pack.host.prompt_graph.numbers_behind(hidden, "images", SETTINGS)
    assert found == {"seed": 2, "steps": 20, "cfg": 7.5}
    assert pack.host.prompt_graph.numbers_behind(None, "images", {"seed"}) == {}


def test_a_setting_that_comes_through_a_link_is_not_another_nodes(pack):
    graph = {
        "train": {"inputs": {"seed": 1, "steps": 1500}},
        "number": {"inputs": {"value": 42}},
        "code": {"inputs": {"text": "30"}},
        "sampler": {"inputs": {"content": ["train", 0], "seed": ["number", 0], "steps": ["code", 0]}},
        "save": {"inputs": {"images": ["sampler", 0]}},
    }
    hidden = type("Hidden", (), {"prompt": graph, "unique_id": "save"})
    assert pack.host.prompt_graph.numbers_behind(hidden, "images", SETTINGS) == {"seed": 42}


def test_a_picture_of_no_numbers_is_refused_and_not_done(nodes, folders):
    _, output = folders
    job = load(nodes)[2][0]
    with pytest.raises(ValueError, match="not numbers"):
        nodes.CatalogSave.execute(images=torch.full((1, 8, 8, 3), float("nan")), job=job)
    assert len(names(nodes)) == 4


@pytest.mark.parametrize(
    ("fails", "error", "words"),
    [
        ("os.fsync", OSError(28, "No space left on device"), "No space left on device. Free some space"),
        (
            "pathlib.Path.write_bytes",
            PermissionError(13, "Permission denied"),
            "Permission denied. .* make the folder writable",
        ),
    ],
    ids=["full disk", "read-only folder"],
)
@pytest.mark.parametrize("format", FORMATS)
def test_errors_of_the_disk_are_reported_and_leave_no_half_file(
    nodes, folders, monkeypatch, fails, error, words, format
):
    def refuse(*_, **__):
        raise error

    job = load(nodes)[2][0]
    monkeypatch.setattr(fails, refuse)
    with pytest.raises(ValueError, match=f"cup__ink could not be saved .*{words}"):
        save(nodes, job, format=format)
    assert not [path for path in job.folder.rglob("*") if path.suffix != ".lock"]


def in_a_file(folder):
    folder.parent.mkdir()
    folder.write_text("no folder")


def a_link_to_itself(folder):
    folder.parent.mkdir()
    folder.symlink_to(folder.name)


def lock_is_a_folder(folder):
    (folder / "results.csv.lock").mkdir(parents=True)


@pytest.mark.skipif(os.name == "nt", reason="links are for administrators there")
@pytest.mark.parametrize("fault", [in_a_file, a_link_to_itself, lock_is_a_folder])
def test_a_folder_that_cannot_take_the_results_is_reported_before_anything_is_made(nodes, folders, fault):
    root, output = folders
    fault(output / "cat")
    (root / "subjects" / "bad.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="The catalogue in .*cat cannot be made: .* then queue again.$"):
        load(nodes)


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_no_name_ends_the_servers_queue(server):
    """Of a file that is no UTF-8, and half a character in each text of the node."""
    folder = server.base / "input" / "names"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / os.fsdecode(b"th\xe9.png"))
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"damaged")
    inputs = dict(contents="names\n\ud83d", styles="names\n\ud83d", catalogue="names", name="", run="one pair per run")
    prompt = {
        "load": {"class_type": "ConsisLoRACatalogLoad", "inputs": {**inputs, "index": 0}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["load", 4]}},
    }
    (report,) = server.run(prompt)["outputs"]["show"]["text"]
    assert (
        "- names/caf\\udce9.png: caf\\udce9.png is no picture" in report
        and "- \\ud83d: '\\ud83d' is not a name" in report
    )
    for name in ("catalogue", "name"):
        prompt["load"]["inputs"] |= {**inputs, name: "\ud83d", "index": 3}
        with pytest.raises(WorkflowError, match=r"'\\ud83d\S*' is not a name inside the folder"):
            server.run(prompt)
    prompt["load"]["inputs"] |= {**inputs, "index": 3}
    assert "Now: th___th_." in server.run(prompt)["outputs"]["show"]["text"][0]


def test_the_shared_workflow_makes_the_catalogue_once(server):
    """With a file that is not a picture, and a content image that is not square."""
    root, output = server.base / "input" / "shop", server.base / "output" / "shop"
    for folder in ("subjects", "styles"):
        (root / folder).mkdir(parents=True)
    Image.open(IMAGES / "crown-flat.png").crop((0, 0, 128, 64)).save(root / "subjects" / "crown.png")
    shutil.copy(IMAGES / "umbrella-high-contrast.png", root / "styles" / "ink.png")
    (root / "subjects" / "bad.png").write_bytes(b"")
    prompt = json.loads((ROOT / "workflows" / "api" / "catalogue_demo.json").read_text(encoding="utf-8"))
    changes = {"contents": "shop/subjects", "styles": "shop/styles", "catalogue": "shop", "run": "all pairs in one run"}
    changes |= {"steps": 2, "transition_step": 1, "rank": 4, "style_strength": 0.75, "seed": 5}
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in changes.items() if name in node["inputs"]}
    (picture,) = server.images(server.run(prompt))
    assert picture == output / "crown__ink.png"
    with Image.open(picture) as image:
        assert image.size == (128, 64)  # the photo's
        assert json.loads(image.text["prompt"]).keys() == prompt.keys()
        assert str(server.base) not in image.text["prompt"]  # what is shared tells nothing of the machine
        assert json.loads(image.text["consislora"])["style_lora"]["consislora.stage"] == "style"
    results = ResultsSheet(output / "results.csv").read()
    made = results["crown__ink"]
    assert (made.steps, made.style_strength, made.seed) == (2, 0.75, 5)
    assert (made.content, made.style) == ("crown.png", "ink.png")
    assert made.content_adapter.startswith("stage image, image_hash ")
    assert results["shop/subjects/bad.png"].error == "bad.png is empty (0 bytes). Copy it again."
    assert server.images(server.run(prompt)) == []
    assert "Everything is done" not in server.log  # the bad one is not
    assert ResultsSheet(output / "results.csv").read() == results


def test_every_result_has_its_photos_shape_and_size_through_the_shared_workflow(server):
    """Odd sizes: a portrait on its side, a panorama in grey, and a photo of a few pixels in CMYK."""
    root = server.base / "input" / "sizes"
    (root / "styles").mkdir(parents=True)
    (root / "subjects").mkdir()
    shutil.copy(IMAGES / "umbrella-high-contrast.png", root / "styles" / "ink.png")
    crown, turned = Image.open(IMAGES / "crown-flat.png").convert("RGB"), Image.Exif()
    turned[0x0112] = 6
    photos = {"portrait": (101, 177), "panorama": (1003, 97), "tiny": (5, 3)}
    crown.resize((177, 101)).save(root / "subjects" / "portrait.jpg", exif=turned)
    crown.resize((1003, 97)).convert("L").save(root / "subjects" / "panorama.png")
    crown.resize((5, 3)).convert("CMYK").save(root / "subjects" / "tiny.jpg")
    prompt = json.loads((ROOT / "workflows" / "api" / "catalogue_demo.json").read_text(encoding="utf-8"))
    changes = {"contents": "sizes/subjects", "styles": "sizes/styles", "catalogue": "sizes", "bits": "16"}
    changes |= {"run": "all pairs in one run", "steps": 2, "transition_step": 1, "rank": 4, "recolourings": 1}
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in changes.items() if name in node["inputs"]}
    server.run(prompt)
    for name, size in photos.items():
        with Image.open(server.base / "output" / "sizes" / f"{name}__ink.png") as picture:
            assert picture.size == size
    (save,) = (node for node in prompt.values() if node["class_type"] == "ConsisLoRACatalogSave")
    save["inputs"] |= {"size": "as made", "format": "TIFF"}
    shutil.rmtree(server.base / "output" / "sizes")
    server.run(prompt)
    for name, size in photos.items():
        with Image.open(server.base / "output" / "sizes" / f"{name}__ink.tif") as picture:
            assert picture.size == latent_size(size, 256)
