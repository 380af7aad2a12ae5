"""Knows: the layout of LibriHeavy and Libri-Light; writes a stand-in of both from books, by eSpeak NG.
Must not know: features, models.

    python tools/make_librilike.py --text DIR --out DIR --hours 20            # 20 h, and 2 h for each of dev,
                                                                              # test_clean and test_other
    python tools/make_librilike.py --text DIR --out DIR --hours 0.05 --min-minutes 0.5 --max-minutes 1.5

Writes, below --out, which plays the role of the recipe's folder "download":

    librilight/SUBSET/SPEAKER/BOOK/CHAPTER.flac                             16 kHz, 5-15 minutes of one reader
    librilight_text/output_text_SUBSET_cleaned/TITLE/text.txt               begin_byte and end_byte are of it
    libriheavy/libriheavy_cuts_{SUBSET,dev,test_clean,test_other}.jsonl.gz

The cuts have all keys of LibriHeavy's JSON. Recordings of dev and of the tests are spread over small, medium
and large, as in LibriHeavy. It can be killed and run again: finished recordings are kept, and the result does
not depend on that, nor on the number of workers. Here voices are synthetic, and the "ASR" text
has no errors.
"""
from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import itertools
import json
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Optional, Sequence

import soundfile
from librilike.chapters import Chapter, Planner, Sizes, title_of
from librilike.speech import audio_path, record
from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.command_line import DONE, INTERRUPTED, REFUSED, parse_options
from icefall_fusion.common.files import atomic_path, write_json, write_text
from icefall_fusion.common.workers import in_workers
from icefall_fusion.data.books import split_books
from icefall_fusion.data.espeak import SAMPLE_RATE
from icefall_fusion.data.noise import CLEAN, COLORS, OTHER, TRAIN, Conditions
from icefall_fusion.data.voices import SPEAKERS

SUBSETS = ("small", "medium", "large")
#: Where books of dev and of the tests go in turn: most of LibriHeavy's are in the large part.
EVALUATION_SUBSETS = ("large", "medium", "small")
FORMAT = 1  # part of every recording's fingerprint: raise it when the audio of the same options changes
#: Noise without babble, as nobody talks in the background of a whole chapter; the training set's is mild.
CONDITIONS: dict[str, tuple[Conditions, ...]] = {
    "train": (replace(TRAIN, noises=COLORS, snr=(5.0, 25.0), mild_share=0.5),),
    "dev": (CLEAN, OTHER),
    "test_clean": (CLEAN,),
    "test_other": (OTHER,),
}
_OPTION = re.compile(r"^--([\w-]+)")  # --dev-hours is --dev_hours
FIRST_SPEAKER = {
    "dev": 1000, "test_clean": 2000, "test_other": 3000, "small": 10_000, "medium": 20_000, "large": 100_000,
}


@dataclass(frozen=True)
class LibrilikeOptions:
    """Write a stand-in of LibriHeavy from books, of exactly the same layout, spoken by eSpeak NG.

    Args:
        text: folder of UTF-8 books, one .txt file each, as for the job prepare-text.
        out: the folder that plays the role of download/.
        hours: speech of the training subset; 0: none.
        subset: small, medium or large: the name of the training subset and the folder of its recordings.
            Those of dev and of the tests are in all three.
        dev_hours: speech of dev; 0: none; default: a tenth of hours (at least 0.005).
        test_hours: speech of test_clean, and as much of test_other; 0: none; default: as dev_hours'.
        books_limit: largest number of books of each set; 0: all.
        test_books: number of books, the last of the alphabet, for the tests, which share none;
            default: 12, or a tenth of them (at least 2).
        dev_books: number of books before those, for dev; default: 8, or a fifteenth (at least 1).
        min_minutes: shortest recording, unless a book or the hours end before.
        max_minutes: longest recording, about.
        mean_seconds: of utterances; short paragraphs make them a little shorter.
        max_seconds: longer utterances are spoken, but have no cut.
        recordings_per_speaker: after them another speaker goes on with the book.
        seed: of texts, speakers, pauses, noise and rooms.
        workers: processes. The result does not depend on it.
    """

    text: str
    out: str
    hours: float
    subset: str = "small"
    dev_hours: Optional[float] = None
    test_hours: Optional[float] = None
    books_limit: int = 0
    test_books: Optional[int] = None
    dev_books: Optional[int] = None
    min_minutes: float = 5.0
    max_minutes: float = 15.0
    mean_seconds: float = 15.0
    max_seconds: float = 30.0
    recordings_per_speaker: int = 6
    seed: int = 20230915
    workers: int = 2

    def __post_init__(self) -> None:
        check_choice(self.subset, SUBSETS, "LibrilikeOptions.subset")
        for name in ("hours", "dev_hours", "test_hours", "books_limit", "seed"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"LibrilikeOptions.{name}", "be at least 0", value)
        rule = "be at least 2: test_clean and test_other share no book"
        enough = self.test_books is None or self.test_books >= 2
        check(enough, "LibrilikeOptions.test_books", rule, self.test_books)
        enough = self.dev_books is None or self.dev_books >= 1
        check(enough, "LibrilikeOptions.dev_books", "be at least 1", self.dev_books)
        check_at_least(1, self, "workers")
        self.sizes()
        check(any(self.set_hours().values()), "LibrilikeOptions.hours", "leave one set at least", self.hours)

    def sizes(self) -> Sizes:
        """Return how long recordings and utterances are, checked."""
        return Sizes(**{size.name: getattr(self, size.name) for size in fields(Sizes)})

    def set_hours(self) -> dict[str, float]:
        """Return the hours of each set."""
        tenth = max(0.005, self.hours / 10) if self.hours else 0.0
        dev = tenth if self.dev_hours is None else self.dev_hours
        test = tenth if self.test_hours is None else self.test_hours
        return {"dev": dev, "test_clean": test, "test_other": test, self.subset: self.hours}


@dataclass(frozen=True)
class _Job:
    """A recording to make; ``part`` is the file of its cuts, written last."""

    chapter: Chapter
    conditions: tuple[Conditions, ...]
    part: Path
    fingerprint: str


def run(options: LibrilikeOptions) -> int:
    """Write the recordings, texts and manifests of all sets; return 0."""
    out = Path(options.out)
    books = books_of_sets(options)
    totals = {}
    for name, hours in options.set_hours().items():
        if hours == 0:
            continue
        jobs = _plan(options, name, hours, books[name])
        todo = [job for job in jobs if not _is_done(job, out)]
        print(f"{name}: {len(jobs)} recordings, {len(jobs) - len(todo)} already made")
        seconds = sum(job.chapter.seconds for job in jobs)
        with tqdm(total=round(seconds), unit="s", desc=name, smoothing=0.05) as bar:
            bar.update(round(seconds - sum(job.chapter.seconds for job in todo)))
            for done in in_workers(functools.partial(_make, options), todo, options.workers, in_order=False):
                bar.update(round(done))
        totals[name] = _join(jobs, out / "libriheavy" / f"libriheavy_cuts_{name}.jsonl.gz")
        print("{}: {hours:.3f} h, {cuts} cuts, {speakers} speakers -> {path}".format(name, **totals[name]))
    write_json(out / "librilike.json", {"options": asdict(options), "sets": totals})
    return DONE


def books_of_sets(options: LibrilikeOptions) -> dict[str, list[Path]]:
    """Return the books of each set; none is in two of them."""
    count = len(list(Path(options.text).glob("[!.]*.txt")))
    test_books = options.test_books or min(12, max(2, count // 10))
    dev_books = options.dev_books or min(8, max(1, count // 15))
    splits = split_books(options.text, test_books, dev_books)
    test = splits["test"]
    sets = {"dev": splits["dev"], "test_clean": test[0::2], "test_other": test[1::2]}
    sets[options.subset] = splits["train"]
    limit = options.books_limit or None
    sets = {name: books[:limit] for name, books in sets.items()}
    titles: dict[str, Path] = {}
    for path in itertools.chain(*sets.values()):
        other = titles.setdefault(title_of(path), path)
        check(other == path, f"book {path.name!r}", f"differ from {other.name!r} in letters", path.stem)
    return sets


def _plan(options: LibrilikeOptions, name: str, hours: float, books: Sequence[Path]) -> list[_Job]:
    out = Path(options.out)
    population = "train" if name == options.subset else name
    speakers = SPEAKERS[population.replace("_", "-")]

    texts: dict[str, str] = {}  # path: digest

    def keep_text(path: str, data: bytes) -> None:
        texts[path] = hashlib.sha1(data).hexdigest()
        target = out / path
        if not target.exists() or target.read_bytes() != data:
            write_text(target, data.decode("utf-8"))

    subsets = (name,) if name == options.subset else EVALUATION_SUBSETS
    planner = Planner(
        name, subsets, books, speakers, FIRST_SPEAKER[name], options.sizes(), options.seed, keep_text
    )
    jobs = []
    with tqdm(total=round(hours * 3600), unit="s", desc=f"plan of {name}") as bar:
        for chapter in planner.chapters(hours * 3600):
            conditions = CONDITIONS[population]
            content = [FORMAT, options.seed, options.max_seconds, options.mean_seconds]
            content += [repr(chapter), texts[chapter.text_path], repr(conditions)]
            fingerprint = hashlib.sha1(json.dumps(content).encode("utf-8")).hexdigest()[:16]
            part = out / ".librilike" / name / f"{chapter.recording.replace('/', '__')}.jsonl"
            jobs.append(_Job(chapter, conditions, part, fingerprint))
            bar.update(round(chapter.seconds))
    return jobs


def _is_done(job: _Job, out: Path) -> bool:
    """Return whether a recording is there, whole, and made with these options from this text."""
    audio = out / audio_path(job.chapter)
    if not (job.part.is_file() and audio.is_file()):
        return False
    with open(job.part, encoding="utf-8") as lines:
        head = json.loads(next(lines, "{}"))
    return head == {"fingerprint": job.fingerprint, "bytes": audio.stat().st_size}


def _make(options: LibrilikeOptions, job: _Job) -> float:
    out = Path(options.out)
    text = (out / job.chapter.text_path).read_bytes()
    samples, cuts = record(job.chapter, text, job.conditions, options.sizes(), options.seed)
    audio = out / audio_path(job.chapter)
    with atomic_path(audio) as temporary:
        soundfile.write(temporary, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    head = {"fingerprint": job.fingerprint, "bytes": audio.stat().st_size}
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *cuts)]
    write_text(job.part, "".join(lines))  # last: its presence says that the recording is whole
    return job.chapter.seconds


def _join(jobs: Sequence[_Job], target: Path) -> dict[str, Any]:
    """Write the manifest of a set; the same cuts give the same bytes."""
    seconds, count = 0.0, 0
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as out:
            for job in jobs:
                for line in job.part.read_bytes().splitlines(keepends=True)[1:]:
                    seconds += json.loads(line)["duration"]
                    count += 1
                    out.write(line)
    return {
        "hours": seconds / 3600,
        "cuts": count,
        "recordings": len(jobs),
        "speakers": len({job.chapter.speaker for job in jobs}),
        "path": str(target),
    }


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the tool; return the exit code of the project: 0 done, 2 refused, 130 stopped by the keyboard."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    plain = [_OPTION.sub(lambda name: "--" + name[1].replace("-", "_"), word) for word in arguments]
    try:
        return run(parse_options(LibrilikeOptions, plain, "python tools/make_librilike.py"))
    except (ValueError, TypeError, OSError, ModuleNotFoundError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
