"""Hands over what people accepted: copies of those pictures under plain names, with a list of who accepted what."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from itertools import count
from pathlib import Path
from typing import NamedTuple

from . import locked, patiently, write_file
from .names import composed, inside
from .pictures import picture_digest
from .review import is_changed, picture_files, read_results, wanted_pictures
from .sheets import RESULTS, Result, ResultsSheet
from .tables import Record, read_table, write_table

FOLDER, EARLIER, LIST = "accepted", "accepted_earlier", "accepted.csv"
COLUMNS = ("picture", "result", "content", "style", "decided_by", "decided_at", "sha256")


class Handover(NamedTuple):
    """What is in the folder now. pictures: how many. new: of those, copied just now. moved: earlier copies that went to
    EARLIER. left_out: the names of wanted pictures by the reason, a word of `left_out_for`."""

    pictures: int
    new: int
    moved: int
    left_out: dict[str, list[str]]


def copy_accepted(sheet: ResultsSheet, waiting: Callable[[], None] = lambda: None) -> Handover:
    """Makes the folder FOLDER of a catalogue hold the accepted pictures and their list; each file whole or not at all.

    A copy that is no longer accepted, or was changed, is moved to EARLIER; other files there stay. waiting: see
    `ResultsSheet`. Raises ValueError if results lie in that folder, and OSError.
    """
    catalogue = sheet.path.parent
    with locked(catalogue / f"{FOLDER}.lock", waiting, "another copy of the accepted pictures is made"):
        results = read_results(sheet)
        folder = _free_folder(catalogue, results.values())
        sources, left_out = _accepted(catalogue, results)
        records = {str(record["picture"]): record for _, record in sources}
        moved = _set_aside(catalogue, folder, {name: str(record["sha256"]) for name, record in records.items()})
        if records or moved:
            folder.mkdir(exist_ok=True)
            # Before the pictures, so that what a kill leaves there is known the next time.
            write_table(folder / LIST, list(records.values()), COLUMNS, set(COLUMNS))
        new = sum(_copied(path, inside(folder, str(record["picture"])), record) for path, record in sources)
    return Handover(len(records), new, moved, left_out)


def _free_folder(catalogue: Path, results: Iterable[Result]) -> Path:
    folder = inside(catalogue, FOLDER)
    files = (file for result in results for file in result.files.split(";"))
    if (folder / RESULTS).exists() or any(file.casefold().startswith(f"{FOLDER}/") for file in files):
        raise ValueError(f"The folder {FOLDER} of this catalogue has results of its own in it. Rename it.")
    return folder


def _accepted(catalogue: Path, results: Mapping[str, Result]) -> tuple[list[tuple[Path, Record]], dict[str, list[str]]]:
    """The files to copy, each with its line in the list; and what is left out, by the reason."""
    sources, left_out, taken = [], {}, set()
    for first, tries in wanted_pictures(results.values()).items():
        result = max(tries, key=lambda one: (one.decision == "accepted", one.decided_at))
        if reason := left_out_for(catalogue, tries, result):
            left_out.setdefault(reason, []).append(first)
            continue
        paths = picture_files(catalogue, result.files)
        for path, sha256 in zip(paths, result.decided_pictures.split(";"), strict=True):
            name = _free_name(catalogue, first, path, taken)
            facts = (result.name, result.content, result.style, result.decided_by, result.decided_at)
            sources.append((path, dict(zip(COLUMNS, (name, *facts, sha256), strict=True))))
    return sources, left_out


def left_out_for(catalogue: Path, tries: list[Result], result: Result) -> str:
    """Why nothing of a wanted picture is handed over; empty if it is. result: of its tries the one accepted last."""
    if result.decision != "accepted":
        is_rejected = all(one.decision == "rejected" and not is_changed(catalogue, one) for one in tries)
        return "rejected" if is_rejected else "undecided"
    if not result.decided_pictures:
        return "unsigned"  # somebody wrote the word into the sheet
    try:
        paths = picture_files(catalogue, result.files)
    except ValueError:
        return "missing"
    return "" if [picture_digest(path).hex() for path in paths] == result.decided_pictures.split(";") else "changed"


def _free_name(catalogue: Path, first: str, path: Path, taken: set[str]) -> str:
    """The name of the first try, with a number from its second picture on."""
    try:
        inside(catalogue, first)
    except ValueError:  # people may write any name into a sheet
        first = path.stem
    names = (f"{first}{'' if number == 1 else f'_{number}'}{path.suffix}" for number in count(1))
    name = next(name for name in names if composed(name).casefold() not in taken)
    taken.add(composed(name).casefold())
    return name


def _set_aside(catalogue: Path, folder: Path, wanted: Mapping[str, str]) -> int:
    """Moves copies that are not wanted, or have other bytes; how many. wanted: SHA-256 by name."""
    listed = {str(record["picture"]) for _, record in read_table(folder / LIST)} if (folder / LIST).exists() else set()
    there = {name: path for name in sorted(listed | wanted.keys()) if (path := inside(folder, name)).is_file()}
    unwanted = {name: path for name, path in there.items() if picture_digest(path).hex() != wanted.get(name)}
    numbered = (inside(catalogue, f"{EARLIER}/{date.today()}_{number}") for number in count(1))
    earlier = next(path for path in numbered if not path.exists())
    for name, path in unwanted.items():
        aside = inside(earlier, name)
        aside.parent.mkdir(parents=True, exist_ok=True)
        patiently(os.replace, path, aside)
    return len(unwanted)


def _copied(path: Path, target: Path, record: Record) -> bool:
    """Copies a picture unless its copy is there. Raises ValueError if it is no longer the one that was accepted."""
    if target.exists():
        return False
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(f"{record['result']} was changed just now. Try again.")
    write_file(target, data)
    return True
