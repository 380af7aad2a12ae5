"""Knows: batches of like duration from the lines of a manifest, in lhotse's order; how they resume.
Must not know: JSON of cuts, features, audio, models.

`Epoch` makes the batches of lhotse's DynamicBucketingSampler from the same cuts (shuffled, the same bucket
for all processes; a test compares them). It holds lines instead of cuts, which is 3 to 5 times as fast. Its
position is a few numbers: lhotse's own resumes by making all batches of the epoch once more. Unlike lhotse's,
epochs differ in the order of buckets and in the order in which the manifest is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import zlib
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import torch.distributed as dist
from lhotse.dataset.sampling.base import TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import fingerprint
from icefall_fusion.data.cut_lines import CutLine, cut_line, read_cut_lines, read_lines

BINS_FROM = 10_000  # cuts, the first ones, whose durations part the buckets
SNAPSHOT_EVERY = 500  # groups of batches; to resume, fewer than these are made once more
BLOCK = 100  # lines of the manifest that stay together when it is shuffled
_BUCKET_SEED = 1234  # of lhotse's choice of buckets, which all processes share; seed and epoch are added
Group = list[list[CutLine]]


@dataclass(frozen=True)
class Rules:
    """What the order of batches depends on, beside the manifest and the epoch.

    Args:
        shortest: seconds; shorter cuts are left out.
        longest: seconds; longer cuts are left out.
        max_duration: seconds of audio in a batch, padding included.
        num_buckets: groups of like duration.
        seed: of the order.
        buffer: cuts held in all buckets together, from which batches are drawn.
        world: processes that share the batches: each group has one for every process.
    """

    shortest: float
    longest: float
    max_duration: float
    num_buckets: int
    seed: int
    buffer: int = 20_000  # as lhotse's
    world: int = 1

    def key(self, manifest: Path) -> str:
        """Return a digest of the rules and of the manifest: positions are good for the same one only."""
        content = json.dumps([dataclasses.astuple(self), fingerprint(manifest)])
        return hashlib.sha1(content.encode()).hexdigest()[:16]


def process() -> tuple[int, int]:
    """Return (rank, number of processes), as lhotse's samplers determine them."""
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def epoch_lines(manifest: Path, seed: int, epoch: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of a manifest in the order of an epoch; nothing is held in memory.

    Epoch 0 has the order of the file. Later ones read it twice: by lot, each block of lines has its turn in
    the first or in the second pass.
    """
    if epoch == 0:
        yield from read_lines(manifest)
        return
    for turn in (0, 1):
        chance = random.Random(f"{seed} {epoch}")  # both passes draw the same
        for number, line in read_lines(manifest):
            if number % BLOCK == 1:
                drawn = chance.randrange(2)
            if drawn == turn:
                yield number, line


class Epoch:
    """The groups of batches of one epoch; memory does not grow with the manifest.

    Args:
        manifest: of cuts, read line by line.
        rules: see there.
        epoch: number of the epoch, part of the seed.
        position: of the group to begin with, as `position` returned it there; None: the first group.
        bins: those of another epoch, which are the same; None: they are looked for.

    Attributes:
        groups: how many were made before.
        bins: durations in seconds that part the buckets.
    """

    def __init__(
        self, manifest: Path, rules: Rules, epoch: int, position: Optional[dict[str, Any]] = None,
        bins: Optional[list[float]] = None,
    ) -> None:
        self._manifest, self._rules = manifest, rules
        self.bins = self._find_bins() if bins is None else bins
        self._buckets: list[list[CutLine]] = [[] for _ in range(len(self.bins) + 1)]
        self._rng = random.Random(rules.seed + epoch)
        self._bucket_rng = random.Random(_BUCKET_SEED + rules.seed + epoch)
        self._lines = epoch_lines(manifest, rules.seed, epoch)
        self._chosen, self._uses = 0, rules.world  # used up: the first batch chooses anew
        self.groups, self._read = 0, 0
        if position is None:
            self._fill(rules.buffer)
        else:
            self._go_to(position)

    def __iter__(self) -> Iterator[Group]:
        """Yield one batch for each process until no cut is left."""
        while group := self.next_group():
            yield group

    def next_group(self) -> Group:
        """Return one batch for each process; an empty list when no cut is left."""
        world = self._rules.world
        batches = [batch for _ in range(world) if (batch := self._next_batch())]
        self.groups += 1 if batches else 0
        if 0 < len(batches) < world:
            batches = _share_out([cut for batch in batches for cut in batch], world)
        return batches

    def position(self) -> dict[str, Any]:
        """Return where the next group begins: numbers that JSON can hold."""
        return {
            "groups": self.groups,
            "read": self._read,
            "buckets": [[cut.number for cut in bucket] for bucket in self._buckets],
            "chosen": [self._chosen, self._uses],
            "rng": [list(self._rng.getstate()[1]), list(self._bucket_rng.getstate()[1])],
        }

    def _go_to(self, position: dict[str, Any]) -> None:
        self.groups, self._read = position["groups"], position["read"]
        self._chosen, self._uses = position["chosen"]
        for rng, state in zip((self._rng, self._bucket_rng), position["rng"]):
            rng.setstate((random.Random.VERSION, tuple(state), None))
        wanted = {number for bucket in position["buckets"] for number in bucket}
        held = {}
        for number, line in itertools.islice(self._lines, self._read):
            if number in wanted:
                held[number] = cut_line(number, line, self._manifest)
        self._buckets = [[held[number] for number in bucket] for bucket in position["buckets"]]

    def _is_kept(self, cut: CutLine) -> bool:
        return self._rules.shortest <= cut.duration <= self._rules.longest

    def _find_bins(self) -> list[float]:
        rules = self._rules
        first = list(itertools.islice(filter(self._is_kept, read_cut_lines(self._manifest)), BINS_FROM))
        where = f"manifest {self._manifest}"
        rule = f"hold at least {rules.num_buckets} (num_buckets) cuts of {rules.shortest}-{rules.longest} s"
        check(len(first) >= rules.num_buckets, where, rule, len(first))
        constraint = TimeConstraint(max_duration=rules.max_duration)
        return [float(bin) for bin in estimate_duration_buckets(first, rules.num_buckets, constraint)]

    def _fill(self, count: int) -> None:
        while count > 0 and (line := next(self._lines, None)) is not None:
            self._read += 1
            cut = cut_line(*line, self._manifest)
            if self._is_kept(cut):
                self._buckets[bisect_left(self.bins, cut.duration)].append(cut)
                count -= 1

    def _next_batch(self) -> list[CutLine]:
        """Take a batch from a bucket that has enough for one, or else from any; refill the buckets."""
        if self._uses >= self._rules.world:
            self._chosen, self._uses = self._bucket_rng.randrange(len(self._buckets)), 0
        self._uses += 1
        near = sorted(range(len(self._buckets)), key=lambda index: (abs(index - self._chosen), index))
        buckets = [self._buckets[index] for index in near]  # nearest to the chosen one first
        bucket = next(filter(self._size, buckets), None) or next(filter(None, buckets), [])
        if not bucket:
            return []
        order = list(range(len(bucket)))
        self._rng.shuffle(order)
        taken = order[: self._size(bucket[index] for index in order) or len(order)]
        batch = [bucket[index] for index in taken]
        for index in sorted(taken, reverse=True):
            del bucket[index]
        self._fill(len(batch))
        return batch

    def _size(self, cuts: Iterable[CutLine]) -> int:
        """Return how many of the cuts, the first ones, fill a batch; 0 when all do not."""
        longest = 0.0
        for count, cut in enumerate(cuts, 1):
            longest = max(longest, cut.duration)
            if (count + 1) * longest > self._rules.max_duration:
                return count
        return 0


def _share_out(cuts: list[CutLine], world: int) -> Group:
    """Give each process a share of the last cuts, some to several when there are fewer than processes."""
    while len(cuts) < world:
        cuts = cuts + cuts[: world - len(cuts)]
    size, more = divmod(len(cuts), world)
    starts = [rank * size + min(rank, more) for rank in range(world + 1)]
    return [cuts[start:stop] for start, stop in zip(starts, starts[1:])]


class Order:
    """The sampler of training: (seed of a batch, lines of its cuts) for this process; resumable.

    Args:
        manifest: of cuts.
        rules: their ``world`` is replaced by the number of processes there is when an iteration begins.

    Attributes:
        epoch: the one that the next iteration is of.
        used: batches of it that were used; an iteration begins after them.
    """

    def __init__(self, manifest: Path, rules: Rules) -> None:
        self.epoch, self.used = 0, 0
        self._manifest, self._rules = manifest, rules
        self._positions: dict[int, dict[str, Any]] = {}  # by number of the next batch; some lie ahead of it
        self._bins: tuple[str, Optional[list[float]]] = ("", None)  # and of which rules and manifest they are

    def go_to(self, epoch: int, used: int = 0, position: Optional[dict[str, Any]] = None) -> None:
        """Go to a batch; ``position`` is the value of `position` there, if known."""
        self.epoch, self.used = epoch, used
        self._positions = {position["groups"]: position} if position else {}

    def position(self) -> Optional[dict[str, Any]]:
        """Return the newest known position at or before the next batch; None is the beginning."""
        passed = [number for number in self._positions if number <= self.used]
        return self._positions[max(passed)] if passed else None

    def batches_an_epoch(self) -> int:
        """Count the batches of epoch 0 by a pass over the manifest; other epochs have about as many."""
        rules = dataclasses.replace(self._rules, world=process()[1])
        return sum(1 for _ in Epoch(self._manifest, rules, 0))

    def __iter__(self) -> Iterator[tuple[int, list[CutLine]]]:
        rank, world = process()
        rules = dataclasses.replace(self._rules, world=world)
        key, known = rules.key(self._manifest), self.position()
        if known is not None and known["key"] != key:  # of other rules, data or processes
            known, self._positions = None, {}
        number, skip = self.epoch, self.used
        bins = self._bins[1] if self._bins[0] == key else None
        epoch = Epoch(self._manifest, rules, number, known, bins)
        self._bins = key, epoch.bins
        while True:
            batch = epoch.groups
            if batch > 0 and batch % SNAPSHOT_EVERY == 0:
                self._note({**epoch.position(), "key": key})
            group = epoch.next_group()
            if not group:
                return
            if batch >= skip:
                yield zlib.crc32(f"{rules.seed} {number} {batch}".encode()), group[rank]

    def _note(self, position: dict[str, Any]) -> None:
        passed = self.position()
        oldest = passed["groups"] if passed else 0
        kept = {number: one for number, one in self._positions.items() if number >= oldest}
        self._positions = {**kept, position["groups"]: position}
