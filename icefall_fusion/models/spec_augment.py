"""SpecAugment on a padded batch of log-mel features.
Knows: features. Must not know: data, search, fusion, models.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from icefall_fusion.checks import check


@dataclass(frozen=True)
class SpecAugmentOptions:
    """Masks of SpecAugment (Park et al. 2019, section 2), without time warping.

    Args:
        frequency_masks: number of masked bands.
        frequency_width: widest band in mel bins.
        time_masks: number of masked time spans.
        time_width: longest span in 10 ms frames.
        time_share: longest span as a share of the utterance.
    """

    frequency_masks: int = 2
    frequency_width: int = 20
    time_masks: int = 4
    time_width: int = 40
    time_share: float = 0.06

    def __post_init__(self) -> None:
        for name in ("frequency_masks", "frequency_width", "time_masks", "time_width", "time_share"):
            check(getattr(self, name) >= 0, f"SpecAugmentOptions.{name}", "be at least 0", getattr(self, name))


def spec_augment(
    features: Tensor,
    lens: Tensor,
    fill: Tensor,
    options: SpecAugmentOptions,
    generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Return a copy of features [B,T,bins] with random bands and spans replaced by ``fill`` [bins] (the mean)."""
    batch, length, bins = features.shape
    random = torch.rand(
        batch, options.frequency_masks + options.time_masks, 2, generator=generator, device=lens.device
    )
    bands, spans = random[:, : options.frequency_masks], random[:, options.frequency_masks :]
    width = (bands[..., 0] * (min(options.frequency_width, bins) + 1)).floor()
    hidden_bins = _covered(width, bands[..., 1] * (bins - width + 1), bins)
    most = (lens[:, None] * options.time_share).clamp(max=options.time_width)
    width = (spans[..., 0] * (most + 1)).floor().minimum(lens[:, None])
    hidden_frames = _covered(width, spans[..., 1] * (lens[:, None] - width + 1), length)
    hidden = hidden_bins[:, None, :] | hidden_frames[:, :, None]
    return torch.where(hidden, fill.to(features.dtype), features)


def _covered(width: Tensor, start: Tensor, length: int) -> Tensor:
    """Return [B,length]: positions inside any of the intervals [B,M]."""
    index = torch.arange(length, device=width.device)
    start = start.floor()[..., None]
    return ((index >= start) & (index < start + width[..., None])).any(dim=1)
