"""What a catalogue is made from and written to: job sheets, pictures from anywhere, and the sheet of results."""

import csv
import hashlib
import io
import json
import math
import re
import typing
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from PIL import Image, ImageOps, PngImagePlugin

from .files import inside, portable, written_whole

MAX_ROWS, MAX_SHEET_BYTES = 50_000, 50_000_000
MAX_PIXELS, MAX_PICTURE_BYTES = 80_000_000, 500_000_000
SHOWN = 30  # problems of a sheet that are written out
RESULTS = "results.csv"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # some others of Pillow's run programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
NAME = "{content}__{style}"

Table = list[tuple[int, dict[str, object]]]  # rows as a person numbers them, by column


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a picture is made. None: what the workflow has, or not known."""

    content_strength: float | None = None
    style_strength: float | None = None
    content_guidance: float | None = None
    style_guidance: float | None = None
    cfg: float | None = None
    steps: int | None = None
    seed: int | None = None


SETTINGS = tuple(field.name for field in fields(Settings))


@dataclass(frozen=True)
class Job(Settings):
    """One picture to make. None: what the workflow has."""

    content: str  # a picture file, from the sheet's folder
    style: str
    name: str = ""  # of the result
    prompt: str | None = None
    negative_prompt: str | None = None
    content_lora: str | None = None  # a file in models/loras, in the place of a training
    style_lora: str | None = None


@dataclass(frozen=True)
class Result(Settings):
    """What became of a job, a row of the results sheet. Empty: not known."""

    name: str
    key: str = ""  # of all that the job was made from: another key is another job, whatever its name
    content: str = ""
    style: str = ""
    files: str = ""  # in the sheet's folder, with ; between
    content_adapter: str = ""
    style_adapter: str = ""
    scores: str = ""
    accepted: str = ""  # yes or no
    reason: str = ""
    finished: str = ""  # by the clock on the wall, for people: nothing is ordered by it
    seconds: float | None = None
    error: str = ""

    def done(self, key: str, folder: Path) -> bool:
        """Whether this is the result of the job with that key, and its pictures are still there."""
        names = self.files.split(";")
        return not self.error and self.key == key and all(name and (folder / name).is_file() for name in names)


# Sheets


def columns(kind: type[Settings]) -> list[Field]:
    """The fields of a Job or a Result in the order that a sheet has them: settings last."""
    return sorted(fields(kind), key=lambda field: field.kw_only)


def read_jobs(path: Path) -> list[Job]:
    """The jobs of a CSV or JSON sheet. Raises ValueError that tells every problem of it."""
    table = _read_table(path)
    jobs, problems = [], _unknown_columns(table)
    for number, row in table:
        job, found = _record(Job, row)
        problems += [f"row {number}, {problem}" for problem in found]
        if job:
            jobs.append((number, job))
    problems += _doubles(jobs)
    if problems:
        raise ValueError(told(path.name, problems))
    if not jobs:
        raise ValueError(f"{path.name} holds no jobs. Give it a row for each picture, under content and style.")
    return _named([job for _, job in jobs])


def told(what: str, problems: list[str]) -> str:
    """All problems as one text, the first ones written out."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n".join([f"{what} has {count}:", *(f"- {problem}" for problem in problems[:SHOWN]), *more])


def _unknown_columns(table: Table) -> list[str]:
    known = [field.name for field in columns(Job)]
    unknown = Counter(column for _, row in table for column in row if column not in known)
    return [
        f"column {column or 'without a name'}: there is no such column. Known are {', '.join(known)}."
        for column in unknown
    ]


def _doubles(jobs: list[tuple[int, Job]]) -> list[str]:
    seen: dict[str, int] = {}
    problems = []
    for number, job in jobs:
        first = seen.setdefault(job.name.casefold(), number)
        if job.name and first != number:
            problems.append(f"row {number}, column name: {job.name!r} is the name of row {first} too. Choose another.")
    return problems


def _named(jobs: list[Job]) -> list[Job]:
    """Jobs without a name get one from their pictures, numbered where others have it."""
    taken, result = {job.name.casefold() for job in jobs}, []
    for job in jobs:
        if not job.name:
            base = portable(_fill(NAME, Path(job.content).stem, Path(job.style).stem))
            numbered = (base if number == 1 else f"{base}_{number}" for number in range(1, len(jobs) + len(taken) + 2))
            job = replace(job, name=next(name for name in numbered if name.casefold() not in taken))
            taken.add(job.name.casefold())
        result.append(job)
    return result


def _record(kind: type, row: dict[str, object]) -> tuple[typing.Any, list[str]]:
    """A row as a Job or a Result, or None and what is wrong with its cells."""
    values, problems = {}, []
    for field in columns(kind):
        try:
            value = _cell(field.type, row.get(field.name))
            if value is not None:
                values[field.name] = value
            elif field.default is MISSING:
                raise ValueError("it is empty, and it is needed.")
        except ValueError as error:
            problems.append(f"column {field.name}: {error}")
    if kind is Job and "name" in values:
        try:
            inside(Path("results"), values["name"])
        except ValueError as error:
            problems.append(f"column name: {error}")
    return (None if problems else kind(**values)), problems


def _cell(kind: type, value: object) -> str | float | int | None:
    """A cell's value of the kind that its column has; None where it is empty. Raises ValueError."""
    kind = (typing.get_args(kind) or (kind,))[0]
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if kind is str and isinstance(value, str):
        return value.strip()
    try:
        if kind is float and not isinstance(value, bool):
            number = float(value.replace(",", ".") if isinstance(value, str) else value)
            if math.isfinite(number):
                return number
        if kind is int and (isinstance(value, str) or type(value) is int):
            return int(value)
    except (ValueError, TypeError, OverflowError):
        pass
    wanted = {str: "text", float: "a number, such as 0.8", int: "a whole number, such as 42"}[kind]
    raise ValueError(f"{value!r:.60} is not {wanted}.")


def _read_table(path: Path) -> Table:
    """The rows of a CSV or JSON file that are not blank. Raises ValueError for a file that is no such sheet."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SHEET_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _table(path.name, data)


def _table(name: str, data: bytes) -> Table:
    if len(data) > MAX_SHEET_BYTES:
        raise ValueError(f"{name} is larger than {MAX_SHEET_BYTES // 10**6} MB. Split it into several sheets.")
    try:
        text = data.decode("utf-8-sig")
        table = _json_table(text) if name.lower().endswith(".json") else _csv_table(text)
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text. Save it as CSV UTF-8.") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as a sheet: {error}.") from None
    if len(table) > MAX_ROWS:
        raise ValueError(f"{name} has more than {MAX_ROWS} rows. Split it into several sheets.")
    return table


def _json_table(text: str) -> Table:
    rows = json.loads(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("a list of objects was expected, one a job")
    return list(enumerate(rows, 1))


def _csv_table(text: str) -> Table:
    """Columns may be parted by commas, semicolons or tabs, as spreadsheets in different countries do."""
    first_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=first_line.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [column.strip().lower().replace(" ", "_") for column in next(lines, [])]
    twice = [column for column, count in Counter(header).items() if column and count > 1]
    if twice:
        raise ValueError(f"the column {twice[0]} is there twice")
    table = []
    for number, cells in enumerate(lines, 2):
        if any(value.strip() for value in cells[len(header) :]):
            raise ValueError(f"row {number} has more cells than the first row has columns")
        if any(value.strip() for value in cells):
            table.append((number, {column: value for column, value in zip(header, cells, strict=False) if value}))
    return table


def _write_table(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes a CSV or JSON sheet whole or not at all. Raises OSError."""
    columns = dict.fromkeys(column for row in rows for column in row)
    as_json = path.suffix.lower() == ".json"
    # The mark tells spreadsheets that it is UTF-8. What no encoding takes is a file's name from another system.
    encoding = dict(encoding="utf-8" if as_json else "utf-8-sig", errors="backslashreplace", newline="")
    with written_whole(path) as unfinished, unfinished.open("w", **encoding) as file:
        if as_json:
            json.dump(rows, file, ensure_ascii=False, indent=1)
        else:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def read_results(name: str, data: bytes) -> dict[str, Result]:
    """Results by name from the bytes of a sheet. Raises ValueError."""
    return _results(name, _table(name, data))


def _results(name: str, table: Table) -> dict[str, Result]:
    results, problems = {}, []
    for number, row in table:
        result, found = _record(Result, row)
        problems += [f"row {number}, {problem}" for problem in found]
        if result:
            results[result.name] = result
    if problems:
        raise ValueError(told(name, problems))
    return results


def as_row(result: Result) -> dict[str, object]:
    return {field.name: getattr(result, field.name) for field in columns(Result)}


class ResultsSheet:
    """The sheet of results, CSV or JSON by its suffix. Processes may share it; a kill leaves it as it was before."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Result]:
        """Results by name, in the order in which they came. Raises ValueError for a sheet that was damaged by hand."""
        return _results(str(self.path), self._table())

    def record(self, results: Iterable[Result], forget: Iterable[str] = ()) -> None:
        """Adds results, each in the place of an earlier one of its name, and takes out those of the names to forget.

        Columns that a person has added stay. Raises OSError, and ValueError as `read` does.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            rows = {str(row.get("name")): row for _, row in self._table()}
            for name in forget:
                rows.pop(name, None)
            for result in results:
                rows[result.name] = {**as_row(result), **self._added(rows.get(result.name, {}))}
            if len(rows) > MAX_ROWS:
                raise ValueError(f"{self.path} has {MAX_ROWS} rows already. Go on in another folder.")
            _write_table(self.path, list(rows.values()))

    def _added(self, row: dict[str, object]) -> dict[str, object]:
        ours = as_row(Result(""))
        return {column: value for column, value in row.items() if column not in ours}

    def _table(self) -> Table:
        return _read_table(self.path) if self.path.exists() else []


# Pictures


class Pair(NamedTuple):
    """A content picture to be shown in the look of a style picture. name: of the result."""

    name: str
    content: Path
    style: Path


class Pictures(NamedTuple):
    paths: list[Path]
    problems: dict[str, str]  # what cannot be used, by its name, and why


def find_pictures(root: Path, names: str) -> Pictures:
    """The picture files that lines of text name: folders and files inside `root`."""
    paths, problems = [], {}
    for name in filter(None, map(str.strip, names.splitlines())):
        try:
            found = list(_found(root, name))
        except ValueError as error:
            problems[name] = str(error)
            continue
        for path in found:
            if path.resolve().is_relative_to(root.resolve()):
                paths.append(path)
            else:
                problems[path.name] = (
                    f"it is a link that leads out of the folder {root.name}. Put the file itself there."
                )
    return Pictures(list(dict.fromkeys(paths)), problems)


def _found(root: Path, name: str) -> Iterator[Path]:
    path = inside(root, name)
    if path.is_file():
        yield path
    elif path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not files:
            raise ValueError(f"there are no pictures in {path}. Put {', '.join(SUFFIXES)} files there.")
        yield from sorted(files, key=lambda file: (file.name.casefold(), file.name))
    else:
        raise ValueError(f"there is no such folder or file in {root}.")


def pair_up(contents: list[Path], styles: list[Path], pattern: str) -> list[Pair]:
    """Every content with every style, no two under one name on any system.

    pattern: of names, with {content} and {style} for the names of the two files.
    """
    pairs = [Pair(_fill(pattern, one.stem, other.stem), one, other) for one in contents for other in styles]
    count = Counter(pair.name.casefold() for pair in pairs)
    return [
        pair._replace(name=f"{pair.name}_{_mark(pair)}") if count[pair.name.casefold()] > 1 else pair for pair in pairs
    ]


def _fill(pattern: str, content: str, style: str) -> str:
    words = {"{content}": portable(content), "{style}": portable(style)}
    return re.sub("{content}|{style}", lambda match: words[match[0]], pattern)


def _mark(pair: Pair) -> str:
    return hashlib.sha256(f"{pair.content}\0{pair.style}".encode(errors="backslashreplace")).hexdigest()[:6]


def open_picture(path: Path) -> Image.Image:
    """A picture file as RGB, as a viewer shows it: upright, 16 bits as 8, alpha on white, the first frame.

    Raises ValueError for a file that is no picture, is damaged or too large, before its pixels take memory.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    if size == 0:
        raise ValueError(f"{path.name} is empty (0 bytes). Copy it again.")
    if size > MAX_PICTURE_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_PICTURE_BYTES // 10**6} MB. Save it smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's, about size and damage: both are told below
            with Image.open(path, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return _rgb(ImageOps.exif_transpose(picture))
    except Image.DecompressionBombError:
        raise ValueError(f"{path.name} has more than {MAX_PIXELS // 10**6} million pixels. Save it smaller.") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path.name} is no picture of a known kind. Save it as PNG or JPEG.") from None
    except Exception as error:  # readers raise whatever they run into in a damaged file
        raise ValueError(f"{path.name} is damaged ({error}). Copy or save it again.") from error


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.mode == "F":
        raise ValueError("its values are floating point; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def write_picture(picture: Image.Image, path: Path, texts: dict[str, str]) -> None:
    """Writes a PNG with texts in it, whole or not at all. Raises OSError."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as unfinished:
        picture.save(unfinished, "PNG", pnginfo=info, compress_level=4)


def picture_key(*paths: Path) -> str:
    """A short name for the bytes of some files."""
    digests = hashlib.sha256()
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        digests.update(digest.digest())
    return digests.hexdigest()[:16]
