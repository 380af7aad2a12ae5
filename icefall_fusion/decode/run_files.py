"""The files that a decode writes as it goes, one a method and test set; a kill loses one batch.
Knows: JSON lines, N-best lists, options as plain values, processes. Must not know: methods, models, searches.
"""
from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from icefall_fusion.common.counters import add_counters
from icefall_fusion.common.files import PathLike, name_full_disk
from icefall_fusion.common.processes import Processes
from icefall_fusion.nbest import NBest, to_json


class RunFile(Mapping[str, NBest]):
    """The N-best lists of one method on one test set by utterance, and their cost.

    ``nbest-<test set>-<method>.jsonl``: the first line has the options, each other line a batch,
    ``{"lists": [...], "cost": {...}}``. A last line that a kill cut short is dropped on opening.
    Lists stay in the file (those of many hours would fill memory) and are read when asked for.

    Args:
        folder: of the run.
        test_set: part of the file's name.
        method: part of the file's name.
        options: of the method; a run goes on only under the same.
        restart: drop the lists of an earlier run.

    Attributes:
        costs: ids and cost of each batch.

    Raises:
        ValueError: the file was made with other options (the first that differs is named), by an older
            version, or a line is damaged. The file stays as it is.
    """

    def __init__(
        self, folder: PathLike, test_set: str, method: str, options: Mapping[str, Any], restart: bool = False
    ) -> None:
        self.path = Path(folder) / f"nbest-{test_set}-{method}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.costs: list[tuple[list[str], dict[str, float]]] = []
        self._positions: dict[str, tuple[int, int]] = {}  # byte of its line, index in the line
        self._line: tuple[int, list[Any]] = (-1, [])  # the line that was read last
        self._end = 0
        options = json.loads(json.dumps(options))  # as they will be read back
        if restart or not self._read(options, method):
            with name_full_disk(self.path):
                self.path.write_text(to_json({"options": options}) + "\n", encoding="utf-8")
            self._end = self.path.stat().st_size
        self._file = open(self.path, "r+b")
        if self.path.stat().st_size > self._end:
            self._file.truncate(self._end)

    def _read(self, options: Mapping[str, Any], method: str) -> bool:
        """Read an earlier run; return whether it has a batch (without one other options do no harm)."""
        if not self.path.exists():
            return False
        before: Mapping[str, Any] = {}
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    value = json.loads(line)
                    if number == 1:
                        before = dict(value["options"])
                    else:
                        lists = [NBest.from_plain(plain) for plain in value["lists"]]
                        self._note([nbest.utterance for nbest in lists], dict(value["cost"]))
                except (KeyError, TypeError, ValueError) as error:
                    rule = '"options"' if number == 1 else '"lists" and "cost"'
                    raise ValueError(
                        f"{self.path}, line {number}, must be a JSON object with {rule}, but is "
                        f"{line[:60]!r} (damaged or of another version): out must be a new folder "
                        "(or --restart true, which drops the file)"
                    ) from error
                self._end += len(line)
        if not self.costs:
            self._end = 0
            return False
        for name in sorted({*options, *before}):
            then, now = before.get(name), options.get(name)
            if then != now:
                raise ValueError(
                    f"out must be a new folder (or --restart true), for {self.path.parent} holds a run "
                    f"of {method} with {name} = {then!r}, which is now {now!r}"
                )
        return True

    def _note(self, ids: list[str], cost: Mapping[str, float]) -> None:
        self.costs.append((ids, dict(cost)))
        self._positions.update({name: (self._end, index) for index, name in enumerate(ids)})

    def append(self, nbests: Sequence[NBest], cost: Mapping[str, float]) -> None:
        """Write the lists of a batch and their cost."""
        line = to_json({"lists": [nbest.as_plain() for nbest in nbests], "cost": cost}).encode() + b"\n"
        with name_full_disk(self.path):
            self._file.seek(self._end)
            self._file.write(line)
            self._file.flush()
        self._note([nbest.utterance for nbest in nbests], cost)
        self._end += len(line)

    def __getitem__(self, utterance: str) -> NBest:
        begin, index = self._positions[utterance]
        if self._line[0] != begin:
            with open(self.path, "rb") as file:
                file.seek(begin)
                self._line = begin, json.loads(file.readline())["lists"]
        return NBest.from_plain(self._line[1][index])

    def __contains__(self, utterance: object) -> bool:
        return utterance in self._positions

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def totals(self) -> dict[str, float]:
        """Return all costs, added up as `add_counters` does."""
        totals: dict[str, float] = {}
        for _, cost in self.costs:
            add_counters(totals, cost)
        return totals

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def remove(self) -> None:
        """Close the file and delete it."""
        self.close()
        self.path.unlink()


class SharedRunFile:
    """The file of one method on one test set, written by several processes.

    Each process writes a file of its own in ``rank-N/`` of the folder. The first process moves their batches
    into the folder's own file, at the start (those of a killed run, by any number of processes) and at the
    end. So a run can go on with more or fewer processes than it began with.

    Args:
        processes: all of them make this object, with the same arguments.
        folder: of the run.
        test_set: its name.
        method: its name.
        options: of the method.
        restart: drop the lists of an earlier run.

    Attributes:
        done: ids of the utterances that were finished before.
        whole: the folder's own file, in the first process.

    Raises:
        ValueError: an earlier run was made with other options, or holds an utterance twice.
    """

    def __init__(
        self, processes: Processes, folder: PathLike, test_set: str, method: str,
        options: Mapping[str, Any], restart: bool = False,
    ) -> None:
        self._processes, self._folder = processes, Path(folder)
        self._names = (test_set, method, options)
        if processes.rank == 0:
            for rank in self._rank_folders() if restart else ():
                RunFile(rank, *self._names, restart=True).remove()
            self.whole = RunFile(folder, *self._names, restart)
            self._absorb()
        ids = frozenset(self.whole) if processes.rank == 0 else None
        self.done: frozenset[str] = processes.gather(ids)[0]
        if processes.world == 1:
            self._mine = self.whole
        else:
            self._mine = RunFile(self._folder / f"rank-{processes.rank}", *self._names)

    def append(self, nbests: Sequence[NBest], cost: Mapping[str, float]) -> None:
        """Write the lists of a batch and their cost."""
        self._mine.append(nbests, cost)

    def finish(self, wanted: Iterable[str]) -> None:
        """Wait for all processes; in the first one, ``whole`` then holds everything.

        Args:
            wanted: ids of all utterances but those that could not be read by any process.

        Raises:
            RuntimeError: an utterance is missing.
        """
        if self._processes.world == 1:
            return
        self._mine.close()
        self._processes.gather(None)
        if self._processes.rank == 0:
            self._absorb()
            missing = sorted(set(wanted) - self.whole.keys())
            if missing:
                raise RuntimeError(
                    f"{self._folder}: {len(missing)} utterances of {self._names[0]} are missing after all "
                    f"processes have finished, e.g. {missing[:3]}"
                )

    def _rank_folders(self) -> list[Path]:
        test_set, method, _ = self._names
        return sorted(path.parent for path in self._folder.glob(f"rank-*/nbest-{test_set}-{method}.jsonl"))

    def _absorb(self) -> None:
        """Move the batches of all processes into the whole; a kill in between is harmless."""
        known = {tuple(ids) for ids, _ in self.whole.costs}
        for folder in self._rank_folders():
            share = RunFile(folder, *self._names)
            for ids, cost in share.costs:
                if tuple(ids) in known:  # a kill came between copying and removing
                    continue
                doubled = sorted(set(ids) & self.whole.keys())
                if doubled:
                    raise ValueError(
                        f"{folder} must hold each utterance once, but {len(doubled)} are decoded already, "
                        f"e.g. {doubled[:3]}"
                    )
                self.whole.append([share[utterance] for utterance in ids], cost)
            share.remove()
            with contextlib.suppress(OSError):  # files of other methods are there
                folder.rmdir()
