"""Noise in training: stored features of speech and of noise, mixed as if the audio had been.
Knows: log-mel features, manifests of noise. Must not know: batches, models, how features were computed.
"""
from __future__ import annotations

import math
import random

import torch
from lhotse import CutSet, MonoCut
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.data.features import DIM


class NoiseMixer:
    """Adds a random piece of noise to features, at a random ratio of their energies.

    In each filter the energies add, which leaves out how phases meet (as lhotse's FeatureMixer does). Numbers
    are drawn from `random`, which the caller seeds.

    Args:
        manifest: cuts with log-mel features, e.g. of the jobs noise-cuts and compute-fbank.
        lowest, highest: signal-to-noise ratio in dB.

    Raises:
        ValueError: the manifest has no cut, or one without features of the right size.
    """

    def __init__(self, manifest: PathLike, lowest: float, highest: float) -> None:
        self.cuts: list[MonoCut] = list(CutSet.from_file(manifest))
        check(len(self.cuts) > 0, f"noise in {manifest}", "have a cut at least", 0)
        for cut in self.cuts:
            bins = cut.num_features if cut.has_features else None
            check(bins == DIM, f"noise cut {cut.id} of {manifest}", f"have features of {DIM} filters", bins)
        self.lowest, self.highest = lowest, highest

    def draw(self) -> tuple[MonoCut, float, float]:
        """Return a cut, where to begin in it (0 to 1), and the signal-to-noise ratio in dB."""
        return random.choice(self.cuts), random.random(), random.uniform(self.lowest, self.highest)


def mix(speech: Tensor, noise: Tensor, begin: float, snr: float) -> Tensor:
    """Return speech with noise, which is repeated as often as it takes.

    Args:
        speech: [T, bins] log-mel energies.
        noise: [N, bins] log-mel energies.
        begin: where in the noise to begin, 0 to 1.
        snr: of their mean energies, in dB.
    """
    if len(speech) == 0 or len(noise) == 0:
        return speech
    indexes = (torch.arange(len(speech)) + int(begin * len(noise))) % len(noise)
    noise = noise[indexes]
    gain = _log_energy(speech) - _log_energy(noise) - snr * math.log(10.0) / 10.0
    return torch.logaddexp(speech, noise + gain)


def _log_energy(features: Tensor) -> Tensor:
    """Return the log of a frame's mean energy over all filters."""
    return torch.logsumexp(features.double().flatten(), 0).float() - math.log(len(features))
