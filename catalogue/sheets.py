"""Job sheets and the sheet of results: what their columns mean."""

import functools
import math
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import ClassVar, NamedTuple

from . import escape_text, locked
from .names import as_spelled, composed, inside, portable, result_name
from .pictures import NAME, filled_name
from .tables import FileState, Record, Table, append_rows, file_state, parsed_table, read_table, write_table

LARGEST = 10**20  # of whole numbers: seeds have 64 bits
THOUSANDS = re.compile(r"\s*[+-]?\d{1,3}(,\d{3})+\s*")  # in some countries, thousandths in others
SHOWN = 30  # problems that an error text lists
RESULTS = "results.csv"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a picture is made. None: as in the workflow, or not known."""

    content_strength: float | None = None
    style_strength: float | None = None
    content_guidance: float | None = None
    style_guidance: float | None = None
    cfg: float | None = None
    steps: int | None = None
    seed: int | None = None
    keep_colours: float | None = None


SETTINGS = tuple(field.name for field in fields(Settings))
PATHS = ("content", "style", "content_lora", "style_lora")  # columns of a job


@dataclass(frozen=True)
class Job(Settings):
    """One picture to make. None: as in the workflow."""

    content: str  # a picture file, relative to the sheet's folder
    style: str
    name: str = ""  # of the result
    prompt: str | None = None
    negative_prompt: str | None = None
    content_lora: str | None = None  # a file in models/loras, instead of a training
    style_lora: str | None = None
    title: str | None = None  # of the result, in its XMP
    creator: str | None = None
    rights: str | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a person decided about a result. It is of these very pictures: a result made anew has none."""

    decision: str = ""  # accepted or rejected; empty beside a time: undone
    decision_reason: str = ""
    decided_by: str = ""
    decided_at: str = ""
    decided_pictures: str = ""  # SHA-256 of each picture's file, separated by ;


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Where a result stands among the tries at one picture."""

    retry_of: str = ""  # the name of the first try; empty: this is it


@dataclass(frozen=True)
class Result(Retry, Decision, Settings):
    """The outcome of a job, as the results sheet has it. Empty: not known."""

    name: str
    key: str = ""  # a hash of all inputs of the job: with another key it is another job, even under the same name
    content: str = ""
    style: str = ""
    files: str = ""  # relative to the sheet's folder, separated by ;
    content_adapter: str = ""
    style_adapter: str = ""
    scores: str = ""
    accepted: str = ""  # by the gate: yes or no
    reason: str = ""
    finished: str = ""  # wall-clock time, for people: nothing is ordered by it
    seconds: float | None = None  # of machine time
    error: str = ""

    def is_done(self, key: str, folder: Path) -> bool:
        """Whether this is the result of the job with that key, and its pictures still exist."""
        return Entry(self.key, self.files, self.error).is_done(key, folder)


class Entry(NamedTuple):
    """What tells whether a job is done, as the results sheet has it."""

    key: str
    files: str
    error: str

    def has_pictures(self, exists: Callable[[str], bool]) -> bool:
        """Whether this is a result without error whose pictures exist. exists: whether there is a file of that name."""
        return not self.error and all(map(exists, self.files.split(";")))

    def is_done(self, key: str, folder: Path) -> bool:
        """As `Result.is_done`."""
        return self.key == key and self.has_pictures(lambda name: as_spelled(folder / name).is_file())


@functools.cache
def columns(kind: type[Settings]) -> list[Field]:
    """The fields of a Job or a Result in the order of a sheet's columns: settings last."""
    return sorted(fields(kind), key=lambda field: field.kw_only)


@functools.cache
def cell_type(field: Field) -> type:
    """str, float or int."""
    return (typing.get_args(field.type) or (field.type,))[0]


COLUMNS = [field.name for field in columns(Result)]
TEXTS = {field.name for field in fields(Result) if cell_type(field) is str}


def read_jobs(path: Path) -> list[Job]:
    """The jobs of a CSV or JSON sheet. Raises ValueError that lists all problems of the sheet."""
    table = read_table(path)
    jobs, problems = [], _unknown_columns(table)
    for number, record in table:
        job, found = _parsed(Job, record)
        problems += [f"row {number}, {problem}" for problem in found]
        if job:
            jobs.append((number, job))
    problems += _duplicate_names(jobs)
    if problems:
        raise ValueError(error_text(path.name, problems))
    if not jobs:
        raise ValueError(f"{path.name} holds no jobs. Give it a row for each picture, under content and style.")
    return _named([job for _, job in jobs])


def error_text(name: str, problems: list[str]) -> str:
    """The problems of a sheet or catalogue as one text, which lists at most `SHOWN` of them."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n".join([f"{name} has {count}:", *(f"- {problem}" for problem in problems[:SHOWN]), *more])


def _unknown_columns(table: Table) -> list[str]:
    known = [field.name for field in columns(Job)]
    unknown = Counter(column for _, record in table for column in record if column not in known)
    return [
        f"column {column or 'without a name'}: there is no such column. Known are {', '.join(known)}."
        for column in unknown
    ]


def _duplicate_names(jobs: list[tuple[int, Job]]) -> list[str]:
    seen: dict[str, int] = {}
    problems = []
    for number, job in jobs:
        first = seen.setdefault(job.name.casefold(), number)
        if job.name and first != number:
            problems.append(f"row {number}, column name: {job.name!r} is the name of row {first} too. Choose another.")
    return problems


def _named(jobs: list[Job]) -> list[Job]:
    """Names the jobs that have no name after their pictures, with a number where the name is taken."""
    taken, result = {job.name.casefold() for job in jobs}, []
    for job in jobs:
        if not job.name:
            base = portable(filled_name(NAME, Path(job.content).stem, Path(job.style).stem))
            numbered = (base if number == 1 else f"{base}_{number}" for number in range(1, len(jobs) + len(taken) + 2))
            job = replace(job, name=next(name for name in numbered if name.casefold() not in taken))
            taken.add(job.name.casefold())
        result.append(job)
    return result


def _parsed(kind: type, record: Record) -> tuple[typing.Any, list[str]]:
    """A Job or a Result from a record, or None and the problems of its cells."""
    values, problems = {}, []
    for field in columns(kind):
        try:
            value = _parsed_cell(cell_type(field), record.get(field.name))
            if value is not None:
                values[field.name] = value
            elif field.default is MISSING:
                raise ValueError("it is empty, and it is needed.")
        except ValueError as error:
            problems.append(f"column {field.name}: {error}")
    if kind is Job:  # which may be made on another system than the sheet was
        values |= {name: values[name].replace("\\", "/") for name in PATHS if name in values}
    if kind is Job and "name" in values:
        values["name"] = result_name(values["name"])
        try:
            inside(Path("results"), values["name"])
        except ValueError as error:
            problems.append(f"column name: {error}")
    return (None if problems else kind(**values)), problems


def _parsed_cell(kind: type, value: object) -> str | float | int | None:
    """A cell's value in its column's type; None where it is empty. Raises ValueError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if kind is str and isinstance(value, str):
        return value.strip()
    try:
        if kind is float and not isinstance(value, bool):
            number = float(value.replace(",", ".") if isinstance(value, str) else value)
            if math.isfinite(number):
                return number
        if kind is int and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return _whole_number(value)
    except (ValueError, TypeError, ArithmeticError):
        pass
    wanted = {str: "text", float: "a number, such as 0.8", int: "a whole number, such as 42"}[kind]
    raise ValueError(f"{value!r:.60} is not {wanted}.")


def _whole_number(value: str | float) -> int:
    """A whole number, which spreadsheets also write as 7.0, 7,0 or 1e3. Raises ValueError or ArithmeticError."""
    if isinstance(value, str):
        if THOUSANDS.fullmatch(value):
            raise ValueError("ambiguous")
        value = value.replace(",", ".")
    number = Decimal(value)
    if abs(number) > LARGEST or number != int(number):
        raise ValueError("not whole")
    return int(number)


def read_results(name: str, data: bytes) -> dict[str, Result]:
    """Results by name from the bytes of a sheet. Raises ValueError that lists all problems of the sheet."""
    return _parsed_results(name, parsed_table(name, data))


def _parsed_results(name: str, table: Table) -> dict[str, Result]:
    results, problems = {}, []
    for number, record in table:
        result, found = _parsed(Result, record)
        problems += [f"row {number}, {problem}" for problem in found]
        if result:
            results[result.name] = result
    if problems:
        raise ValueError(error_text(name, problems))
    return results


def as_record(result: Result) -> Record:
    """The cells of a result, by column."""
    return {column: getattr(result, column) for column in COLUMNS}


def decision_in(record: Record | Result) -> Record:
    """The cells of a person's decision, of a record or a result."""
    cells = as_record(record) if isinstance(record, Result) else record
    return {field.name: cells.get(field.name) or "" for field in fields(Decision)}


class Known(NamedTuple):
    """The entries of a sheet's file in that state."""

    path: Path
    state: FileState
    entries: Mapping[str, Entry]


class ResultsSheet:
    """The sheet of results, CSV or JSON by its suffix. Processes may share it; a kill leaves the earlier one."""

    known: ClassVar[Known | None] = None  # so that runs, one after another, parse a large sheet once

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, Result]:
        """Results by name, in the order in which they were recorded. Raises ValueError for invalid cells."""
        return _parsed_results(escape_text(self.path), self._table())

    def entries(self) -> Mapping[str, Entry]:
        """Of every result, by name, what tells whether it is done: `read` takes seconds for a large sheet.

        Raises ValueError as `read` does if a result has no name.
        """
        try:
            state = file_state(self.path.stat())
        except FileNotFoundError:
            return {}
        known = ResultsSheet.known
        if known is None or (known.path, known.state) != (self.path, state):
            table = read_table(self.path, {"name", *Entry._fields})
            known = ResultsSheet.known = Known(self.path, state, _entries(record for _, record in table))
        if "" in known.entries:
            self.read()
        return known.entries

    def record(
        self, results: Iterable[Result], forget: Iterable[str] = (), waiting: Callable[[], None] = lambda: None
    ) -> None:
        """Adds results, each in place of an earlier one of its name, and removes those of the names in `forget`.

        Columns that a person has added stay. waiting, raises: as `edited`.
        """
        results, forget = list(results), set(forget)
        with self._locked(waiting):
            if self._append(results, forget):
                return
            with self._rewritten() as records:
                for name in forget:
                    records.pop(name, None)
                for result in results:
                    records[result.name] = {**as_record(result), **self._added(records.get(result.name, {}))}

    @contextmanager
    def edited(self, waiting: Callable[[], None] = lambda: None) -> Iterator[dict[str, Record]]:
        """Yields the records by name, which are written when the context ends without error. Locked until then.

        waiting: called while another process writes; may raise to give up. Raises OSError, and ValueError as `read`
        does.
        """
        with self._locked(waiting), self._rewritten() as records:
            yield records

    @contextmanager
    def _locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(Path(f"{self.path}.lock"), waiting, f"another program writes {self.path.name}"):
            yield

    @contextmanager
    def _rewritten(self) -> Iterator[dict[str, Record]]:
        records = {_name_in(record): record for _, record in self._table()}
        yield records
        state = write_table(self.path, list(records.values()), COLUMNS, TEXTS)
        ResultsSheet.known = Known(self.path, state, _entries(records.values()))

    def _append(self, results: list[Result], forget: set[str]) -> bool:
        """Adds results at the end of a sheet whose entries are known and stay. Whether it is such a sheet."""
        known, records = ResultsSheet.known, list(map(as_record, results))
        added = _entries(records)
        if known is None or known.path != self.path or known.entries.keys() & (added.keys() | forget):
            return False
        state = append_rows(self.path, known.state, records, COLUMNS, TEXTS)
        if state:
            ResultsSheet.known = Known(self.path, state, {**known.entries, **added})
        return bool(state)

    def _added(self, record: Record) -> Record:
        return {column: value for column, value in record.items() if column not in COLUMNS}

    def _table(self) -> Table:
        return read_table(self.path) if self.path.exists() else []


def _entries(records: Iterable[Record]) -> dict[str, Entry]:
    return {
        _name_in(record): Entry(record.get("key") or "", record.get("files") or "", record.get("error") or "")
        for record in records
    }


def _name_in(record: Record) -> str:
    return composed(str(record.get("name", "")).strip())


@contextmanager
def disk_errors_named(what: str, then: str) -> Iterator[None]:
    """Raises a ValueError for an error of the disk. what: could not be done. then: to do after it is mended."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            escape_text(
                f"{what}: {error}. Free some space, make the folder writable, or close {RESULTS} in other programs; "
                f"then {then}."
            )
        ) from error
