"""Decisions in the sheet of results, retries, and the summary, without a server."""

import csv
import hashlib
import json
import math
import os
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from images import write_png
from PIL import Image

from catalogue import handover
from catalogue.handover import copy_accepted
from catalogue.pictures import picture_key
from catalogue.retry import embedded_workflow, find_sources, retry_workflow, sources_of
from catalogue.review import (
    Changed,
    Verdict,
    changed_results,
    decide,
    describe_results,
    find_catalogues,
    gate_verdict,
    mean_scores,
    newer_decisions,
    open_catalogue,
    read_results,
)
from catalogue.sheets import RESULTS, Result, ResultsSheet
from catalogue.summary import summarise, summary_text
from catalogue.tables import read_table
from consislora_core.files import write_file

YES = Verdict("accepted", "", "editor")
LOAD = {"contents": "shop", "styles": "styles", "catalogue": "old", "name": "{content}", "run": "all", "index": 5}
WORKFLOW = {
    "load": {"class_type": "ConsisLoRACatalogLoad", "inputs": LOAD, "is_changed": ["before"]},
    "train": {"class_type": "ConsisLoRATrainImage", "inputs": {"latent": ["load", 0], "rank": 4, "seed": 1}},
    "sampler": {"class_type": "KSampler", "inputs": {"seed": 2, "content": ["train", 0]}},
    "save": {"class_type": "ConsisLoRACatalogSave", "inputs": {"images": ["sampler", 0], "job": ["load", 2]}},
}


@pytest.fixture
def sheet(tmp_path) -> ResultsSheet:
    sheet = ResultsSheet(tmp_path / "output" / "cat" / RESULTS)
    save(sheet, Result("cup", "k1", files="cup.png"))
    return sheet


def save(sheet: ResultsSheet, *results: Result, workflow: dict = WORKFLOW, colour: str = "red") -> None:
    for result in results:
        path = sheet.path.parent / result.files
        write_png(Image.new("RGB", (8, 8), colour), path, workflow)
    sheet.record(results)


def changed_in(sheet: ResultsSheet) -> set[str]:
    return changed_results(sheet.path.parent, sheet.read().values())


def version(sheet: ResultsSheet, name: str = "cup") -> str:
    return next(row["version"] for row in describe_results(sheet) if row["name"] == name)


def test_a_decision_stands_beside_the_gates_verdict_with_who_when_and_of_which_bytes(sheet):
    save(sheet, Result("cup", "k1", files="cup.png", accepted="no", reason="1: too far"))
    decide(sheet, "cup", version(sheet), Verdict("rejected", "wrong\n colours ", " editor "))
    row = sheet.read()["cup"]
    assert (row.accepted, row.reason) == ("no", "1: too far")
    assert (row.decision, row.decision_reason, row.decided_by) == ("rejected", "wrong colours", "editor")
    assert row.decided_at.endswith("+00:00") and len(row.decided_pictures) == 64


def test_its_columns_come_last_and_other_writers_keep_them(sheet):
    decide(sheet, "cup", version(sheet), YES)
    sheet.record([Result("pot", "k2")])
    assert sheet.read()["cup"].decision == "accepted"
    (header, *_) = csv.reader(sheet.path.read_text("utf-8-sig").splitlines())
    columns = ["decision", "decision_reason", "decided_by", "decided_at", "decided_pictures", "retry_of"]
    assert header[-6:] == columns


def test_a_picture_made_anew_has_no_decision(sheet):
    decide(sheet, "cup", version(sheet), YES)
    save(sheet, Result("cup", "k1", files="cup.png"), colour="blue")
    assert sheet.read()["cup"].decision == sheet.read()["cup"].decided_at == ""


@pytest.mark.parametrize("change", ["picture", "decision", "deleted", "forgotten"])
def test_nobody_decides_about_what_they_have_not_seen(sheet, change):
    seen = version(sheet)
    if change == "picture":
        save(sheet, Result("cup", "k1", files="cup.png"), colour="blue")
    elif change == "decision":
        decide(sheet, "cup", seen, Verdict("rejected", "dark", "another"))
    elif change == "deleted":
        (sheet.path.parent / "cup.png").unlink()
    else:
        sheet.record([], forget=["cup"])
    before = sheet.path.read_bytes()
    with pytest.raises(Changed):
        decide(sheet, "cup", seen, YES)
    assert sheet.path.read_bytes() == before


def test_two_decisions_within_a_tick_of_the_file_systems_clock_are_both_seen(sheet):
    """A memory card's lasts two seconds."""
    for verdict in (YES, Verdict("rejected", "", "editor")):
        decide(sheet, "cup", version(sheet), verdict)
        os.utime(sheet.path, (1_000_000_000, 1_000_000_000))
        assert read_results(sheet)["cup"].decision == verdict.decision


def test_after_the_clock_was_set_back_a_later_decision_is_still_later(sheet):
    with sheet.edited() as records:
        records["cup"] |= {"decision": "accepted", "decided_at": "2999-01-01T00:00:00.000+00:00"}
    before = sheet.read()
    decide(sheet, "cup", version(sheet), Verdict("rejected", "", "editor"))
    assert newer_decisions(before, sheet.read())["cup"]["decision"] == "rejected"


def test_a_decision_that_is_taken_back_says_who_did(sheet):
    after = decide(sheet, "cup", version(sheet), YES)
    decide(sheet, "cup", after, Verdict("", "", "another"))
    row = sheet.read()["cup"]
    assert (row.decision, row.decided_by, row.decided_pictures) == ("", "another", "") and row.decided_at


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@a", "'=1", "<b>", 'a"b,c;d', "\ud800"])
def test_no_reason_or_name_is_a_formula_and_each_comes_back(sheet, text):
    decide(sheet, "cup", version(sheet), Verdict("rejected", text, text))
    row = sheet.read()["cup"]
    assert row.decision_reason == row.decided_by == (text if text != "\ud800" else r"\ud800")
    (cells,) = csv.DictReader(sheet.path.read_text("utf-8-sig").splitlines())
    assert not cells["decision_reason"].startswith(("=", "@", "-", "+"))


def test_many_who_decide_while_a_batch_writes_lose_nothing(sheet):
    names = [f"r{number}" for number in range(8)]
    save(sheet, *(Result(name, "k", files=f"{name}.png") for name in names))
    seen = {name: version(sheet, name) for name in names}
    threads = [threading.Thread(target=decide, args=(sheet, name, seen[name], YES)) for name in names]
    threads += [threading.Thread(target=sheet.record, args=([Result(f"new {name}")],)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = sheet.read()
    assert {name for name in results if results[name].decision} == set(names)
    assert len(results) == 17


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_picture_that_was_saved_over_waits_for_another_decision(sheet, keeps_time):
    decide(sheet, "cup", version(sheet), YES)
    path, before = sheet.path.parent / "cup.png", sheet.path.read_bytes()
    assert changed_in(sheet) == set()
    touch(path, path.stat().st_mtime + 3600)  # the same bytes
    assert changed_in(sheet) == set()
    Image.new("RGB", (8, 8), "blue").save(path)
    if keeps_time:  # as a copy that brings its time along
        touch(path, path.stat().st_mtime - 86_400)
    assert changed_in(sheet) == {"cup"}
    (row,) = describe_results(sheet, {"cup"})
    assert row["changed"] and row["decision"] == "accepted"
    assert sheet.path.read_bytes() == before
    summary = summarise(sheet.read().values(), {"cup"})
    assert (summary["undecided"], summary["accepted_at_first_try"], summary["decided_by"]) == (1, 0, {})
    assert "undecided again" in summary_text(summary)
    decide(sheet, "cup", version(sheet), YES)
    assert changed_in(sheet) == set()


def test_a_copy_that_kept_an_older_time_is_seen_where_the_system_does_not_tell_when_it_was_made(sheet):
    """As on Windows; here the decision lies in the future instead."""
    now = datetime.now(timezone.utc)
    save(sheet, Result("cup", "k1", files="cup.png", finished=now.isoformat()))
    decide(sheet, "cup", version(sheet), YES)
    with sheet.edited() as records:
        records["cup"]["decided_at"] = (now + timedelta(hours=1)).isoformat()
    path = sheet.path.parent / "cup.png"
    Image.new("RGB", (8, 8), "blue").save(path)
    assert changed_in(sheet) == set()  # of a file from between the two the bytes are not read
    touch(path, now.timestamp() - 86_400)
    assert changed_in(sheet) == {"cup"}


def touch(path, moment: float) -> None:
    os.utime(path, (moment, moment))


@pytest.mark.parametrize("moment", ["27.11.2026 10:00", "2026-11-27", ""])
def test_a_time_that_a_spreadsheet_has_rewritten_hides_no_change(sheet, moment):
    decide(sheet, "cup", version(sheet), YES)
    with sheet.edited() as records:
        records["cup"]["decided_at"] = moment
    assert changed_in(sheet) == set()
    Image.new("RGB", (8, 8), "blue").save(sheet.path.parent / "cup.png")
    assert changed_in(sheet) == {"cup"}


@pytest.mark.skipif(os.name == "nt", reason="links are for administrators there")
def test_catalogues_are_found_by_their_sheets_inside_the_output_folder_alone(sheet, tmp_path):
    output = tmp_path / "output"
    ResultsSheet(output / "batch" / "jobs 10" / RESULTS).record([Result("a")])
    ResultsSheet(output / "batch" / "jobs 2" / RESULTS).record([Result("a")])
    ResultsSheet(tmp_path / "elsewhere" / RESULTS).record([Result("a")])
    (output / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert find_catalogues(output) == ["batch/jobs 2", "batch/jobs 10", "cat"]
    with pytest.raises(ValueError, match="through a link"):
        open_catalogue(output, "link")


@pytest.mark.parametrize(
    ("accepted", "reason", "verdict"),
    [("", "", ""), ("yes", "", "accepted"), ("no", "", "rejected"), ("", "1: accepted", "accepted")]
    + [("", "1: accepted\n2: edges 0.1 is below 0.3", "rejected"), ("", "too far", "rejected")],
)
def test_the_gates_verdict_is_read_from_either_output(accepted, reason, verdict):
    assert gate_verdict(Result("a", accepted=accepted, reason=reason)) == verdict


def test_scores_are_those_of_evaluate_or_none():
    assert mean_scores('{"mean": {"edges": 0.5, "style": NaN}, "pictures": []}') == {"edges": 0.5}
    for text in ("", "content 0.9", "[]", '{"mean": 7}', '{"mean": {"a": "b"}}', "[" * 10_000):
        assert mean_scores(text) == {}


def test_the_less_leakage_a_result_has_the_higher_is_its_score(sheet):
    save(sheet, Result("cup", "k1", files="cup.png", scores='{"mean": {"content": 0.9, "leakage": 0.3}}'))
    (row,) = describe_results(sheet)
    assert row["score"] == pytest.approx(0.8)


def test_a_decision_that_somebody_wrote_into_the_sheet_is_of_the_pictures_that_are_there(sheet):
    with sheet.edited() as records:
        records["cup"]["decision"] = "accepted"
    assert changed_in(sheet) == set()


# Again


@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "input"
    for name, colour in {"shop/cup.png": "red", "other/cup.png": "blue", "styles/ink.png": "black"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), colour).save(root / name)
    return root


def result(root, content: str, **changes) -> Result:
    key = picture_key(root / content, root / "styles/ink.png")
    return Result("cup__ink", key, "cup.png", "ink.png", "cup.png", **changes)


def test_a_retry_differs_in_seed_and_name_alone(sheet, sources):
    picture = sheet.path.parent / "cup.png"
    made = retry_workflow(sources, "cat", picture, result(sources, "shop/cup.png"))
    prompt, seed = made["prompt"], made["prompt"]["sampler"]["inputs"]["seed"]
    load = {"contents": "shop/cup.png", "styles": "styles/ink.png", "catalogue": "cat", "index": 0}
    load |= {"name": f"cup__ink_seed{seed}", "run": "one pair per run"}
    assert prompt["load"]["inputs"] == load and "is_changed" not in prompt["load"]
    assert {name: prompt[name] for name in ("train", "save")} == {name: WORKFLOW[name] for name in ("train", "save")}
    assert seed != 2 and made["extra_data"]["extra_pnginfo"] == {"consislora_retry_of": "cup__ink"}
    again = retry_workflow(sources, "cat", picture, result(sources, "shop/cup.png", retry_of="first"))
    assert again["extra_data"]["extra_pnginfo"] == {"consislora_retry_of": "first"}


def test_of_two_files_of_one_name_the_one_that_was_used_is_found(sheet, sources):
    for content in ("shop/cup.png", "other/cup.png"):
        workflow = json.loads(json.dumps(WORKFLOW))
        workflow["load"]["inputs"]["contents"] = "shop\nother"
        assert find_sources(sources, workflow, result(sources, content))[0] == sources / content


def test_without_a_workflow_in_the_picture_its_sources_are_found_by_their_names(sheet, sources, tmp_path):
    picture = sheet.path.parent / "cup.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    for content in ("shop/cup.png", "other/cup.png"):
        found = sources_of(sources, picture, result(sources, content))
        assert found == (sources / content, sources / "styles/ink.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (sources / "secret.png").symlink_to(tmp_path / "secret.png")
    for name in ("secret.png", "../output/cat/cup.png", "none.png", ""):
        lured = replace(result(sources, "shop/cup.png"), content=name)
        if name.endswith("cup.png"):  # a name is looked for in the input folder alone
            assert sources_of(sources, picture, lured)[0].is_relative_to(sources)
        else:
            assert sources_of(sources, picture, lured)[0] is None


def test_the_seed_is_that_of_the_first_sampler_not_of_a_training_or_a_second_pass(sheet, sources):
    noise = {
        **WORKFLOW,
        "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}},
        "sampler": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": ["noise", 0], "guider": ["train", 0]}},
        "upscale": {"class_type": "KSampler", "inputs": {"seed": 4, "latent_image": ["sampler", 0]}},
    }
    noise["save"] = {"class_type": "ConsisLoRACatalogSave", "inputs": {"images": ["upscale", 0]}}
    save(sheet, Result("cup", "k1", files="cup.png"), workflow=noise)
    prompt = retry_workflow(sources, "cat", sheet.path.parent / "cup.png", result(sources, "shop/cup.png"))["prompt"]
    assert prompt["noise"]["inputs"]["noise_seed"] != 3
    assert (prompt["upscale"]["inputs"]["seed"], prompt["train"]["inputs"]["seed"]) == (4, 1)


@pytest.mark.parametrize(
    ("workflow", "problem"),
    [
        ({}, "needs exactly one"),
        ({"a": 7}, "has no workflow in it"),
        ({**WORKFLOW, "other": WORKFLOW["load"]}, "has 2 nodes"),
        ({**WORKFLOW, "sampler": {"class_type": "X", "inputs": {"seed": ["load", 0]}}}, "no sampler with a seed"),
        ({**WORKFLOW, "load": {**WORKFLOW["load"], "inputs": {**LOAD, "contents": "none"}}}, "content image is not"),
    ],
)
def test_what_cannot_be_made_again_is_said(sheet, sources, workflow, problem):
    save(sheet, Result("cup", "k1", files="cup.png"), workflow=workflow)
    with pytest.raises(ValueError, match=problem):
        retry_workflow(sources, "cat", sheet.path.parent / "cup.png", result(sources, "shop/cup.png"))


def test_a_workflow_is_also_read_as_comfyui_writes_it_into_webp(tmp_path):
    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(WORKFLOW)}"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    assert embedded_workflow(tmp_path / "a.webp") == WORKFLOW
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="has no workflow in it"):
        embedded_workflow(tmp_path / "a.png")


# Handing over


def accept(sheet: ResultsSheet, name: str) -> None:
    decide(sheet, name, version(sheet, name), YES)


def handed_over(sheet: ResultsSheet) -> dict[str, bytes]:
    """The pictures in the folder by their names there; what its list says of their bytes is true."""
    folder = sheet.path.parent / "accepted"
    pictures = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}
    listed = {row["picture"]: row["sha256"] for _, row in read_table(folder / "accepted.csv")}
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in pictures.items()}
    return pictures


def test_the_accepted_try_is_copied_under_the_plain_name_with_who_accepted_it(sheet):
    folder = sheet.path.parent
    retries = [Result(f"cup_seed{n}", "k1", files=f"cup_seed{n}.png", retry_of="cup") for n in (1, 2, 3)]
    save(sheet, *retries, colour="green")
    save(sheet, Result("shop/pot", "k2", "pot.png", "ink.png", files="shop/pot.png"))
    save(sheet, *(Result(name, "k3", files=f"{name}.png") for name in ("no", "open", "gone", "retouched", "typed")))
    for name in ("cup", "cup_seed2", "cup_seed1", "shop/pot", "gone", "retouched"):  # of the tries, the first one last
        accept(sheet, name)
    decide(sheet, "no", version(sheet, "no"), Verdict("rejected", "dark", "editor"))
    with sheet.edited() as records:
        records["typed"]["decision"] = "accepted"
    (folder / "gone.png").unlink()
    Image.new("RGB", (8, 8), "blue").save(folder / "retouched.png")
    made = copy_accepted(sheet)
    assert handed_over(sheet) == {name: (folder / file).read_bytes() for name, file in
                                  {"cup.png": "cup_seed1.png", "shop/pot.png": "shop/pot.png"}.items()}  # fmt: skip
    reasons = {"rejected": "no", "undecided": "open", "missing": "gone", "changed": "retouched", "unsigned": "typed"}
    assert made == (2, 2, 0, {reason: [name] for reason, name in reasons.items()})
    row = next(row for _, row in read_table(folder / "accepted" / "accepted.csv") if row["picture"] == "shop/pot.png")
    assert (row["content"], row["style"], row["decided_by"]) == ("pot.png", "ink.png", "editor") and row["decided_at"]
    assert copy_accepted(sheet)[:3] == (2, 0, 0)
    assert find_catalogues(folder.parent) == ["cat"]


@pytest.mark.parametrize("change", ["rejected", "changed", "another try", "edited copy"])
def test_what_is_no_longer_accepted_is_set_aside_and_never_lost(sheet, change):
    folder = sheet.path.parent
    accept(sheet, "cup")
    copy_accepted(sheet)
    (folder / "accepted" / "notes.txt").write_text("mine")
    data = before = (folder / "cup.png").read_bytes()
    if change == "rejected":
        decide(sheet, "cup", version(sheet), Verdict("rejected", "dark", "editor"))
    elif change == "changed":
        Image.new("RGB", (8, 8), "blue").save(folder / "cup.png")
    elif change == "another try":
        save(sheet, Result("cup_seed1", "k1", files="cup_seed1.png", retry_of="cup"), colour="green")
        accept(sheet, "cup_seed1")
    else:
        data = b"retouched"
        (folder / "accepted" / "cup.png").write_bytes(data)
    for _ in range(2):  # the second time there is nothing left to do
        copy_accepted(sheet)
    stays = {"another try": folder / "cup_seed1.png", "edited copy": folder / "cup.png"}.get(change)
    assert handed_over(sheet) == ({"cup.png": stays.read_bytes()} if stays else {})
    (aside,) = (folder / "accepted_earlier").rglob("*.png")
    assert aside.name == "cup.png" and aside.read_bytes() == data
    assert (folder / "accepted" / "notes.txt").read_text() == "mine"
    assert change == "changed" or (folder / "cup.png").read_bytes() == before


def test_a_copy_that_breaks_off_is_known_the_next_time(sheet, monkeypatch):
    save(sheet, Result("pot", "k2", files="pot.png"))
    for name in ("cup", "pot"):
        accept(sheet, name)
    monkeypatch.setattr(handover, "write_file", full_after(1))
    with pytest.raises(OSError, match="full"):
        copy_accepted(sheet)
    monkeypatch.undo()
    decide(sheet, "cup", version(sheet), Verdict("rejected", "dark", "editor"))
    assert copy_accepted(sheet)[:3] == (1, 1, 1)
    assert handed_over(sheet).keys() == {"pot.png"}


def full_after(count: int):
    """`write_file` on a disk that is full after some files."""
    left = iter(range(count))

    def write(path, data):
        if next(left, None) is None:
            raise OSError("the disk is full")
        write_file(path, data)

    return write


def test_results_of_several_pictures_keep_their_numbers_and_take_no_other_name(sheet):
    for file in ("cup_seed1_2.png", "cup_seed1_3.png"):
        write_png(Image.new("RGB", (8, 8), "green"), sheet.path.parent / file, WORKFLOW)
    files = "cup_seed1.png;cup_seed1_2.png;cup_seed1_3.png"
    (sheet.path.parent / "cup_seed1.png").write_bytes((sheet.path.parent / "cup.png").read_bytes())
    sheet.record([Result("cup_seed1", "k1", files=files, retry_of="cup")])
    save(sheet, Result("Cup_2", "k2", files="Cup_2.png"), Result("../x", "k3", files="x.png"))
    for name in ("Cup_2", "cup_seed1", "../x"):
        accept(sheet, name)
    copy_accepted(sheet)
    assert handed_over(sheet).keys() == {"cup.png", "cup_2.png", "cup_3.png", "Cup_2_2.png", "x.png"}


def test_a_folder_with_results_in_it_is_not_taken(sheet):
    save(sheet, Result("accepted/pot", "k2", files="accepted/pot.png"))
    accept(sheet, "accepted/pot")
    with pytest.raises(ValueError, match="results of its own"):
        copy_accepted(sheet)


# The summary


def tries(decisions: str) -> list[Result]:
    """First tries and, after a letter, its retries: a accepted, r rejected, u undecided; a space begins the next."""
    long = {"a": "accepted", "r": "rejected", "u": ""}
    found = []
    for number, group in enumerate(decisions.split()):
        for again, letter in enumerate(group):
            reason = "dark" if letter == "r" else ""
            facts = dict(decision=long[letter], decision_reason=reason, retry_of=f"{number}0" if again else "")
            loras = dict(content_adapter="C", style_adapter=f"S{number % 2}")
            found.append(Result(f"{number}{again}", files="x.png", seconds=2, **facts, **loras))
    return found


def test_a_summary_counts_each_wanted_picture_once():
    summary = summarise([*tries("a ra rra rr u ru ua au r"), Result("bad", error="is damaged")])
    assert summary["wanted"] == 9 and summary["pictures_made"] == 16 and summary["failed"] == 1
    states = ("accepted_at_first_try", "accepted_after_retries", "rejected", "undecided")
    assert [summary[state] for state in states] == [2, 3, 2, 2]
    assert sum(summary[state] for state in states) == summary["wanted"]
    assert summary["rejected_for"] == {"dark": 7}
    assert (summary["seconds"], summary["seconds_a_picture"], summary["pictures_without_time"]) == (32, 2, 0)
    assert (summary["loras"], summary["lora_uses"]) == (3, 32)


def test_a_retry_that_is_accepted_where_the_first_try_failed_is_no_first_try():
    retry = Result("cup_seed1", "k", files="cup_seed1.png", retry_of="cup", decision="accepted")
    summary = summarise([Result("cup", error="out of memory"), retry])
    assert (summary["accepted_at_first_try"], summary["accepted_after_retries"]) == (0, 1)


def test_a_summary_says_nothing_that_it_does_not_know():
    assert summary_text(summarise([Result("a", files="a.png")])) == (
        "1 pictures made of 1 wanted ones: 0 accepted at the first try, 0 after retries, 0 rejected, 1 undecided."
    )
    assert math.isfinite(summarise([])["seconds"])


def test_the_later_of_two_decisions_counts():
    ours = {name: Result(name, decided_at=at) for name, at in {"a": "2026-01-02", "b": "2026-01-02", "c": ""}.items()}
    theirs = {name: Result(name, decision="accepted", decided_at=at) for name, at in
              {"a": "2026-01-03", "b": "2026-01-01", "c": "2026-01-01", "d": "2026-01-01"}.items()}  # fmt: skip
    assert newer_decisions(ours, theirs).keys() == {"a", "c"}
