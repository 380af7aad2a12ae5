"""One decode by several processes under torchrun: who decodes what, and one set of files in the end.
Knows: run logs, processes. Must not know: models, searches, methods, word errors.

Each process writes logs of its own in ``rank-N/`` of the output folder. The first one takes what is there
into the folder's own logs, at the start (what a killed run has left, by any number of processes) and at the
end; so a run can go on with more or fewer processes than it began with.
"""
from __future__ import annotations

import contextlib
import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence, TypeVar

from icefall_fusion.common.devices import join_processes
from icefall_fusion.common.files import PathLike
from icefall_fusion.decode.run_files import MethodLog

Item = TypeVar("Item")
_SLOWEST = datetime.timedelta(days=7)  # until the last process of a decode has to be there


@dataclass(frozen=True)
class Processes:
    """The processes of a decode.

    Args:
        rank: number of this one.
        world: how many there are.
        local_rank: number of this one on its machine, that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Processes:
        """Return what torchrun's environment says; several processes find each other (gloo)."""
        rank, world, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
        if world > 1:
            join_processes("gloo", timeout=_SLOWEST)
        return cls(rank, world, local)

    def device(self, name: str) -> str:
        """Return the device of this process: ``cuda`` without a number becomes that of its own GPU."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world > 1 else name

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return every ``world``-th item."""
        return list(items[self.rank :: self.world])

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank; it waits for all."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


class ShardedLog:
    """The run log of one method on one test set, written by several processes.

    Args:
        processes: all of them make this object, with the same arguments.
        folder: of the run.
        test_set: its name.
        method: its name.
        options: what the method received.
        restart: drop what is there.

    Attributes:
        done: ids of the utterances that were finished before.

    Raises:
        ValueError: what is there was made with other options, or holds an utterance twice.
    """

    def __init__(
        self, processes: Processes, folder: PathLike, test_set: str, method: str,
        options: Mapping[str, Any], restart: bool = False,
    ) -> None:  # fmt: skip
        self._processes, self._folder = processes, Path(folder)
        self._names = (test_set, method, options)
        if processes.rank == 0:
            for part in self._parts() if restart else ():
                MethodLog(part, *self._names, restart=True).remove()
            self.whole = MethodLog(folder, *self._names, restart)
            self._absorb()
        self.done: frozenset[str] = processes.gather(
            frozenset(self.whole.done) if processes.rank == 0 else None
        )[0]
        if processes.world == 1:
            self._mine = self.whole
        else:
            self._mine = MethodLog(self._folder / f"rank-{processes.rank}", *self._names)

    def append(self, nbests: Sequence[Any], work: Mapping[str, Any]) -> None:
        """Write the lists of a batch, then its line of work."""
        self._mine.append(nbests, work)

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
            missing = sorted(set(wanted) - self.whole.done.keys())
            if missing:
                raise RuntimeError(
                    f"{self._folder}: {len(missing)} utterances of {self._names[0]} are missing after all "
                    f"processes have finished, e.g. {missing[:3]}"
                )

    def _parts(self) -> list[Path]:
        test_set, method, _ = self._names
        return sorted(path.parent for path in self._folder.glob(f"rank-*/work-{test_set}-{method}.jsonl"))

    def _absorb(self) -> None:
        """Take all processes' batches into the whole, then remove theirs; a kill between is harmless."""
        known = {tuple(line["ids"]) for line in self.whole.work}
        for part in self._parts():
            log = MethodLog(part, *self._names)
            for line in log.work:
                ids = line["ids"]
                if tuple(ids) in known:  # a kill came between taking and removing
                    continue
                doubled = sorted(set(ids) & self.whole.done.keys())
                if doubled:
                    raise ValueError(
                        f"{part} must hold each utterance once, but {len(doubled)} are decoded already, "
                        f"e.g. {doubled[:3]}"
                    )
                work = {name: value for name, value in line.items() if name != "ids"}
                self.whole.append([log.done[utterance] for utterance in ids], work)
            log.remove()
            with contextlib.suppress(OSError):  # logs of other methods are there
                part.rmdir()
