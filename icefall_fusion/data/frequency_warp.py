"""Other vocal tracts from stored features: the frequency axis of log-mel frames, warped.
Knows: log-mel features. Must not know: cuts, batches, models.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LOWEST, HIGHEST = 20.0, 7600.0  # Hz: the band of lhotse's and kaldifeat's filters at 16 kHz
KNEE = 4800.0  # Hz: formants lie below


def warp_frequencies(features: Tensor, factor: float) -> Tensor:
    """Return features as of a vocal tract whose resonances lie ``factor`` times as high.

    Vocal tract length perturbation (Jaitly and Hinton 2013, section 3): frequencies below a knee are scaled,
    those above are spread linearly up to the end of the band. Values between filters are interpolated.

    Args:
        features: [T, bins] log-mel features.
        factor: above 0, e.g. 0.9 to 1.1; 1 changes nothing.
    """
    low, high, share = _sources(features.shape[1], round(factor, 3))
    return torch.lerp(features[:, low], features[:, high], share.to(features.dtype))


@functools.lru_cache(maxsize=1024)
def _sources(bins: int, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each filter the two filters that its value lies between, and where [bins] (0..1)."""
    bottom, top = _mel(torch.tensor(LOWEST)), _mel(torch.tensor(HIGHEST))
    step = (top - bottom) / (bins + 1)
    warped = 700.0 * (torch.exp((bottom + step * torch.arange(1, bins + 1)) / 1127.0) - 1)  # centers in Hz
    knee = KNEE * min(factor, 1.0)
    above = HIGHEST - (HIGHEST - warped) * (HIGHEST - knee / factor) / (HIGHEST - knee)
    source = torch.where(warped <= knee, warped / factor, above)
    position = ((_mel(source) - bottom) / step - 1).clamp(0, bins - 1)
    low = position.floor().long().clamp(max=max(bins - 2, 0))
    return low, (low + 1).clamp(max=bins - 1), position - low


def _mel(frequency: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(frequency / 700.0)
