"""Noise, other vocal tracts and SpecAugment for a whole batch, on its device, without waiting for it.
Knows: log-mel features, options of augmentation. Must not know: cuts, the order of batches, models.

The numbers are drawn as in loading.py (lhotse's SpecAugment, Park et al. 2019), from a generator of the
device. On a GPU it has never run; the tests run it on a CPU.

Legend: B utterances, T frames (10 ms), M masks.
"""
from __future__ import annotations

import math
from typing import Optional, Union

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.data.features import DIM
from icefall_fusion.data.frequency_warp import warp_sources
from icefall_fusion.data.options import DataOptions


class DeviceAugment:
    """Augments batches of features; chance depends on the seed of the batch alone.

    Args:
        options: those of noise, frequency_warp and spec_augment count.
        device: of the batches.
        noise: (features [N,80], first row and number of rows of each recording, both int64) of noise;
            None: no noise is mixed in.
    """

    def __init__(
        self,
        options: DataOptions,
        device: Union[str, torch.device],
        noise: Optional[tuple[Tensor, Tensor, Tensor]] = None,
    ) -> None:
        self._options, self._noise = options, noise
        self._chance = torch.Generator(device)

    def __call__(self, features: Tensor, lens: Tensor, masks: Tensor, seed: int) -> Tensor:
        """Return augmented features; those behind an utterance's end have no meaning.

        Args:
            features: float32 [B,T,80].
            lens: int64 [B], as all tensors on the device.
            masks: int64 [2,B], what `frame_masks` returns.
            seed: any int.
        """
        options = self._options
        self._chance.manual_seed(seed)
        real = torch.arange(features.shape[1], device=features.device) < lens[:, None]
        if self._noise is not None and options.noise_share > 0:
            features = self._with_noise(features, lens, real, self._noise)
        if options.frequency_warp > 0:
            features = self._warped(features)
        if options.spec_augment:
            features = self._masked(features, lens, masks, real)
        return features

    def frame_masks(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many time masks utterances of that many frames have, and what their lengths stay below.

        Args:
            frames: int64 [B], on the host.

        Returns:
            int64 [B] and int64 [B].
        """
        options = self._options
        most = options.frame_mask_fraction * frames
        number = np.minimum(options.frame_masks, np.ceil(most / options.frame_mask_size))
        longest = np.minimum(options.frame_mask_size, most // np.maximum(number, 1))
        return number.astype(np.int64), longest.astype(np.int64)

    def _with_noise(
        self, speech: Tensor, lens: Tensor, real: Tensor, noise: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """As `noise_mix.mix`, with one draw for each utterance."""
        flat, firsts, sizes = noise
        share, which, begin, level = self._uniform(4, len(lens))
        options = self._options
        chosen = (which * len(sizes)).long().clamp(max=len(sizes) - 1)
        size = sizes[chosen][:, None]
        place = (begin[:, None] * size).long() + torch.arange(speech.shape[1], device=speech.device)
        heard = flat[firsts[chosen][:, None] + place % size].float()  # [B,T,80]
        snr = options.noise_lowest + level * (options.noise_highest - options.noise_lowest)
        gain = _log_energy(speech, real) - _log_energy(heard, real) - snr * (math.log(10.0) / 10.0)
        mixed = torch.logaddexp(speech, heard + gain[:, None, None])
        takes = (share < options.noise_share) & (lens > 0)
        return torch.where(takes[:, None, None], mixed, speech)

    def _warped(self, features: Tensor) -> Tensor:
        """As `warp_frequencies`, with a factor for each utterance."""
        widest = self._options.frequency_warp
        factors = 1 - widest + 2 * widest * self._uniform(1, len(features))[0].double()
        low, high, share = warp_sources(features.shape[2], torch.round(factors, decimals=3))
        taken = [torch.gather(features, 2, one[:, None].expand_as(features)) for one in (low, high)]
        return torch.lerp(taken[0], taken[1], share[:, None])

    def _masked(self, features: Tensor, lens: Tensor, masks: Tensor, real: Tensor) -> Tensor:
        """As lhotse's SpecAugment of each utterance by itself: time warp, masks in frequency and time."""
        options, device = self._options, features.device
        takes = self._uniform(1, len(lens))[0] <= options.spec_augment_share
        changed = features
        if options.time_warp >= 1:
            changed = time_warp(features, lens, options.time_warp, *self._uniform(2, len(lens)))
        mean = changed.masked_fill(~real[:, :, None], 0.0).sum((1, 2)) / (lens * DIM).clamp(min=1)
        widths, starts = self._uniform(2, len(lens), options.feature_masks)
        size = torch.full_like(lens, DIM)
        hidden = _spans(widths, starts, options.feature_mask_size, size, DIM)[:, None, :]
        number, longest = masks
        widths, starts = self._uniform(2, len(lens), options.frame_masks)
        unused = torch.arange(options.frame_masks, device=device) >= number[:, None]
        widths = widths.masked_fill(unused, 0.0)
        hidden = hidden | _spans(widths, starts, longest[:, None], lens, features.shape[1])[:, :, None]
        changed = torch.where(hidden, mean[:, None, None], changed)
        return torch.where(takes[:, None, None], changed, features)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._chance, device=self._chance.device)


def _spans(
    widths: Tensor, starts: Tensor, bound: Union[int, Tensor], size: Tensor, count: int
) -> Tensor:
    """Return which of ``count`` places masks hide, bool [B,count].

    Args:
        widths, starts: uniform numbers [B,M], from 0 to 1.
        bound: widths are below it: a number, or [B,1].
        size: int64 [B], masks lie within.
        count: number of places.
    """
    width = (widths * bound).long()
    start = (starts * (size[:, None] - width)).long()
    place = torch.arange(count, device=widths.device)
    return ((place >= start[:, :, None]) & (place < (start + width)[:, :, None])).any(1)


def time_warp(features: Tensor, lens: Tensor, factor: int, first: Tensor, second: Tensor) -> Tensor:
    """Return features with a frame of each utterance moved, the two parts stretched (bicubic).

    As lhotse's `time_warp` of each utterance; those of up to 2 * factor + 1 frames stay as they are.

    Args:
        features: [B,T,80].
        lens: int64 [B].
        factor: frames that it moves at most.
        first, second: uniform numbers [B]: which frame, and where to.
    """
    room = lens - 2 * factor - 1
    center = factor + 1 + (first * room.clamp(min=1)).long()
    moved = center - factor + (second * (2 * factor + 1)).long()
    still = (room <= 0) | (moved == center)
    center, moved = torch.where(still, lens, center)[:, None], torch.where(still, lens, moved)[:, None]
    place = torch.arange(features.shape[1], device=features.device)
    right = place >= moved  # [B,T]
    begin = torch.where(right, center, 0)
    size = torch.where(right, lens[:, None] - center, center).clamp(min=1)
    out = torch.where(right, lens[:, None] - moved, moved).clamp(min=1)
    source = (place - torch.where(right, moved, 0) + 0.5) * (size / out) - 0.5
    below = source.floor()
    share = (source - below)[:, :, None]
    made = torch.zeros_like(features)
    for tap, weight in zip((-1, 0, 1, 2), _cubic(share)):
        index = begin + (below.long() + tap).clamp(min=0).minimum(size - 1)
        index = index.clamp(max=features.shape[1] - 1)  # behind the end
        made += weight * torch.gather(features, 1, index[:, :, None].expand_as(features))
    return made


def _cubic(share: Tensor, a: float = -0.75) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of the four neighbors (Keys 1981), as torch's bicubic interpolation has them."""

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return far(share + 1), near(share), near(1 - share), far(2 - share)


def _log_energy(features: Tensor, real: Tensor) -> Tensor:
    """Return the log of each utterance's mean energy over its frames and all filters, [B]."""
    hidden = features.masked_fill(~real[:, :, None], -math.inf)
    return torch.logsumexp(hidden.flatten(1), 1) - real.sum(1).clamp(min=1).log()
