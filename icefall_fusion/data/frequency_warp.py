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
    return tuple(one[0] for one in warp_sources(bins, torch.tensor([factor], dtype=torch.float64)))


def warp_sources(bins: int, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each factor and filter the two filters that a value lies between, and where.

    Args:
        bins: number of filters.
        factors: float64 [B], above 0.

    Returns:
        int64 [B,bins], int64 [B,bins], float32 [B,bins] (0..1).
    """
    factor = factors[:, None]
    bottom, top = (_mel(torch.full((), hertz, device=factors.device)) for hertz in (LOWEST, HIGHEST))
    step = (top - bottom) / (bins + 1)
    place = torch.arange(1, bins + 1, device=factors.device)
    warped = 700.0 * (torch.exp((bottom + step * place) / 1127.0) - 1)  # centers in Hz
    knee = KNEE * factor.clamp(max=1.0)
    above = HIGHEST - (HIGHEST - warped) * (HIGHEST - knee / factor).float() / (HIGHEST - knee).float()
    source = torch.where(warped <= knee.float(), warped / factor.float(), above)
    position = ((_mel(source) - bottom) / step - 1).clamp(0, bins - 1)
    low = position.floor().long().clamp(max=max(bins - 2, 0))
    return low, (low + 1).clamp(max=bins - 1), position - low


def _mel(frequency: Tensor) -> Tensor:
    return 1127.0 * torch.log1p(frequency / 700.0)
