"""Knows: lhotse cuts of one utterance each, JSON lines of utterances, where manifests lie.
Must not know: how audio or features are made, models.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence, TypeVar

import numpy as np
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from lhotse.supervision import AlignmentItem

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path
from icefall_fusion.data.books import read_jsonl
from icefall_fusion.text.scripts import split_units

SAMPLE_RATE = 16_000  # Hz
Item = TypeVar("Item")


def cuts_path(folder: PathLike, split: str, corpus: str = "minibooks") -> Path:
    """Return the name of a split's manifest of a corpus in ``folder``."""
    return Path(folder) / f"{corpus}_cuts_{split}.jsonl.gz"


def check_corpus(corpus: str, name: str) -> None:
    """Raise ValueError unless manifests can be named by ``corpus``, the value of the option ``name``."""
    check(corpus != "" and "/" not in corpus, name, "be a name without a slash", corpus)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return ``count`` of the items, spread evenly over them and in their order; 0 (or too many): all.

    A manifest is sorted by book or speaker: its first utterances would be those of one.
    """
    if not 0 < count < len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def read_utterances(path: PathLike, required: Sequence[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, each of which must have the keys ``required`` and its own id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken line, a missing key, or an id that occurs twice.
    """
    rows, seen = [], set()
    for number, row in enumerate(read_jsonl(path, required), 1):
        check(row["id"] not in seen, f"{path}, line {number}", "have an id of its own", row["id"])
        seen.add(row["id"])
        rows.append(row)
    return rows


class SeenIds:
    """Ids that have occurred, as 8-byte digests: some 100 MB for the 12 million cuts of LibriHeavy."""

    _RECENT = 2**17  # digests in a set, before they are sorted into the others

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted = np.zeros(0, np.uint64)

    def add(self, id: str) -> bool:
        """Return whether the id is new, and remember it."""
        digest = int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")
        index = int(np.searchsorted(self._sorted, np.uint64(digest)))
        if digest in self._recent or (index < len(self._sorted) and int(self._sorted[index]) == digest):
            return False
        self._recent.add(digest)
        if len(self._recent) == self._RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate((self._sorted, recent)), kind="stable")
            self._recent.clear()
        return True


def cut_of(utterance: Mapping[str, Any], audio: Path, num_samples: int, made: Mapping[str, Any]) -> MonoCut:
    """Return the cut of one utterance.

    Args:
        utterance: id and text, maybe cased, book, index (kept as the supervision's custom fields).
        audio: the file.
        num_samples: its length at 16 kHz.
        made: how it was made; ``voice`` becomes the speaker, ``words`` (word, start, end in seconds) the
            alignment ``word``, ``language`` that of the text (English), the rest custom fields.
    """
    seconds = num_samples / SAMPLE_RATE
    id = utterance["id"]
    source = AudioSource(type="file", channels=[0], source=str(audio))
    recording = Recording(id, [source], SAMPLE_RATE, num_samples, seconds)
    custom = {key: utterance[key] for key in ("cased", "book", "index") if key in utterance}
    custom.update({key: value for key, value in made.items() if key not in ("voice", "words", "language")})
    items = [AlignmentItem(word, start, round(end - start, 6)) for word, start, end in made.get("words", ())]
    supervision = SupervisionSegment(
        id,
        id,
        0.0,
        seconds,
        0,
        text=utterance["text"],
        language=made.get("language", "English"),
        speaker=made["voice"],
        custom=custom,
        alignment={"word": items} if "words" in made else None,
    )
    return MonoCut(id, 0.0, seconds, 0, recording=recording, supervisions=[supervision])


def span_of(cut: MonoCut, recording: str, first: int, num_samples: int) -> MonoCut:
    """Return a cut of `cut_of` as a part of the recording that its file holds.

    Args:
        cut: as if its file held nothing else.
        recording: id of the recording.
        first: sample at 16 kHz at which the cut begins.
        num_samples: length of the recording at 16 kHz.
    """
    seconds = num_samples / SAMPLE_RATE
    whole = Recording(recording, cut.recording.sources, SAMPLE_RATE, num_samples, seconds)
    said = [dataclasses.replace(one, recording_id=recording) for one in cut.supervisions]
    return dataclasses.replace(cut, start=first / SAMPLE_RATE, recording=whole, supervisions=said)


def write_cuts(cuts: Iterable[MonoCut], path: PathLike) -> None:
    """Write a manifest at once."""
    with (
        atomic_path(path) as temporary,
        gzip.open(temporary, "wt", encoding="utf-8", compresslevel=5) as lines,
    ):
        for cut in cuts:
            lines.write(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n")


def join_shards(shards: Sequence[Path], target: PathLike) -> dict[str, Any]:
    """Join manifests into one, at once, and return its totals: hours, utterances, words, speakers."""
    return join_lines(itertools.chain.from_iterable(map(_lines, shards)), target)


def join_lines(lines: Iterable[str], target: PathLike) -> dict[str, Any]:
    """Write lines of cuts as a manifest, at once, and return its totals as `join_shards`."""
    seconds, utterances, words = 0.0, 0, 0
    speakers = set()
    with (
        atomic_path(target) as temporary,
        gzip.open(temporary, "wt", encoding="utf-8", compresslevel=5) as out,
    ):
        for line in lines:
            cut = json.loads(line)
            supervision = cut["supervisions"][0]
            seconds += cut["duration"]
            utterances += 1
            words += len(split_units(supervision["text"]))
            speakers.add(supervision.get("speaker"))
            out.write(line)
    return {"hours": seconds / 3600, "utterances": utterances, "words": words, "speakers": len(speakers)}


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from lines
