"""Sheets as they come from artists and spreadsheets."""

import csv
import io
import json
import os
import threading
from dataclasses import replace

import pytest
from filelock import FileLock
from test_pictures import CASES

from catalogue import tables
from catalogue.sheets import Job, Result, ResultsSheet, read_jobs


def sheet(tmp_path, text: str, name: str = "jobs.csv", encoding: str = "utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


# Job sheets

SAME = [
    Job("cup.png", "ink.png", "cup in ink", seed=7, content_strength=0.5),
    Job("cup.png", "oil.png", "cup__oil", prompt='a [c], "big"'),
]


@pytest.mark.parametrize(
    "text",
    [
        "content,style,name,seed,content_strength,prompt\ncup.png,ink.png,cup in ink,7,0.5,\n"
        'cup.png,oil.png,,,,"a [c], ""big"""\n',
        "\ufeffContent;Style;Name;Seed;Content Strength;Prompt\r\ncup.png;ink.png;cup in ink;7;0,5;\r\n;;;;;\r\n"
        'cup.png;oil.png;;;;"a [c], ""big"""',
        "content\tstyle\tname\tseed\tcontent_strength\tprompt\ncup.png\tink.png\tcup in ink\t7\t0.5\n"
        'cup.png\toil.png\t\t\t\t"a [c], ""big"""',
        "sep=|\r\ncontent|style|name|seed|content_strength|prompt\r\ncup.png|ink.png|cup in ink|7|0.5|\r\n"
        'cup.png|oil.png||||"a [c], ""big"""\r\n',
        "\r\n;;;;;\r\ncontent;style;name;seed;content_strength;prompt\r\ncup.png;ink.png;cup in ink;7;0,5;\r\n"
        'cup.png;oil.png;;;;"a [c], ""big"""\r\n',
    ],
    ids=["commas", "as a spreadsheet abroad saves it", "tabs", "with its separator named", "after blank rows"],
)
def test_csv_of_every_kind_is_read(tmp_path, text):
    assert read_jobs(sheet(tmp_path, text)) == SAME


def test_unicode_text_of_a_spreadsheet_is_read(tmp_path):
    text = "content\tstyle\ttitle\r\ncup.png\tink.png\t\u732b\r\n"
    (job,) = read_jobs(sheet(tmp_path, text, "jobs.txt", "utf-16"))
    assert job == Job("cup.png", "ink.png", "cup__ink", title="\u732b")


@pytest.mark.parametrize("written", ["7", "7.0", "7,0", " 7.00 ", "0.7e1", "7E+00", "+7"])
def test_whole_numbers_are_read_as_spreadsheets_write_them(tmp_path, written):
    (job,) = read_jobs(sheet(tmp_path, f"content;style;seed\na;b;{written}"))
    assert job.seed == 7 and type(job.seed) is int


@pytest.mark.parametrize(("written", "seed"), [(7.0, 7), (1e3, 1000), ("1E+03", 1000), ("1.8E+19", 18 * 10**18)])
def test_whole_numbers_are_exact(tmp_path, written, seed):
    (job,) = read_jobs(sheet(tmp_path, json.dumps([{"content": "a", "style": "b", "seed": written}]), "jobs.json"))
    assert job.seed == seed


@pytest.mark.parametrize(
    "written", ["7.5", "1,000", "12,345,678", "nan", "inf", "1e99", "1e999999999", True, [0, [7], 0]]
)
def test_what_is_no_whole_number_or_could_be_two_is_refused(tmp_path, written):
    with pytest.raises(ValueError, match="row 1, column seed: .* is not a whole number, such as 42"):
        read_jobs(sheet(tmp_path, json.dumps([{"content": "a", "style": "b", "seed": written}]), "jobs.json"))


@pytest.mark.parametrize("written", [True, [1], {}, "1.5.2", "inf", 10**400])
def test_what_is_no_number_is_refused(tmp_path, written):
    with pytest.raises(ValueError, match="row 1, column cfg: .* is not a number, such as 0.8"):
        read_jobs(sheet(tmp_path, json.dumps([{"content": "a", "style": "b", "cfg": written}]), "jobs.json"))


def test_a_sheet_that_a_spreadsheet_saved_is_read():
    assert [job.seed for job in read_jobs(CASES / "jobs_spreadsheet.csv")] == [7, None]


@pytest.mark.parametrize(("name", "taken"), [("a;b", "a_b"), ("e\u0301", "\u00e9"), ("a /b", "a/b"), ("=a", "=a")])
def test_names_are_made_to_be_found_again(tmp_path, name, taken):
    (job,) = read_jobs(sheet(tmp_path, json.dumps([{"content": "a", "style": "b", "name": name}]), "jobs.json"))
    assert job.name == taken


def test_json_is_read(tmp_path):
    rows = [
        {"content": "cup.png", "style": "ink.png", "name": "cup in ink", "seed": 7, "content_strength": 0.5},
        {"content": "cup.png", "style": "oil.png", "seed": None, "prompt": 'a [c], "big"'},
    ]
    assert read_jobs(sheet(tmp_path, json.dumps(rows), "jobs.json")) == SAME


def test_a_sheet_that_was_made_on_windows_has_the_same_jobs_on_every_system(tmp_path):
    text = "content,style,style_lora\npics\\cup.png,C:\\styles\\ink.png,consislora\\ink.safetensors"
    (job,) = read_jobs(sheet(tmp_path, text))
    assert job == Job("pics/cup.png", "C:/styles/ink.png", "cup__ink", style_lora="consislora/ink.safetensors")


def test_jobs_without_a_name_get_one_each(tmp_path):
    jobs = read_jobs(
        sheet(tmp_path, "content,style,name\na/x.png,y.png,\nb/X.jpg,y.png,\nx.png,y.png,x__y_3\nx.png,y.png,")
    )
    assert [job.name for job in jobs] == ["x__y", "X__y_2", "x__y_3", "x__y_4"]


def test_all_problems_are_reported_together(tmp_path):
    text = (
        "content,style,name,seed,content_strength,sead\na.png,b.png,x,1.5,strong,\n,b.png,../x,,nan,3\n\n"
        "a.png,b.png,same,,,\na.png,b.png,Same,,,\n"
    )
    with pytest.raises(ValueError) as caught:
        read_jobs(sheet(tmp_path, text))
    assert str(caught.value).splitlines() == [
        "jobs.csv has 7 problems:",
        "- column sead: there is no such column. Known are content, style, name, prompt, negative_prompt, "
        "content_lora, style_lora, title, creator, rights, content_strength, style_strength, content_guidance, "
        "style_guidance, cfg, steps, seed, keep_colours.",
        "- row 2, column content_strength: 'strong' is not a number, such as 0.8.",
        "- row 2, column seed: '1.5' is not a whole number, such as 42.",
        "- row 3, column content: it is empty, and it is needed.",
        "- row 3, column content_strength: 'nan' is not a number, such as 0.8.",
        "- row 3, column name: '../x' is not a name inside the folder results. Use letters, digits and spaces, with / "
        "for subfolders; not .., a drive, a name that Windows keeps for devices, or a dot or space at an end.",
        "- row 6, column name: 'Same' is the name of row 5 too. Choose another.",
    ]


def test_a_long_list_of_problems_is_cut(tmp_path):
    with pytest.raises(ValueError, match="jobs.csv has 100 problems:(\n.*){30}\n... and 70 more$"):
        read_jobs(sheet(tmp_path, "content,style,seed\n" + "a,b,x\n" * 100))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("jobs.csv", "", "holds no jobs"),
        ("jobs.csv", "content,style\n", "holds no jobs"),
        ("jobs.csv", "content,style,style\n", "the column style is there twice"),
        ("jobs.csv", "content,style\na,b,c\n", "row 2 has more cells"),
        ("jobs.csv", 'content,style\na,b\n"a,b\n', "as a sheet: unexpected end of data, after row 2; look there for a"),
        ("jobs.csv", '\ncontent,style\na,b\na,"b" c\na,b\n', "expected after '\"', after row 3; look there for a \""),
        ("jobs.csv", "\n\ncontent,style\na,\n", "row 4, column style: it is empty"),
        ("jobs.csv", "content,style\n" + "a" * 200_000, "field larger than field limit"),
        ("jobs.json", "{}", "a list of objects was expected"),
        ("jobs.json", "[1]", "a list of objects was expected"),
        ("jobs.json", "[" * 100_000, "cannot be read as a sheet"),
        ("jobs.json", '[{"content": ["a"], "style": true}]', "column content: .* is not text"),
        ("jobs.json", '[{"content": "a", "style": "b", "seed": ' + "9" * 5000 + "}]", "cannot be read as a sheet"),
        ("jobs.json", '[{"content": "a", "style": "b", "cfg": 1' + "0" * 400 + "}]", "column cfg: 10"),
    ],
)
def test_what_is_no_sheet_is_reported(tmp_path, name, text, words):
    with pytest.raises(ValueError, match=words):
        read_jobs(sheet(tmp_path, text, name))


def test_another_encoding_a_missing_and_a_huge_sheet_are_reported(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Save it as CSV UTF-8"):
        read_jobs(sheet(tmp_path, "content,style\n\u732b,b", encoding="shift_jis"))
    with pytest.raises(ValueError, match="none.csv cannot be read: No such file"):
        read_jobs(tmp_path / "none.csv")
    monkeypatch.setattr(tables, "MAX_ROWS", 2)
    with pytest.raises(ValueError, match="more than 2 rows"):
        read_jobs(sheet(tmp_path, "content,style\n" + "a,b\n" * 3))
    monkeypatch.setattr(tables, "MAX_SHEET_BYTES", 10)
    with pytest.raises(ValueError, match="is larger than"):
        read_jobs(sheet(tmp_path, "content,style\n"))


# The sheet of results


@pytest.fixture(params=["results.csv", "results.json"])
def results(request, tmp_path):
    return ResultsSheet(tmp_path / "out" / request.param)


CUP = Result(
    "cup", "k1", "cup.png", "ink.png", "cup.png", content_strength=1 / 3, seed=2**64 - 1, reason='"so", \u732b\nsaid'
)
POT = Result("pot", error="it is empty")


def test_results_come_back_as_they_were_in_their_order(results):
    assert results.read() == {}
    results.record([POT, CUP])
    results.record([Result("pan")])
    assert list(results.read().values()) == [POT, CUP, Result("pan")]
    results.record([Result("pot", "k2")], forget=["pan", "none"])
    assert list(results.read().values()) == [Result("pot", "k2"), CUP]


@pytest.mark.parametrize("text", ["=1+2", "@a", "-a", "+a", "'=a", "''=a", "'a"])
def test_no_text_is_a_formula_in_a_spreadsheet_and_every_text_comes_back(results, text):
    results.record([Result(text, content=text, reason=text, cfg=-1.5)])
    results.record([Result("other")])
    assert results.read()[text] == Result(text, content=text, reason=text, cfg=-1.5)
    assert results.entries().keys() == {text, "other"}
    if results.path.suffix == ".csv":
        (row, _) = csv.DictReader(results.path.read_text("utf-8-sig").splitlines())
        assert not any(row[column].startswith(("=", "@", "-", "+")) for column in ("name", "content", "reason"))
        assert row["cfg"] == "-1.5"


def test_a_name_that_a_mac_has_decomposed_is_the_same(results):
    results.record([Result("the\u0301", "k1")])
    results.record([Result("th\u00e9", "k2")])
    assert results.entries() == {"th\u00e9": ("k2", "", "")}


def test_waiting_for_the_sheet_can_be_given_up(results):
    def give_up():
        raise KeyboardInterrupt

    results.record([CUP])
    with FileLock(f"{results.path}.lock"), pytest.raises(KeyboardInterrupt):
        results.record([POT], waiting=give_up)
    assert list(results.read()) == ["cup"]


ROWS = [
    CUP,
    Result("=a", files="'=a.png", scores="1\n2"),
    Result("the\u0301", "k", error='\u732b, "so"'),
    Result("b, c", reason="\r\n"),
]


def test_a_sheet_that_grows_is_the_same_as_one_written_at_once(results):
    other = ResultsSheet(results.path.with_stem("other"))
    other.record([POT, *ROWS])
    results.record([POT])
    for row in ROWS:
        results.record([row])
        assert results.entries() == fresh_entries(results)
    assert results.path.read_bytes() == other.path.read_bytes()


def fresh_entries(results):
    """As another process reads them."""
    ResultsSheet.known = None
    return results.entries()


def test_a_new_result_is_appended_and_nothing_parsed(tmp_path, monkeypatch):
    results = ResultsSheet(tmp_path / "results.csv")
    results.record([POT])
    with monkeypatch.context() as patch:
        patch.setattr(tables, "parsed_table", None)
        results.record([CUP])
        assert results.entries().keys() == {"pot", "cup"}
    assert list(results.read().values()) == [POT, CUP]


def as_a_spreadsheet_abroad(text: str) -> str:
    return text.replace(",", ";")


def without_the_last_line_end(text: str) -> str:
    return text.rstrip()


def with_other_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n")


def without_a_byte_order_mark(text: str) -> str:
    return text.removeprefix("\ufeff")


def all_quoted(text: str) -> str:
    return text.replace(",", '","').replace("\ufeff", '\ufeff"').replace("\r\n", '"\r\n"').removesuffix('"')


def with_another_column(text: str) -> str:
    header, row, _ = text.split("\r\n")
    return f'{header},"My\nNote"\r\n{row},x\r\n'


def in_another_order(text: str) -> str:
    header, row, _ = (",".join(reversed(line.split(","))) for line in text.removeprefix("\ufeff").split("\r\n"))
    return f"{header}\r\n{row}\r\n"


def with_blank_rows(text: str) -> str:
    return f"{text}{',' * 20}\r\n\r\n"


EDITS = [
    as_a_spreadsheet_abroad, without_the_last_line_end, with_other_line_ends, without_a_byte_order_mark, all_quoted,
    with_another_column, in_another_order, with_blank_rows,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("is_read_between", [True, False], ids=["read between", "not read"])
def test_what_a_person_does_to_a_sheet_between_two_results_stays(tmp_path, edit, is_read_between):
    results = ResultsSheet(tmp_path / "results.csv")
    plain = Result("cup", "k1", "cup.png", files="cup.png", accepted="yes", seed=7)
    results.record([plain])
    results.path.write_bytes(edit(results.path.read_bytes().decode().replace("yes", "no")).encode())
    if is_read_between:
        assert results.entries() == {"cup": ("k1", "cup.png", "")}
    for row in (POT, Result("pan")):
        results.record([row])
        assert results.entries() == fresh_entries(results)
    assert list(results.read().values()) == [replace(plain, accepted="no"), POT, Result("pan")]
    if edit is with_another_column:
        header, first, *others = csv.reader(io.StringIO(results.path.read_bytes().decode("utf-8-sig"), newline=""))
        assert header[-1].lower().replace(" ", "_") == "my\nnote" and first[-1] == "x"
        assert {len(row) for row in others} == {len(header)}


def test_a_sheet_that_was_deleted_or_replaced_is_begun_or_read_anew(tmp_path):
    results, other = ResultsSheet(tmp_path / "results.csv"), ResultsSheet(tmp_path / "other" / "results.csv")
    results.record([CUP])
    results.path.unlink()
    results.record([POT])
    assert list(results.read()) == ["pot"]
    other.record([CUP, Result("pan")])
    os.replace(other.path, results.path)
    results.record([POT])
    assert list(results.read()) == list(results.entries()) == ["cup", "pan", "pot"]


def test_a_clock_that_jumps_changes_no_order(results):
    for year in (2026, 1970, 2099):
        results.record([Result(f"in {year}", finished=f"{year}-01-01T00:00:00+00:00")])
    assert list(results.read()) == ["in 2026", "in 1970", "in 2099"]


def test_a_column_that_a_person_added_stays(tmp_path):
    results = ResultsSheet(sheet(tmp_path, "name;my note\ncup;nice\npot;bad\n", "results.csv"))
    results.record([CUP])
    assert results.read()["cup"] == CUP
    header, first, *_ = results.path.read_text("utf-8-sig").splitlines()
    assert header.endswith("my_note")
    assert ",nice" in results.path.read_text("utf-8-sig")


def test_a_sheet_that_was_damaged_by_hand_is_reported_and_left_alone(tmp_path):
    results = ResultsSheet(sheet(tmp_path, "name,seed\n,1\ncup,x\n", "results.csv"))
    with pytest.raises(
        ValueError, match="results.csv has 2 problems:\n- row 2, column name(.|\n)*- row 3, column seed: 'x'"
    ):
        results.read()
    with pytest.raises(ValueError, match="row 2, column name"):
        results.entries()


def test_one_is_done_when_key_and_pictures_are_those_of_the_job(tmp_path):
    (tmp_path / "cup.png").touch()
    assert CUP.is_done("k1", tmp_path)
    assert not CUP.is_done("k2", tmp_path)
    assert not CUP.is_done("k1", tmp_path / "elsewhere")
    assert not POT.is_done("", tmp_path)


def test_many_writers_lose_nothing(results):
    def write(writer):
        for number in range(5):
            ResultsSheet(results.path).record([Result(f"{writer} {number}")])

    threads = [threading.Thread(target=write, args=[writer]) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results.read()) == 20


def test_a_refused_write_leaves_the_earlier_sheet(results, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    results.record([CUP])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        results.record([POT])
    assert list(results.read().values()) == [CUP]
    assert {path.suffix for path in results.path.parent.iterdir()} - {".lock"} == {results.path.suffix}


def test_a_full_sheet_is_reported(results, monkeypatch):
    results.record([CUP])
    monkeypatch.setattr(tables, "MAX_ROWS", 1)
    with pytest.raises(ValueError, match="Go on in another folder"):
        results.record([POT])
