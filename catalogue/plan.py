"""What a catalogue is made of: its pairs, which of them are done, and which files cannot be used."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

from . import escape_text
from .names import as_spelled, composed, inside
from .pictures import Pair, Pairs, PictureCache, digests_key, find_pictures, name_inside, pair_up, picture_digest
from .sheets import RESULTS, SHOWN, Entry, Result, ResultsSheet


class CatalogueJob(NamedTuple):
    """One pair to make. folder: of the catalogue. content, style: names of the picture files. size: width and height of
    the content picture, upright. in_run: how many pairs the run makes."""

    name: str
    key: str
    content: str
    style: str
    folder: Path
    size: tuple[int, int]
    in_run: int = 1


class Plan(NamedTuple):
    """All pairs of a catalogue. root: of the pictures. folder: of the results. pattern: of their names. problems: why a
    file or folder cannot be used, by its name."""

    root: Path
    folder: Path
    contents: list[Path]
    styles: list[Path]
    pattern: str
    problems: dict[str, str]

    @property
    def sheet(self) -> ResultsSheet:
        return ResultsSheet(self.folder / RESULTS)

    @property
    def pictures(self) -> list[Path]:
        return list(dict.fromkeys([*self.contents, *self.styles]))

    def pair_up(self) -> Pairs:
        return pair_up(self.contents, self.styles, self.pattern)

    def name_of(self, path: Path) -> str:
        """What a picture file is called in the sheet and in reports."""
        return name_inside(self.root, path)

    def state(self) -> str:
        """A text that changes when a picture, the sheet or a result is added, changed or removed."""
        files = [*self.pictures, self.sheet.path, *_folders(self.folder, len(re.findall(r"[/\\]", self.pattern)))]
        stats = []
        for path in files:
            with suppress(FileNotFoundError):
                stat = path.stat()
                stats.append((str(path), stat.st_mtime_ns, stat.st_size))
        return str([stats, list(self.problems)])

    def pending(
        self,
        pairs: Iterable[Pair],
        entries: Mapping[str, Entry],
        cache: PictureCache,
        stop_if_cancelled: Callable[[], None] = lambda: None,
    ) -> dict[CatalogueJob, Pair]:
        """Those of the pairs whose pictures open and that have no result of these very pictures yet, as jobs.

        Only their pictures are opened, and after the cache is full no more. stop_if_cancelled: called before each pair.
        Raises ValueError for a name that leads out of the folder.
        """
        jobs, digest_of, has_file = {}, functools.cache(picture_digest), self._listing()
        for pair in pairs:
            stop_if_cancelled()
            key, entry = _key(pair, digest_of), entries.get(pair.name)
            if entry and entry.key == key and entry.has_pictures(has_file):
                continue
            inside(self.folder, f"{pair.name}.png")
            if cache.has_room(pair) and cache.open_pair(pair) is not None:
                names = escape_text(pair.content.name), escape_text(pair.style.name)
                jobs[CatalogueJob(pair.name, key, *names, self.folder, cache.sizes[pair.content])] = pair
        return jobs

    def record_bad_files(
        self, entries: Mapping[str, Entry], cache: PictureCache, waiting: Callable[[], None] = lambda: None
    ) -> None:
        """Keeps an entry in the sheet for each file that cannot be used, until it can. waiting: see `ResultsSheet`."""
        recorded = {name: entry.error for name, entry in entries.items() if entry.error and not entry.key}
        good = {self.name_of(path) for (path, _), picture in cache.opened.items() if picture is not None}
        listed = {self.name_of(path) for path in self.pictures} | cache.problems.keys()
        outdated = recorded.keys() & good | recorded.keys() - listed
        if outdated or not cache.problems.items() <= recorded.items():
            bad = [Result(name, error=problem) for name, problem in cache.problems.items()]
            self.sheet.record(bad, outdated, waiting)

    def count_done(self, pairs: Pairs, entries: Mapping[str, Entry]) -> int:
        """How many pairs have a result, of whichever pictures."""
        has_file = self._listing()
        return sum(name in entries and entries[name].has_pictures(has_file) for name in pairs.names)

    def _listing(self) -> Callable[[str], bool]:
        """What tells whether the catalogue's folder has a file of a name. It lists each folder once."""

        @functools.cache
        def names_in(folder: str) -> set[str]:
            path = as_spelled(self.folder / folder)
            return set(map(composed, os.listdir(path))) if os.path.isdir(path) else set()

        def has_file(name: str) -> bool:
            folder, _, file = name.rpartition("/")
            return composed(file) in names_in(folder) or os.path.isfile(self.folder / name)  # where case does not count

        return has_file

    def report(self, done: int, count: int, coming: list[str], cache: PictureCache) -> str:
        """For people: what comes now, how many pairs of how many are done, and which files are passed over."""
        more = f" and {len(coming) - SHOWN} more" if len(coming) > SHOWN else ""
        lines = [f"Now: {', '.join(coming[:SHOWN])}{more}." if coming else "Nothing to do in this run."]
        if not coming and done == count:
            lines = ["Everything is done. To have a result made again, delete its picture."]
        if cache.left_over:
            lines.append(
                f"{cache.left_over} pairs come in the next run: the disk has no room for more pictures at once."
            )
        lines.append(f"{done} of {count} pairs are done.")
        passed_over = [f"- {name}: {problem}" for name, problem in cache.problems.items()]
        if len(passed_over) > SHOWN:
            passed_over[SHOWN:] = [f"... and {len(passed_over) - SHOWN} more, in {RESULTS}"]
        return "\n".join([*lines, *(["Passed over:"] if passed_over else []), *passed_over])


def _key(pair: Pair, digest_of: Callable[[Path], bytes]) -> str:
    """The `picture_key` of a pair; empty if its pictures cannot be read."""
    try:
        return digests_key((digest_of(pair.content), digest_of(pair.style)))
    except OSError:
        return ""


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """A folder and those in it, down to a depth."""
    yield folder
    if depth and folder.is_dir():
        for entry in os.scandir(folder):
            if entry.is_dir():
                yield from _folders(Path(entry), depth - 1)


def plan_catalogue(root: Path, folder: Path, contents: str, styles: str, name: str) -> Plan:
    """The plan for lists of content and style pictures, one file or folder inside `root` a line.

    name: pattern of the results' names.
    """
    content_files, style_files = find_pictures(root, contents), find_pictures(root, styles)
    problems = content_files.problems | style_files.problems
    return Plan(root, folder, content_files.paths, style_files.paths, name, problems)


def free_paths(job: CatalogueJob, entries: Mapping[str, Entry], suffix: str, number: int) -> list[Path]:
    """Where the pictures of a pair go: a number is appended from the second on, and no other pair's are overwritten.

    Raises ValueError if another ComfyUI has made the pair meanwhile, and a person has decided about it.
    """
    known = entries.get(job.name)
    if known and known.is_done(job.key, job.folder) and ResultsSheet(job.folder / RESULTS).read()[job.name].decision:
        raise ValueError(
            f"Another ComfyUI has made {job.name} meanwhile, and a person has decided about it. That picture stays; to "
            "have it made again, delete it."
        )
    others = {composed(file).casefold() for name, entry in entries.items() if name != job.name
              for file in entry.files.split(";")}  # fmt: skip
    names = (job.name + suffix if one == 1 else f"{job.name}_{one}{suffix}" for one in count(1))
    free = (name for name in names if composed(name).casefold() not in others)
    return [inside(job.folder, name) for name in islice(free, number)]
