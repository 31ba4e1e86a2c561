"""What a catalogue is made of: its pairs, which of them are done, and which files cannot be used."""

from pathlib import Path
from typing import NamedTuple

from .names import inside
from .pictures import Pair, PictureCache, find_pictures, pair_up, picture_key
from .sheets import RESULTS, Result, ResultsSheet


class CatalogueJob(NamedTuple):
    """One pair to make. folder: of the catalogue. content, style: names of the picture files."""

    name: str
    key: str
    content: str
    style: str
    folder: Path


class Plan(NamedTuple):
    """All pairs of a catalogue. root: of the pictures. folder: of the results. problems: why a file or folder cannot be
    used, by its name."""

    root: Path
    folder: Path
    pairs: list[Pair]
    problems: dict[str, str]

    @property
    def sheet(self) -> ResultsSheet:
        return ResultsSheet(self.folder / RESULTS)

    def name_of(self, path: Path) -> str:
        """What a picture file is called in the sheet and in reports."""
        return path.relative_to(self.root).as_posix()

    def is_done(self, pair: Pair, results: dict[str, Result]) -> bool:
        """Whether the pair has a result, of whichever pictures."""
        return pair.name in results and results[pair.name].is_done(results[pair.name].key, self.folder)

    def pending(self, pairs: list[Pair], results: dict[str, Result], cache: PictureCache) -> dict[CatalogueJob, Pair]:
        """Those of the pairs whose pictures open and that have no result of these very pictures yet, as jobs."""
        jobs = {}
        for pair in pairs:
            if cache.open(pair.content) is None or cache.open(pair.style) is None:
                continue
            key = picture_key(pair.content, pair.style)
            if pair.name not in results or not results[pair.name].is_done(key, self.folder):
                jobs[CatalogueJob(pair.name, key, pair.content.name, pair.style.name, self.folder)] = pair
        return jobs

    def record_bad_files(self, results: dict[str, Result], cache: PictureCache) -> None:
        """Keeps an entry in the sheet for each file that cannot be used, until it can."""
        bad = [Result(name, error=problem) for name, problem in cache.problems.items()]
        good = {self.name_of(path) for path, picture in cache.opened.items() if picture is not None}
        listed = {self.name_of(path) for pair in self.pairs for path in (pair.content, pair.style)} | set(
            cache.problems
        )
        recorded = {name for name, result in results.items() if result.error and not result.key}
        outdated = recorded & good | recorded - listed
        if outdated or any(results.get(result.name) != result for result in bad):
            self.sheet.record(bad, outdated)

    def report(self, results: dict[str, Result], coming: list[str], problems: dict[str, str]) -> str:
        """For people: what comes now, how many pairs are done, and which files are skipped."""
        done = sum(self.is_done(pair, results) for pair in self.pairs)
        lines = [f"Now: {', '.join(coming)}." if coming else "Nothing to do in this run."]
        if not coming and done == len(self.pairs):
            lines = ["Everything is done. To have a result made again, delete its picture."]
        lines.append(f"{done} of {len(self.pairs)} pairs are done.")
        skipped = [f"- {name}: {problem}" for name, problem in problems.items()]
        return "\n".join([*lines, *(["Skipped:"] if skipped else []), *skipped])


def plan_catalogue(root: Path, folder: Path, contents: str, styles: str, name: str) -> Plan:
    """The plan for lists of content and style pictures, one file or folder inside `root` a line.

    name: pattern of the results' names. Raises ValueError for a name that leads out of `folder`.
    """
    content_files, style_files = find_pictures(root, contents), find_pictures(root, styles)
    pairs = pair_up(content_files.paths, style_files.paths, name)
    for pair in pairs:
        inside(folder, f"{pair.name}.png")
    return Plan(root, folder, pairs, content_files.problems | style_files.problems)
