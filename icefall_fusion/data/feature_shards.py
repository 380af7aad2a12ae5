"""Knows: a manifest in shards: the cuts of each, where their features lie, who was first; joining them again.
Must not know: how features are computed, models.

Of a manifest ``manifests/CORPUS_cuts_SPLIT.jsonl.gz`` there are

    manifests/.parts/CORPUS_cuts_SPLIT/NUMBER-AUDIO-LINES.jsonl.gz   the cuts of a shard, and plan-KEY.json
    fbank/.parts/SPLIT/NUMBER-AUDIO.jsonl.gz                         of each cut: features or an error
    fbank/SPLIT/NUMBER-AUDIO-TOKEN.lca                               the features; TOKEN is new every time

AUDIO is a digest of all that the features depend on, LINES of all lines of the manifest: features stay
good when texts change. Each file gets its name when it is whole, no name is ever written twice with
other content, and a shard's list of features is the last of its files: machines that share the folder may
compute the same shard, and any one may be killed. Memory does not depend on the number of cuts.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

from tqdm import tqdm

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import atomic_path, fingerprint, write_json
from icefall_fusion.data.cut_lines import parse_cut, read_lines
from icefall_fusion.data.manifests import SeenIds

SPEEDS = (0.9, 1.1)  # of the copies that speed perturbation adds
_FORMAT = 1  # of shards: a change makes new names
_STALE = 24 * 3600  # seconds; temporary files of before were left by killed processes


@dataclass(frozen=True)
class Shard:
    """A piece of work.

    Attributes:
        number: of the shard in the manifest, from 0.
        count: number of cuts.
        cuts: their manifest.
        features: JSON lines, one for each cut: {"id", "features"} or {"id", "error"}; there when all is done.
    """

    number: int
    count: int
    cuts: Path
    features: Path

    def new_archive(self) -> Path:
        """Return a path for features that nobody else will write."""
        name = self.features.name.partition(".")[0]
        return self.features.parents[2] / self.features.parent.name / f"{name}-{secrets.token_hex(4)}.lca"

    def publish(self, made: Iterable[dict[str, Any]], archive: Path, again: bool) -> None:
        """Write the list of the features in ``archive``; drop that where another process was faster.

        Args:
            made: lines of `features`.
            archive: that they refer to.
            again: replace a list that is there (its archive stays: a joined manifest may refer to it).
        """
        if self.features.exists() and not again:
            archive.unlink(missing_ok=True)
            return
        _write_lines(self.features, (json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in made))

    def has_errors(self) -> bool:
        """Return whether the features of some cut are missing."""
        return any("error" in json.loads(line) for _, line in read_lines(self.features))


def plan(source: Path, fbank: Path, split: str, size: int, kind: str, perturb: bool) -> list[Shard]:
    """Return the shards of a manifest; it is read, line by line, only where no such plan is there yet.

    Args:
        source: the manifest.
        fbank: the folder of features.
        split: its folder there.
        size: cuts of the manifest in a shard.
        kind: of the features; other kinds have other names.
        perturb: add a copy of every cut at each of SPEEDS.

    Raises:
        ValueError: a line is no cut of one recording, or has the id of an earlier one; the message has its
            number.
    """
    folder = source.parent / ".parts" / source.name.partition(".")[0]
    rule = [fingerprint(source), size, kind, SPEEDS if perturb else (), _FORMAT]
    listed = folder / f"plan-{_digest([json.dumps(rule).encode()])}.json"
    names: list[list[Any]] = []
    if listed.is_file():
        names = json.loads(listed.read_text(encoding="utf-8"))["shards"]
    if not names or not all((folder / name).is_file() for name, _ in names):
        lines = tqdm(read_lines(source), unit="cut", desc=f"plan {split}", smoothing=0.05)
        names = list(_split(lines, source, folder, size, kind, perturb))
        write_json(listed, {"source": str(source), "shard_size": size, "shards": names})
    parts = fbank / ".parts" / split
    _sweep(folder, parts, fbank / split)
    return [
        Shard(number, count, folder / name, parts / f"{name.rpartition('-')[0]}.jsonl.gz")
        for number, (name, count) in enumerate(names)
    ]


def _split(
    lines: Iterable[tuple[int, bytes]], source: Path, folder: Path, size: int, kind: str, perturb: bool
) -> Iterator[list[Any]]:
    lines, seen = iter(lines), SeenIds()
    for number in itertools.count():
        chunk = [
            copy
            for place, line in itertools.islice(lines, size)
            for copy in _copies(line, f"{source}, line {place}", SPEEDS if perturb else (), seen)
        ]
        if not chunk:
            return
        audio = _digest([kind.encode(), *(about for about, _ in chunk)])
        name = f"{number:05d}-{audio}-{_digest(line for _, line in chunk)}.jsonl.gz"
        if not (folder / name).exists():
            _write_lines(folder / name, (line for _, line in chunk))
        yield [name, len(chunk)]


def _copies(
    line: bytes, where: str, speeds: Sequence[float], seen: SeenIds
) -> Iterator[tuple[bytes, bytes]]:
    """Yield (all that the features depend on, line) of a cut and of its copies at other speeds."""
    try:
        data = json.loads(line)
        recording = data["recording"]
        sources = [source["source"] for source in recording["sources"]]
        about = [data["id"], data["start"], data["duration"], data.get("channel"), sources]
        about += [recording["sampling_rate"], recording["num_samples"], recording.get("transforms")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no cut of one recording: {error!r}") from None
    check(seen.add(str(data["id"])), where, "have an id of its own (results are kept by id)", data["id"])
    yield json.dumps(about).encode(), line if line.endswith(b"\n") else line + b"\n"
    for speed in speeds:
        copy = parse_cut(line, where).perturb_speed(speed).to_dict()
        yield from _copies(json.dumps(copy, ensure_ascii=False).encode(), where, (), seen)


def joined_lines(shards: Sequence[Shard], skip: Callable[[str, str], None]) -> Iterator[str]:
    """Yield the lines of the cuts with their features.

    Args:
        shards: all of them are done.
        skip: called with (id, error) of each cut without features.

    Raises:
        ValueError: the list of features is not that of the cuts.
    """
    for shard in shards:
        for pair in itertools.zip_longest(read_lines(shard.cuts), read_lines(shard.features)):
            cut, made = (json.loads(line[1]) if line else {"id": None} for line in pair)
            if cut["id"] != made["id"]:
                raise ValueError(f"{shard.features} is not of {shard.cuts}: remove it and run this again")
            if "error" in made:
                skip(made["id"], made["error"])
            else:
                cut["features"] = made["features"]
                yield json.dumps(cut, ensure_ascii=False) + "\n"


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as text: "3-5, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _sweep(*folders: Path) -> None:
    """Remove temporary files that were last written a day ago: their processes were killed."""
    for folder in folders:
        for path in folder.glob(".*"):
            try:
                if path.is_file() and time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()
            except FileNotFoundError:  # another machine was faster
                continue


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha1()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:10]


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write a gzipped file at once; the same lines give the same bytes."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=5, fileobj=raw, mtime=0) as file,
    ):
        file.writelines(lines)
