"""Log-mel features of many utterances at once, on the device where they will be used.
Knows: samples, lhotse's filter bank. Must not know: files, cuts, batches, models.

On a GPU it has never run; it is torch alone, and the tests run it on a CPU.
"""
from __future__ import annotations

from typing import Sequence, Union

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.data.fbank import SHORTEST, extractor, num_frames
from icefall_fusion.data.features import DIM, HOP

#: Frames whose windows are in memory together: what a CPU's cache holds, or about 2 GB on a GPU.
AT_ONCE = {"cpu": 2_000, "cuda": 200_000}
_WINDOW = 400  # samples
_BEFORE = (_WINDOW - HOP) // 2  # samples of a frame's window to the left of its hop


def extract_together(samples: Sequence[np.ndarray], device: Union[str, torch.device] = "cpu") -> Tensor:
    """Return the features of several utterances, one after another; each equals `fbank.extract` of it alone.

    Args:
        samples: of each utterance: at 16 kHz, float [samples] in about [-1, 1], or int16 (then in units of
            1/32768).
        device: computes; the samples go there as they are.

    Returns:
        float32 [T, 80] on the device, T the sum over all utterances of `fbank.num_frames`.
    """
    counts = np.array([num_frames(len(one)) for one in samples], np.int64)
    total = int(counts.sum())
    if total == 0:
        return torch.zeros(0, DIM, device=device)
    short = [max(0, SHORTEST - len(one)) for one in samples]
    padded = [np.pad(one, (0, more)) if more else one for one, more in zip(_alike(samples), short)]
    sizes = np.array([len(one) for one in padded], np.int64)
    flat = _on_device(padded, int(sizes.sum()), torch.device(device))
    if flat.is_floating_point():
        finite = bool(torch.isfinite(flat).all())
        check(finite, "samples", "be finite numbers", "an array with NaN or infinity")
    begins, firsts = np.cumsum(sizes) - sizes, np.cumsum(counts) - counts
    utterance = np.repeat(np.arange(len(counts)), counts)  # of each frame
    local = np.arange(total) - firsts[utterance]
    numbers = np.stack((local * HOP - _BEFORE, begins[utterance], sizes[utterance]))
    frames = torch.from_numpy(numbers).to(device)
    made = torch.empty(total, DIM, device=device)
    step = AT_ONCE.get(flat.device.type, 2_000)
    with torch.inference_mode():
        for start in range(0, total, step):
            windows = _windows(flat, frames[:, start : start + step])
            made[start : start + step] = _log_mel(windows, device)
    return made


def _alike(samples: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Return samples of one type: int16 if all are, else float32."""
    if all(one.dtype == np.int16 for one in samples):
        return samples
    return [one.astype(np.float32) / (32768 if one.dtype == np.int16 else 1) for one in samples]


def _on_device(samples: Sequence[np.ndarray], total: int, device: torch.device) -> Tensor:
    """Return arrays one after another on the device; a GPU copies while the host goes on."""
    kind = torch.from_numpy(samples[0]).dtype
    flat = torch.empty(total, dtype=kind, pin_memory=device.type == "cuda")
    np.concatenate(samples, out=flat.numpy())
    return flat.to(device, non_blocking=True)


def _windows(flat: Tensor, frames: Tensor) -> Tensor:
    """Return the windows [T,400] of frames; where one leaves its utterance, samples are mirrored at the edge.

    Args:
        flat: [N] all samples.
        frames: int64 [3,T]: where each window begins in its utterance, where that begins, and its samples.
    """
    place, begin, size = (one[:, None] for one in frames)
    index = place + torch.arange(_WINDOW, device=flat.device)
    index = torch.where(index < 0, -1 - index, index)
    index = torch.where(index >= size, 2 * size - 1 - index, index)
    taken = flat[begin + index]
    return taken if taken.is_floating_point() else taken.float() / 32768.0


def _log_mel(windows: Tensor, device: Union[str, torch.device]) -> Tensor:
    bank = extractor("lhotse", str(device)).extractor
    strided, _ = bank.wav2win._forward_strided(windows[None])  # as its own streaming does
    return bank._forward_strided(strided, None)[0]
