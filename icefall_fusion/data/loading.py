"""Cuts to batches of features, in a worker: stored features, noise, warps, masks.
Knows: cuts, features, SpecAugment. Must not know: the order of cuts, models, how features were stored.

Legend: B utterances, T frames (10 ms).
"""
from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional, Union

import numpy as np
import torch
from lhotse import MonoCut
from lhotse.dataset import SpecAugment
from torch.utils.data import Dataset

from icefall_fusion.common.files import PathLike
from icefall_fusion.data.cut_audio import cut_samples
from icefall_fusion.data.cut_lines import CutLine
from icefall_fusion.data.fbank import extract
from icefall_fusion.data.features import DIM, pad_features
from icefall_fusion.data.frequency_warp import warp_frequencies
from icefall_fusion.data.noise_mix import NoiseMixer, mix
from icefall_fusion.data.options import DataOptions

Batch = dict[str, Any]
Encode = Callable[[str], list[int]]


def existing_manifest(manifest: PathLike) -> Path:
    """Return the path of a manifest; raises FileNotFoundError when there is none."""
    if not Path(manifest).is_file():
        raise FileNotFoundError(f"no manifest at {manifest}: prepare the data first (prepare.sh)")
    return Path(manifest)


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


def cut_text(cut: MonoCut) -> str:
    """Return what is said in a cut."""
    return " ".join(supervision.text or "" for supervision in cut.supervisions)


class Loading(Dataset):
    """Turns (seed, cuts or their lines) into a batch, in a worker; ``options`` None: no augmentation."""

    def __init__(self, encode: Optional[Encode], options: Optional[DataOptions]) -> None:
        self._encode = encode
        self._augment = None
        self._warp = 0.0 if options is None else options.frequency_warp
        self._noise, self._noise_share = None, 0.0
        if options is not None and options.noise:
            lowest, highest = options.noise_lowest, options.noise_highest
            self._noise = NoiseMixer(existing_manifest(options.noise), lowest, highest)
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
        texts = [cut_text(cut) for cut in kept]
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
