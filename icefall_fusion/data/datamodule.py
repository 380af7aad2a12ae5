"""Batches of features and token ids from lhotse manifests, resumable for training, in fixed order otherwise.
Knows: cuts, stored features, SpecAugment, workers. Must not know: models, search, how features were stored.

Legend: B utterances, T frames (10 ms).
"""
from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
import torch
from lhotse import CutSet, MonoCut
from lhotse.dataset import SpecAugment
from torch.utils.data import DataLoader, Dataset

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.data.bucketing import Order, Rules
from icefall_fusion.data.cut_lines import CutLine
from icefall_fusion.data.fbank import cut_samples, extract
from icefall_fusion.data.features import DIM, pad_features
from icefall_fusion.data.frequency_warp import warp_frequencies
from icefall_fusion.data.manifests import spread
from icefall_fusion.data.noise_mix import NoiseMixer, mix

Batch = dict[str, Any]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class DataOptions:
    """How utterances become batches.

    Args:
        max_duration: seconds of audio in a training batch.
        eval_duration: seconds of audio, padding included, in an evaluation batch.
        num_buckets: groups of like duration, from each of which batches are made.
        buffer: training utterances that are shuffled at a time, in all buckets together.
        min_seconds: shorter training utterances are left out.
        max_seconds: longer training utterances are left out.
        workers: processes that load features; 0 loads in the main process. Batches do not depend on it.
        prefetch: batches that each worker holds ready.
        noise: manifest of noise with features (jobs noise-cuts and compute-fbank), which is mixed into
            training utterances before all else; empty: none.
        noise_share: part of the utterances that get noise.
        noise_lowest: signal-to-noise ratio at least, in dB.
        noise_highest: at most; each is drawn evenly between them.
        frequency_warp: training utterances are warped by a factor from 1 - this to 1 + this (VTLP); 0 is off.
        spec_augment: mask and warp training features (Park et al., 2019).
        time_warp: frames, 0 is off.
        feature_masks: number of bands masked.
        feature_mask_size: widest band, in filters.
        frame_masks: number of stretches masked.
        frame_mask_size: longest stretch, in frames.
        frame_mask_fraction: most of an utterance that may be masked in time.
        spec_augment_share: part of the utterances that are augmented.
        seed: of order and augmentation.
    """

    max_duration: float = 200.0
    eval_duration: float = 200.0
    num_buckets: int = 20
    buffer: int = 20_000
    min_seconds: float = 1.0
    max_seconds: float = 25.0
    workers: int = 1
    prefetch: int = 4
    noise: str = ""
    noise_share: float = 0.5
    noise_lowest: float = 10.0
    noise_highest: float = 20.0
    frequency_warp: float = 0.0
    spec_augment: bool = True
    time_warp: int = 80
    feature_masks: int = 2
    feature_mask_size: int = 27
    frame_masks: int = 10
    frame_mask_size: int = 100
    frame_mask_fraction: float = 0.15
    spec_augment_share: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_duration", "eval_duration", "max_seconds", "feature_mask_size", "frame_mask_size"):
            check(getattr(self, name) > 0, f"DataOptions.{name}", "be positive", getattr(self, name))
        for name in ("min_seconds", "workers", "time_warp", "feature_masks", "frame_masks"):
            check(getattr(self, name) >= 0, f"DataOptions.{name}", "be at least 0", getattr(self, name))
        check(self.num_buckets >= 2, "DataOptions.num_buckets", "be at least 2", self.num_buckets)
        check(self.buffer >= 1, "DataOptions.buffer", "be at least 1", self.buffer)
        check(self.prefetch >= 1, "DataOptions.prefetch", "be at least 1", self.prefetch)
        for name in ("frame_mask_fraction", "spec_augment_share", "noise_share"):
            check(0 <= getattr(self, name) <= 1, f"DataOptions.{name}", "lie in 0..1", getattr(self, name))
        rule = f"be at least noise_lowest ({self.noise_lowest} dB)"
        check(self.noise_highest >= self.noise_lowest, "DataOptions.noise_highest", rule, self.noise_highest)
        warp = self.frequency_warp
        check(0 <= warp < 0.5, "DataOptions.frequency_warp", "lie in 0..0.5", warp)
        rule = f"be below max_seconds ({self.max_seconds})"
        check(self.min_seconds < self.max_seconds, "DataOptions.min_seconds", rule, self.min_seconds)
        rule = "be at least max_seconds, else long utterances would never be used"
        check(self.max_duration >= self.max_seconds, "DataOptions.max_duration", rule, self.max_duration)


class TrainBatches:
    """Shuffled batches of like duration, without end over epochs; resumable at any batch (a BatchSource).

    Iterating goes on from the current position to the end of the epoch; the next iteration begins the next
    epoch. A batch is {"features" float [B, T, 80], "lens" int64 [B] in frames, "tokens" list of B id lists,
    "texts", "ids", "seconds": lists of B}.

    Args:
        manifest: a lhotse manifest of cuts with features (or with audio only: features are then computed).
        options: see there.
        encode: text to token ids, e.g. ``AcousticTokens.encode``; None gives empty lists.

    Attributes:
        skipped: [{"id", "error"}], utterances whose features or audio could not be read so far, each once;
            with "kind" "noise" those of noise. They belong to the state: a resumed run knows them.
        order: the sampler.
    """

    def __init__(self, manifest: PathLike, options: DataOptions, encode: Optional[Encode] = None) -> None:
        self.options = options
        self.skipped: list[dict[str, str]] = []
        self._told: set[str] = set()  # ids in it: epoch by epoch they would be the same
        rules = Rules(
            options.min_seconds, options.max_seconds, options.max_duration, options.num_buckets, options.seed,
            options.buffer,
        )  # fmt: skip
        self.order = Order(_existing(manifest), rules)
        self._loader = _loader(_Loading(encode, options), self.order, options)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self.order.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch`` from its first batch."""
        check(epoch >= 0, "epoch", "be at least 0", epoch)
        self.order.go_to(epoch)

    def batches_in(self, epochs: float) -> int:
        """Return how many batches this process gets in so many epochs (of the length of the first)."""
        return round(epochs * self.order.batches_an_epoch())

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch; a position at its very end leads into the next one."""
        resumed = self.order.used > 0
        any_left = False
        for batch in self._loader:
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
    ) -> None:
        check(world >= 1, "EvalBatches.world", "be at least 1", world)
        check(0 <= rank < world, "EvalBatches.rank", f"lie in 0..{world - 1} (below world)", rank)
        self.skipped: list[dict[str, str]] = []
        left_out = set(done)
        cuts = list(CutSet.from_jsonl_lazy(_existing(manifest)))
        cuts = [cut for cut in spread(cuts, limit or 0) if cut.id not in left_out]
        self._batches = _batches_by_duration(cuts, options.eval_duration)[rank::world]
        self.utterances = sum(len(batch) for _, batch in self._batches)
        self._loader = _loader(_Loading(encode, None), self._batches, options)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        for batch in self._loader:
            _note_skipped(batch, self.skipped, set())
            if batch["ids"]:
                yield batch


def load_features(cut: MonoCut) -> torch.Tensor:
    """Return the features of a cut, float32 [T, 80]: those stored, or else computed from its audio.

    Raises:
        FileNotFoundError: the file is gone.
        ValueError: the file is truncated or broken; the message names it.
    """
    if not cut.has_features:
        return extract(cut_samples(cut))
    try:
        features = torch.from_numpy(np.array(cut.load_features(), dtype=np.float32))
    except FileNotFoundError:
        raise FileNotFoundError(f"no feature archive at {cut.features.storage_path}") from None
    except Exception as error:  # lilcom raises its own kinds on truncated data; lhotse adds the whole cut
        reason = str(error).partition("\n")[0]
        raise ValueError(f"feature archive {cut.features.storage_path} is broken: {reason}") from error
    if features.shape != (cut.num_frames, DIM):
        raise ValueError(
            f"feature archive {cut.features.storage_path} is broken: utterance {cut.id} has shape "
            f"{tuple(features.shape)}, the manifest says {(cut.num_frames, DIM)}"
        )
    return features


class _Loading(Dataset):
    """Turns (seed, cuts or their lines) into a batch, in a worker; ``options`` None: no augmentation."""

    def __init__(self, encode: Optional[Encode], options: Optional[DataOptions]) -> None:
        self._encode = encode
        self._augment = None
        self._warp = 0.0 if options is None else options.frequency_warp
        self._noise, self._noise_share = None, 0.0
        if options is not None and options.noise:
            self._noise = NoiseMixer(_existing(options.noise), options.noise_lowest, options.noise_highest)
            self._noise_share = options.noise_share
        if options is not None and options.spec_augment:
            self._augment = SpecAugment(
                time_warp_factor=options.time_warp,
                num_feature_masks=options.feature_masks,
                features_mask_size=options.feature_mask_size,
                num_frame_masks=options.frame_masks,
                frames_mask_size=options.frame_mask_size,
                max_frames_mask_fraction=options.frame_mask_fraction,
                p=options.spec_augment_share,
            )

    def __getitem__(self, item: tuple[int, list[Union[CutLine, MonoCut]]]) -> Batch:
        seed, cuts = item
        features, kept, skipped = [], [], []
        with _seeded(seed):
            for cut in cuts:
                id = f"line {cut.number}" if isinstance(cut, CutLine) else cut.id
                try:
                    cut = cut.cut() if isinstance(cut, CutLine) else cut
                    id = cut.id
                    one = load_features(cut)
                except (FileNotFoundError, ValueError) as error:
                    skipped.append({"id": id, "error": str(error)})
                    continue
                # before padding: independent of the batch
                if self._noise is not None and random.random() < self._noise_share:
                    one = self._with_noise(self._noise, one, skipped)
                if self._warp > 0:
                    one = warp_frequencies(one, random.uniform(1 - self._warp, 1 + self._warp))
                if self._augment is not None and len(one) > 0:
                    one = self._augment(one[None])[0]
                features.append(one)
                kept.append(cut)
        texts = [" ".join(supervision.text or "" for supervision in cut.supervisions) for cut in kept]
        padded, lens = pad_features(features)
        return {
            "features": padded,  # [B, T, 80]
            "lens": lens,
            "tokens": [self._encode(text) if self._encode else [] for text in texts],
            "texts": texts,
            "ids": [cut.id for cut in kept],
            "seconds": [cut.duration for cut in kept],
            "skipped": skipped,
        }


    @staticmethod
    def _with_noise(mixer: NoiseMixer, features: torch.Tensor, skipped: list[dict[str, str]]) -> torch.Tensor:
        noise, begin, snr = mixer.draw()
        try:
            return mix(features, load_features(noise), begin, snr)
        except (FileNotFoundError, ValueError) as error:
            skipped.append({"id": noise.id, "error": str(error), "kind": "noise"})
            return features


def _batches_by_duration(cuts: list[MonoCut], seconds: float) -> list[tuple[int, list[MonoCut]]]:
    batches: list[tuple[int, list[MonoCut]]] = []
    for cut in sorted(cuts, key=lambda cut: (-cut.duration, cut.id)):
        if batches and (len(batches[-1][1]) + 1) * batches[-1][1][0].duration <= seconds:
            batches[-1][1].append(cut)
        else:
            batches.append((0, [cut]))
    return batches


def _loader(loading: _Loading, sampler: Any, options: DataOptions) -> DataLoader:
    workers: dict[str, Any] = {}
    if options.workers:
        workers = {"prefetch_factor": options.prefetch, "persistent_workers": True}
        workers["worker_init_fn"] = _leave_signals_to_the_trainer
    # Each pass draws a seed, also one that a resumed run begins: not from the generator of dropout.
    workers["generator"] = torch.Generator()
    return DataLoader(loading, batch_size=None, sampler=sampler, num_workers=options.workers, **workers)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Leave the process group, which is what Ctrl-C and schedulers signal: the trainer hears it, writes a
    checkpoint, which may take the next batch, and ends the workers."""
    os.setpgrp()


def _existing(manifest: PathLike) -> Path:
    if not Path(manifest).is_file():
        raise FileNotFoundError(f"no manifest at {manifest}: prepare the data first (prepare.sh)")
    return Path(manifest)


def _note_skipped(batch: Batch, skipped: list[dict[str, str]], told: set[str]) -> None:
    for entry in batch.pop("skipped"):
        if entry["id"] not in told:
            logging.warning("skipped %s: %s", entry["id"], entry["error"])
            skipped.append(entry)
            told.add(entry["id"])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the three generators that lhotse's SpecAugment may draw from; give them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
