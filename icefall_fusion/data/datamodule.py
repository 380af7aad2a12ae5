"""Batches of features and token ids from lhotse manifests, resumable for training, in fixed order otherwise.
Knows: cuts, their order, workers. Must not know: models, search, how a worker loads a cut.

Legend: B utterances, T frames (10 ms).
"""
from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional

import torch
from lhotse import CutSet, MonoCut
from torch.utils.data import DataLoader, Dataset

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.data.bucketing import Order, Rules
from icefall_fusion.data.loading import Batch, Encode, Loading, existing_manifest, load_features
from icefall_fusion.data.manifests import spread
from icefall_fusion.data.options import DataOptions
from icefall_fusion.data.resident import FeatureStore, ResidentBatches

_STOPS = {signal.SIGINT, signal.SIGTERM}  # what Ctrl-C and schedulers send

__all__ = ["DataOptions", "EvalBatches", "TrainBatches", "load_features"]


class TrainBatches:
    """Shuffled batches of like duration, without end over epochs; resumable at any batch (a BatchSource).

    Iterating goes on from the current position to the end of the epoch; the next iteration begins the next
    epoch. A batch is {"features" float [B, T, 80], "lens" int64 [B] in frames, "tokens" list of B id lists,
    "texts", "ids", "seconds": lists of B}.

    Args:
        manifest: a lhotse manifest of cuts with features (or with audio only: features are then computed).
        options: see there.
        encode: text to token ids, e.g. ``AcousticTokens.encode``; None gives empty lists.
        store: the features of the manifest in a device's memory (resident.py): batches of the same order
            are gathered and augmented there, without workers; see `ResidentBatches` for what they hold.
            ``options.resident`` says that a job does so.
        pin_memory: let workers hand over memory that a GPU copies without waiting.
        loading: turns cuts into a batch in place of `Loading`.

    Attributes:
        skipped: [{"id", "error"}], utterances whose features or audio could not be read so far, each once;
            with "kind" "noise" those of noise. They belong to the state: a resumed run knows them.
        order: the sampler.
    """

    def __init__(
        self,
        manifest: PathLike,
        options: DataOptions,
        encode: Optional[Encode] = None,
        store: Optional[FeatureStore] = None,
        pin_memory: bool = False,
        loading: Optional[Dataset] = None,
    ) -> None:
        self.options = options
        self.skipped: list[dict[str, str]] = []
        self._told: set[str] = set()  # ids in it: epoch by epoch they would be the same
        rules = Rules(
            options.min_seconds, options.max_seconds, options.max_duration, options.num_buckets, options.seed,
            options.buffer,
        )
        self.order = Order(existing_manifest(manifest), rules)
        if store is not None:
            self._loader = ResidentBatches(store, self.order, encode, options)
        else:
            self._loader = _loader(loading or Loading(encode, options), self.order, options, pin_memory)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self.order.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` from its first batch."""
        check(epoch >= 0, "epoch", "be at least 0", epoch)
        self.order.go_to(epoch)

    def batches_in(self, epochs: float) -> int:
        """Return how many batches this process has in ``epochs`` epochs of the length of the first."""
        return round(epochs * self.order.batches_an_epoch())

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch; a position at its very end leads into the next one."""
        resumed = self.order.used > 0
        any_left = False
        for batch in _start(self._loader):
            any_left = True
            self.order.used += 1
            _note_skipped(batch, self.skipped, self._told)
            if batch["ids"]:
                yield batch
        self.set_epoch(self.order.epoch + 1)
        if resumed and not any_left:
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was yielded last (prefetched batches do not count).

        Its part "position" (see bucketing.py; about 200 kB) saves making all batches since the epoch's
        beginning again. A state without it, or of other options or data, leads on just as well, slower.
        """
        order = self.order
        state = {"epoch": order.epoch, "used": order.used, "seed": self.options.seed}
        return {**state, "position": order.position(), "skipped": list(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; the batches after it are those that would have followed."""
        rule = f"be the saved one, {state['seed']}, to go on with the same batches"
        check(state["seed"] == self.options.seed, "DataOptions.seed", rule, self.options.seed)
        self.skipped = list(state.get("skipped", ()))
        self._told = {entry["id"] for entry in self.skipped}
        self.order.go_to(state["epoch"], state["used"], state.get("position"))


class EvalBatches:
    """All utterances of a manifest in a fixed order, longest first; can be iterated again and again.

    A batch is as in :class:`TrainBatches`, without augmentation. What cannot be read is skipped and listed.

    Args:
        manifest: a lhotse manifest of cuts with features or with audio.
        options: see there; only ``eval_duration``, ``workers`` and ``prefetch`` matter.
        encode: text to token ids, or None.
        limit: only so many utterances, spread evenly over the manifest; None or 0 takes all.
        done: ids to leave out, e.g. those that a killed run has decoded.
        rank: of this process, from 0: it takes every ``world``-th batch from this one on.
        world: number of processes that share the batches.
        store: the features in a device's memory, as in `TrainBatches`.
        pin_memory: as in `TrainBatches`.

    Attributes:
        utterances: number of those in this process's batches.
        skipped: [{"id", "error"}] of the last iteration.
    """

    def __init__(
        self,
        manifest: PathLike,
        options: DataOptions,
        encode: Optional[Encode] = None,
        limit: Optional[int] = None,
        done: Sequence[str] = (),
        rank: int = 0,
        world: int = 1,
        store: Optional[FeatureStore] = None,
        pin_memory: bool = False,
    ) -> None:
        check(world >= 1, "EvalBatches.world", "be at least 1", world)
        check(0 <= rank < world, "EvalBatches.rank", f"lie in 0..{world - 1} (below world)", rank)
        self.skipped: list[dict[str, str]] = []
        left_out = set(done)
        cuts = list(CutSet.from_jsonl_lazy(existing_manifest(manifest)))
        cuts = [cut for cut in spread(cuts, limit or 0) if cut.id not in left_out]
        self._batches = _batches_by_duration(cuts, options.eval_duration)[rank::world]
        self.utterances = sum(len(batch) for _, batch in self._batches)
        if store is not None:
            self._loader = ResidentBatches(store, self._batches, encode)
        else:
            self._loader = _loader(Loading(encode, None), self._batches, options, pin_memory)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        for batch in _start(self._loader):
            _note_skipped(batch, self.skipped, set())
            if batch["ids"]:
                yield batch


def _batches_by_duration(cuts: list[MonoCut], seconds: float) -> list[tuple[int, list[MonoCut]]]:
    batches: list[tuple[int, list[MonoCut]]] = []
    for cut in sorted(cuts, key=lambda cut: (-cut.duration, cut.id)):
        if batches and (len(batches[-1][1]) + 1) * batches[-1][1][0].duration <= seconds:
            batches[-1][1].append(cut)
        else:
            batches.append((0, [cut]))
    return batches


def _loader(
    loading: Dataset, sampler: Any, options: DataOptions, pin_memory: bool = False
) -> DataLoader:
    workers: dict[str, Any] = {"pin_memory": pin_memory}
    if options.workers:
        workers.update(prefetch_factor=options.prefetch, persistent_workers=True)
        workers["worker_init_fn"] = _leave_signals_to_the_trainer
    # Each pass draws a seed, also one that a resumed run begins: not from the generator of dropout.
    workers["generator"] = torch.Generator()
    return DataLoader(loading, batch_size=None, sampler=sampler, num_workers=options.workers, **workers)


def _start(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Start the workers of a loader. Signals that stop a job wait meanwhile: a worker inherits this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Leave the process group, to which Ctrl-C and schedulers send signals. The trainer alone receives them:
    it writes a checkpoint, which may take the next batch, and ends the workers."""
    os.setpgrp()
    while came := signal.sigpending() & _STOPS:  # between the fork and now
        signal.sigwait(came)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


def _note_skipped(batch: Batch, skipped: list[dict[str, str]], told: set[str]) -> None:
    for entry in batch.pop("skipped"):
        if entry["id"] not in told:
            logging.warning("skipped %s: %s", entry["id"], entry["error"])
            skipped.append(entry)
            told.add(entry["id"])
