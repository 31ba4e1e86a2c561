"""Tables as people keep them: CSV as spreadsheets write it, or JSON."""

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import compress
from pathlib import Path
from typing import TextIO

from . import escape_text, patiently, written_whole

MAX_ROWS, MAX_SHEET_BYTES = 200_000, 200_000_000
FORMULA = re.compile(r"'*[=+\-@]")  # at the beginning of a cell, for a spreadsheet
UTF_16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE  # a spreadsheet's "Unicode text"
SEPARATOR = re.compile(r"sep=([,;\t|])\r?\n", re.I)  # a first line that names it, for Excel
CSV = {"encoding": "utf-8-sig"}  # spreadsheets recognise UTF-8 by its byte order mark
AS_WRITTEN = {"errors": "backslashreplace", "newline": ""}  # file names from other systems may have no encoding

Record = dict[str, object]  # the cells of a spreadsheet's row, by column
Table = list[tuple[int, Record]]  # with the row's number as a spreadsheet shows it
FileState = tuple[int, int, int]


def read_table(path: Path, only: Collection[str] = ()) -> Table:
    """The records of a CSV or JSON file that are not blank. Raises ValueError for a file that is not such a sheet.

    only: columns of a CSV file that are wanted, if not all.
    """
    try:
        with patiently(path.open, "rb") as file:
            data = file.read(MAX_SHEET_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{escape_text(path)} cannot be read: {error.strerror or error}.") from error
    return parsed_table(escape_text(path.name), data, only)


def parsed_table(name: str, data: bytes, only: Collection[str] = ()) -> Table:
    """The records in the bytes of a file of this name, as `read_table` gives them. Raises as it does."""
    if len(data) > MAX_SHEET_BYTES:
        raise ValueError(f"{name} is larger than {MAX_SHEET_BYTES // 10**6} MB. Split it into several sheets.")
    try:
        text = data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig")
        table = _json_table(text) if name.lower().endswith(".json") else _csv_table(text, only)
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text. Save it as CSV UTF-8.") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as a sheet: {error}.") from None
    if len(table) > MAX_ROWS:
        raise ValueError(f"{name} has more than {MAX_ROWS} rows. Split it into several sheets.")
    return table


def _json_table(text: str) -> Table:
    records = json.loads(text)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("a list of objects was expected, one a job")
    return list(enumerate(records, 1))


def _csv_table(text: str, only: Collection[str]) -> Table:
    header, rows = _csv_rows(text)
    is_wanted = [not only or column in only for column in header]
    wanted = list(compress(header, is_wanted))
    return [
        (number, {column: _unquoted(value) for column, value in zip(wanted, cells, strict=False) if value})
        for number, cells in ((number, compress(cells, is_wanted)) for number, cells in rows)
    ]


def _csv_rows(text: str) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The columns, from the first row that is not blank, and the other rows that are not.

    Columns are separated by commas, semicolons or tabs, depending on a spreadsheet's country, or as `SEPARATOR` says.
    """
    if named := SEPARATOR.match(text):
        text = text[named.end() :]
    first_line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = named[1] if named else max(",;\t", key=first_line.count)
    rows = enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1)
    first = next((cells for _, cells in rows if _is_filled(cells)), [])
    header = [column.strip().lower().replace(" ", "_") for column in first]
    duplicates = [column for column, count in Counter(header).items() if column and count > 1]
    if duplicates:
        raise ValueError(f"the column {duplicates[0]} is there twice")
    return header, _filled_rows(rows, len(header))


def _filled_rows(rows: Iterator[tuple[int, list[str]]], width: int) -> Iterator[tuple[int, list[str]]]:
    number = 1
    try:
        for number, cells in rows:
            if len(cells) > width and _is_filled(cells[width:]):
                raise ValueError(f"row {number} has more cells than the first row has columns")
            if _is_filled(cells):
                yield number, cells
    except csv.Error as error:
        raise ValueError(f'{error}, after row {number}; look there for a " without a partner') from None


def _is_filled(cells: list[str]) -> bool:
    return any(value.strip() for value in cells)


def _quoted(value: object) -> object:
    """A text that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def _unquoted(value: str) -> str:
    return value[1:] if value[0] == "'" and FORMULA.match(value) else value


def file_state(stat: os.stat_result) -> FileState:
    """What differs when a file has been changed or replaced."""
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def write_table(path: Path, records: list[Record], ours: Collection[str], texts: Collection[str]) -> FileState:
    """Writes a CSV or JSON sheet whole or not at all: our columns, then those of people. Its state then.

    texts: the columns of texts, in which no spreadsheet may find a formula. Raises OSError, and ValueError for more
    rows than `read_table` takes.
    """
    if len(records) > MAX_ROWS:
        raise ValueError(f"{escape_text(path)} has {MAX_ROWS} rows already. Go on in another folder.")
    header = list(dict.fromkeys([*ours, *(column for record in records for column in record)]))
    with written_whole(path) as unfinished:
        if path.suffix.lower() == ".json":
            with patiently(unfinished.open, "w", encoding="utf-8", **AS_WRITTEN) as file:
                json.dump(records, file, ensure_ascii=False, indent=1)
        else:
            with patiently(unfinished.open, "w", **CSV, **AS_WRITTEN) as file:
                csv.writer(file).writerow(header)
                _write_rows(file, records, header, texts)
        return file_state(unfinished.stat())


def append_rows(
    path: Path, state: FileState, records: list[Record], ours: Collection[str], texts: Collection[str]
) -> FileState | None:
    """Adds rows to a CSV sheet, whole or not at all, without parsing it. Its state then.

    None, and nothing is done, unless the sheet is in that state, as `write_table` writes it, and has room. ours, texts,
    raises: as there.
    """
    if not path.exists():
        return None
    with patiently(path.open, "rb") as file:
        data = file.read() if file_state(os.fstat(file.fileno())) == state else b""
    begins = codecs.BOM_UTF8 + ",".join(ours).encode()
    is_ours = data.startswith((begins + b"\r\n", begins + b",")) and data.endswith(b"\r\n")
    if not is_ours or data.count(b"\r\n") + len(records) > MAX_ROWS:
        return None
    header = next(csv.reader(io.TextIOWrapper(io.BytesIO(data), **CSV, newline="")))
    with written_whole(path) as unfinished:
        patiently(unfinished.write_bytes, data)
        with patiently(unfinished.open, "a", **CSV, **AS_WRITTEN) as file:
            _write_rows(file, records, header, texts)
        return file_state(unfinished.stat())


def _write_rows(file: TextIO, records: list[Record], header: list[str], texts: Collection[str]) -> None:
    csv.writer(file).writerows(
        [_quoted(record.get(column)) if column in texts else record.get(column) for column in header]
        for record in records
    )
