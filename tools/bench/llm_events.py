"""Fusion events of a real decode: recorded once, kept in a file, read where neither speech nor models travel.
Knows: token trees, decoding jobs (to record). Must not know: what scores the events.

A file is JSON, compressed where its name ends in .gz: seconds of audio, how it was decoded, and of each batch
its number of utterances and its events. A path is written as how much it shares with the one before, and the
rest.
"""
from __future__ import annotations

import argparse
import gzip
import json
import zlib
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import numpy as np
from torch import Tensor

from icefall_fusion.lm.tree_scorer import TreeOptions, TreeScorer

Path_ = tuple[int, ...]


class Event(NamedTuple):
    """Hypotheses to score together: utterance of each [n], and tokens of each.

    Args:
        utterances, paths: of the hypotheses.
        ends: whether the end of the text is scored, too.
        kept: utterances and paths that lived on when the tree was cleaned after it; None: it was not.
    """

    utterances: list[int]
    paths: list[Path_]
    ends: bool
    kept: Optional[tuple[list[int], list[Path_]]] = None


class Recording(NamedTuple):
    """Events of some batches.

    Args:
        batches: of each its number of utterances and its events.
        audio_seconds: of all batches.
        told: how they were decoded.
    """

    batches: list[tuple[int, list[Event]]]
    audio_seconds: float
    told: dict[str, Any]

    def tokens(self) -> int:
        """Return the number of tokens that a model of these events knows at least."""
        paths = (path for _, events in self.batches for event in events for path in event.paths)
        return 1 + max((max(path) for path in paths if path), default=0)

    def first(self, events: int) -> Recording:
        """Return the first ``events`` events of each batch; 0: all."""
        if not events:
            return self
        return self._replace(batches=[(batch, found[:events]) for batch, found in self.batches])


class RecordingScorer(TreeScorer):
    """A tree that notes what it is asked."""

    events: list[Event]

    def launch(self, nodes: Any, eos: bool = False) -> Callable[[], Tensor]:
        self.events.append(Event(*self._paths(nodes), eos))
        return super().launch(nodes, eos)

    def keep(self, live: Any) -> None:
        if self.events:
            self.events[-1] = self.events[-1]._replace(kept=self._paths(live))
        super().keep(live)

    def _paths(self, nodes: Any) -> tuple[list[int], list[Path_]]:
        flat = np.asarray(nodes).reshape(-1)
        return self.tree.utterance[flat].tolist(), [tuple(self.tree.path(int(node))) for node in flat]


def record(args: argparse.Namespace) -> Recording:
    """Decode speech by delayed fusion with the shipped models and note every event.

    Args:
        args: of the command line: those of `speech`, ``interval``, ``beam`` and ``batch``.
    """
    import speech

    from icefall_fusion.decode.job import DecodeRun
    from icefall_fusion.search import PrefixSearchOptions

    sets = speech.manifests(args)
    options = speech.decode_options(
        args, f"{args.speech}/decode", sets, methods=[f"llm-delayed-interval-{args.interval}"],
        search=PrefixSearchOptions(beam=args.beam), batch_size=args.batch,
    )
    decode = DecodeRun(options)
    lm, batches = decode.recognizer.models.get("llm"), []

    def open_tree(batch: int, *unused: Any, **also: Any) -> TreeScorer:
        scorer = RecordingScorer(lm, [[lm.bos_id]] * batch, TreeOptions())
        scorer.events = []
        batches.append((batch, scorer.events))
        return scorer

    lm.open_tree = open_tree
    rows = decode.decode_all()
    told = {"interval": args.interval, "beam": args.beam, "batch": args.batch, "vocab_size": lm.vocab_size}
    return Recording(batches, sum(row["audio_seconds"] for row in rows), told)


def write_events(file: str, recording: Recording) -> None:
    """Write events to a file; the same events give the same bytes."""
    batches = [
        {"batch": batch, "events": [
            {"utterances": event.utterances, "paths": _shortened(event.paths), "ends": event.ends,
             "kept": None if event.kept is None else [event.kept[0], _shortened(event.kept[1])]}
            for event in events
        ]}
        for batch, events in recording.batches
    ]
    whole = {"audio_seconds": recording.audio_seconds, "told": recording.told, "batches": batches}
    data = json.dumps(whole, separators=(",", ":")).encode()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_bytes(gzip.compress(data, mtime=0) if file.endswith(".gz") else data)


def read_events(file: str) -> Recording:
    """Read what `write_events` wrote.

    Raises:
        ValueError: the file is no recording.
    """
    data = Path(file).read_bytes()
    try:
        whole = json.loads(gzip.decompress(data) if file.endswith(".gz") else data)
        batches = [
            (batch["batch"], [
                Event(event["utterances"], _lengthened(event["paths"]), event["ends"],
                      event["kept"] and (event["kept"][0], _lengthened(event["kept"][1])))
                for event in batch["events"]
            ])
            for batch in whole["batches"]
        ]
        return Recording(batches, whole["audio_seconds"], whole["told"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--events must be a file of --record, but {file} is none ({reason})") from error


def _shortened(paths: Sequence[Path_]) -> list[list[int]]:
    """Return for each path how many tokens it shares with the path before it, and its other tokens."""
    result, before = [], ()
    for path in paths:
        shared = 0
        while shared < min(len(path), len(before)) and path[shared] == before[shared]:
            shared += 1
        result.append([shared, *path[shared:]])
        before = path
    return result


def _lengthened(rows: Sequence[Sequence[int]]) -> list[Path_]:
    paths, before = [], ()
    for shared, *rest in rows:
        before = (*before[:shared], *rest)
        paths.append(before)
    return paths
