"""What people review: the results of a catalogue, their pictures, and the decisions about them."""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

from . import escape_text
from .names import as_spelled, by_number, composed, inside
from .pictures import picture_digest
from .sheets import RESULTS, SETTINGS, Result, ResultsSheet, decision_in
from .tables import FileState, Record, file_state

DEEPEST = 4  # folders inside the output folder in which a catalogue is found
DECISIONS = ("accepted", "rejected", "")  # the last one: undone
LONGEST_REASON, LONGEST_NAME = 200, 80  # characters
PASSED = re.compile(r"\d+: accepted")  # a line of Accept or Reject about a picture that keeps every bound
HIGH_IS_BAD = {"leakage"}  # of the scores
CLOCKS_DIFFER = timedelta(minutes=5)  # at most: of a file server and of ComfyUI


class Changed(Exception):
    """The result is no longer the one that the person saw."""


class Verdict(NamedTuple):
    """A person's decision. by: the person's name. Empty decision: take an earlier one back."""

    decision: str
    reason: str
    by: str


def find_catalogues(output: Path) -> list[str]:
    """The folders inside ComfyUI's output folder that have a sheet of results, by their names."""
    found = [
        folder.relative_to(output).as_posix() for folder in _folders(output, DEEPEST) if (folder / RESULTS).is_file()
    ]
    return sorted(("" if name == "." else name for name in found), key=by_number)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    yield folder
    with suppress(OSError):
        for entry in os.scandir(folder) if depth else ():
            if entry.is_dir(follow_symlinks=False):
                yield from _folders(Path(entry), depth - 1)


def open_catalogue(output: Path, name: str) -> ResultsSheet:
    """The sheet of a catalogue. Raises ValueError if there is none of that name inside the output folder."""
    sheet = ResultsSheet(as_spelled(inside(output, name)) / RESULTS)
    if not sheet.path.is_file():
        raise ValueError(f"There is no catalogue {escape_text(name)!r} in ComfyUI's output folder.")
    return sheet


def read_results(sheet: ResultsSheet) -> Mapping[str, Result]:
    """The results by name. Raises ValueError for invalid cells."""
    return _results(sheet.path, file_state(sheet.path.stat()))


@functools.lru_cache(4)  # pages that watch a catalogue ask every few seconds
def _results(path: Path, state: FileState) -> Mapping[str, Result]:
    return ResultsSheet(path).read()


def wanted_pictures(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Of each picture that somebody wants all its tries, by the name of the first."""
    tries: dict[str, list[Result]] = {}
    for result in results:
        if result.files and not result.error:
            tries.setdefault(result.retry_of or result.name, []).append(result)
    return tries


def find_result(sheet: ResultsSheet, name: str) -> Result:
    """The result of that name. Raises ValueError if the sheet has none."""
    result = read_results(sheet).get(composed(name))
    if result is None:
        raise ValueError(f"{escape_text(name)} is not in {RESULTS} any more.")
    return result


def picture_files(folder: Path, files: str) -> list[Path]:
    """The files that a result names. Raises ValueError for one outside of the catalogue's folder, or not there."""
    paths = [as_spelled(inside(folder, name)) for name in files.split(";") if name]
    if not paths or not all(path.is_file() for path in paths):
        raise ValueError("The result's picture is not there.")
    return paths


def changed_results(folder: Path, results: Iterable[Result]) -> set[str]:
    """The names of a catalogue's results whose pictures are no longer those that a person decided about."""
    return {result.name for result in results if is_changed(folder, result)}


def is_changed(folder: Path, result: Result) -> bool:
    """Whether a person decided about other bytes than the result's pictures have now.

    The bytes are not read of files that were written between the result and the decision.
    """
    if not (result.decision and result.decided_pictures):
        return False
    try:
        paths = picture_files(folder, result.files)
    except ValueError:
        return False  # gone: what is shown nowhere
    if _lie_between(result.finished, result.decided_at, paths):
        return False
    return [picture_digest(path).hex() for path in paths] != result.decided_pictures.split(";")


def _lie_between(made: str, decided: str, paths: list[Path]) -> bool:
    """Whether files were certainly written between two moments.

    A copy may have kept the time of what it is a copy of; Windows does not tell when it was made.
    """
    try:
        begin, end = (
            (datetime.fromisoformat(moment).astimezone() - CLOCKS_DIFFER).timestamp() for moment in (made, decided)
        )
    except (ValueError, OverflowError, OSError):  # as a spreadsheet has rewritten one
        return False
    stats = [path.stat() for path in paths]
    return all(begin <= stat.st_mtime and max(stat.st_mtime, stat.st_ctime) <= end for stat in stats)


def describe_results(sheet: ResultsSheet, changed: Collection[str] = ()) -> list[dict]:
    """What a page shows of each result that has its pictures, as JSON takes it. changed: see `changed_results`."""
    described = []
    for result in read_results(sheet).values():
        if result.error:
            continue
        with suppress(ValueError):
            version = version_of(sheet.path.parent, {"files": result.files, "decided_at": result.decided_at})
            described.append({**_described(result, version), "changed": result.name in changed})
    return described


def _described(result: Result, version: str) -> dict:
    scores = mean_scores(result.scores)
    good = [1 - value if name in HIGH_IS_BAD else value for name, value in scores.items()]
    return {
        "name": result.name,
        "content": result.content,
        "style": result.style,
        "pictures": result.files.count(";") + 1,
        "version": version,
        "scores": scores,
        "score": sum(good) / len(good) if good else None,
        "settings": {name: value for name in SETTINGS if (value := getattr(result, name)) is not None},
        "gate": gate_verdict(result),
        "gate_reason": result.reason,
        "retry_of": result.retry_of,
        "seconds": result.seconds,
        **decision_in(result),
    }


def mean_scores(report: str) -> dict[str, float]:
    """The mean scores in Evaluate's report; empty for another text."""
    try:
        mean = json.loads(report)["mean"]
        return {str(name): float(value) for name, value in mean.items() if math.isfinite(value)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def gate_verdict(result: Result) -> str:
    """accepted, rejected, or empty where no gate judged; a result of several pictures needs all of them."""
    lines = [line for line in result.reason.splitlines() if line.strip()]
    if result.accepted == "no" or not all(map(PASSED.fullmatch, lines)):
        return "rejected"
    return "accepted" if result.accepted or lines else ""


def version_of(folder: Path, record: Record) -> str:
    """A text that changes with a result's pictures and with every decision about it. Raises ValueError without them."""
    stats = [path.stat() for path in picture_files(folder, str(record.get("files") or ""))]
    states = [f"{stat.st_mtime_ns:x}.{stat.st_size:x}" for stat in stats]
    return " ".join([*states, str(record.get("decided_at") or "")])


def decide(
    sheet: ResultsSheet, name: str, version: str, verdict: Verdict, waiting: Callable[[], None] = lambda: None
) -> str:
    """Writes a person's decision into the sheet; the result's new version. version: of what the person saw.

    waiting: see `ResultsSheet`. Raises Changed if that is no longer there, ValueError for a verdict that cannot be
    written, and OSError.
    """
    cells = _checked(verdict)
    folder = sheet.path.parent
    with sheet.edited(waiting) as records:
        record = records.get(composed(name))
        try:
            now = version_of(folder, record or {})
        except ValueError:
            now = None
        if now != version:
            raise Changed
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in picture_files(folder, str(record["files"]))]
        moment = _moment_after(str(record.get("decided_at") or ""))
        record |= {**cells, "decided_at": moment, "decided_pictures": ";".join(hashes) if verdict.decision else ""}
        return version_of(folder, record)


def _moment_after(earlier: str) -> str:
    """The time now, or just after the earlier decision if the clock has been set back: the later of two counts."""
    now = datetime.now(timezone.utc)
    with suppress(ValueError, OverflowError, OSError):  # there was none, or a spreadsheet has rewritten it
        now = max(now, datetime.fromisoformat(earlier).astimezone(timezone.utc) + timedelta(milliseconds=1))
    return now.isoformat(timespec="milliseconds")


def _checked(verdict: Verdict) -> Record:
    reason, by = (" ".join(escape_text(text).split()) for text in (verdict.reason, verdict.by))
    if verdict.decision not in DECISIONS:
        raise ValueError("A decision is accepted or rejected.")
    if not by:
        raise ValueError("Say who decides.")
    for what, text, longest in (("reason", reason, LONGEST_REASON), ("name", by, LONGEST_NAME)):
        if len(text) > longest:
            raise ValueError(f"The {what} is longer than {longest} characters. Say it shorter.")
    return {"decision": verdict.decision, "decision_reason": reason, "decided_by": by}


def newer_decisions(ours: Mapping[str, Result], theirs: Mapping[str, Result]) -> dict[str, Record]:
    """Of another sheet about the same results the decisions that are later than ours, by name."""
    both = ours.keys() & theirs.keys()
    return {name: decision_in(theirs[name]) for name in both if theirs[name].decided_at > ours[name].decided_at}
