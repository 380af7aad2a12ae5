"""Options of batches: their sizes, their order, and the augmentation of training.
Knows: numbers. Must not know: manifests, torch, models.
"""
from __future__ import annotations

from dataclasses import dataclass

from icefall_fusion.common.checks import check, check_at_least


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
        resident: keep all features in the memory of the training device (float16; 100 h are 5.8 GB), and make
            and augment batches there. ``workers`` are then threads that read files at the beginning.
        noise: manifest of noise with features (jobs noise-cuts and compute-fbank), which is mixed into
            training utterances before all else; empty: none.
        noise_share: share of the utterances with noise, 0 to 1.
        noise_lowest: lowest signal-to-noise ratio, in dB.
        noise_highest: highest one; each is drawn evenly between them.
        frequency_warp: training utterances are warped by a factor from 1 - this to 1 + this (VTLP); 0 is off.
        spec_augment: mask and warp training features (Park et al., 2019).
        time_warp: frames, 0 is off.
        feature_masks: number of masks in frequency.
        feature_mask_size: widest of them, in filters.
        frame_masks: number of masks in time.
        frame_mask_size: longest of them, in frames.
        frame_mask_fraction: largest share of an utterance that may be masked in time.
        spec_augment_share: share of the utterances that are augmented.
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
    resident: bool = False
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
        check_at_least(0, self, "min_seconds", "workers", "time_warp", "feature_masks", "frame_masks")
        check_at_least(2, self, "num_buckets")
        check_at_least(1, self, "buffer", "prefetch")
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
