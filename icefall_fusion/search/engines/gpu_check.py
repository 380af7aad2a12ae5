"""A trial of the GPU kernel against tensors, before it is first relied on.
Knows: small random searches. Must not know: language models, real data.
"""
from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor

from icefall_fusion.common.unavailable import Unavailable, asked_once
from icefall_fusion.ngram.piece_ngram import NgramOrder, PieceNgram
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines.base import plan_frames
from icefall_fusion.search.engines.gpu import GpuSearch
from icefall_fusion.search.engines.tensors import TensorSearch
from icefall_fusion.search.fusion import Fusion, FusionSet, StopRule
from icefall_fusion.search.search_input import PrefixSearchOptions, check_input

_PIECES, _BEAM, _FRAMES = 40, 8, 30
_WORST = 1e-2  # nats between two ways to add up the same


class _Trial(Fusion):
    """A fusion that ranks by the last piece every few frames, and by an n-gram if it has one."""

    source, weight = "trial", 0.4
    _every = 7  # frames

    def __init__(self, ngram: Optional[PieceNgram]) -> None:
        self.piece_ngram, self.scores_extensions = ngram, ngram is not None

    def stop_rule(self) -> StopRule:
        return StopRule(self._every)

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        before = torch.where(beam.last == beam.blank, self.piece_ngram.start_id, beam.last)
        contexts = before.unsqueeze(2).expand(-1, -1, pieces.shape[1])
        return self.piece_ngram.score([contexts], pieces.unsqueeze(1).expand_as(contexts))

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> bool:
        due = (frame + 1) % self._every == 0
        if due:
            self.fuse_now(beam, active)
        return due

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        beam.fused += 0.7 * (beam.last % 3) * fires.unsqueeze(1)


def form_of(fusions: FusionSet) -> str:
    """Return which of the kernel's main forms a search needs: ``alone``, ``ranked`` or ``ngram``."""
    return "ngram" if fusions.shallow else "ranked" if fusions.ranks else "alone"


@asked_once
def check_kernel(device: torch.device, form: str) -> None:
    """Compare the kernel with tensors on a device, once for each form.

    Args:
        device: a GPU.
        form: see `form_of`.

    Raises:
        Unavailable: the kernel does not run there, or its scores differ.
    """
    tensors, kernel = (_masses(engine, device, form) for engine in (TensorSearch, _trusted))
    worst = float((tensors - kernel).nan_to_num(0.0).abs().max())
    if not worst < _WORST:
        raise Unavailable(f"on {device} the kernel's scores are {worst:.3g} nats off those of tensors", True)


def _trusted(*arguments: Any) -> GpuSearch:
    return GpuSearch(*arguments, trusted=True)


def _masses(engine: Callable[..., Any], device: torch.device, form: str) -> Tensor:
    """Return the sorted log-masses [B, K] of a small random batch, searched by an engine."""
    generator = torch.Generator().manual_seed(1)
    log_probs = (3 * torch.randn(3, _FRAMES, _PIECES, generator=generator)).log_softmax(-1).to(device)
    inputs = check_input(log_probs, torch.tensor([_FRAMES, 21, 0]), 0, None, None)
    ngram = _random_bigram().to(device) if form == "ngram" else None
    fusions = FusionSet([] if form == "alone" else [_Trial(ngram)], None)
    beam = Beam.at_root(inputs, _BEAM, None, len(fusions.members))
    try:
        fusions.begin(beam, inputs.ids)
        engine(inputs, plan_frames(inputs, None, False), beam, PrefixSearchOptions(_BEAM), fusions).run()
        return (beam.log_total.double() + beam.offset.unsqueeze(1)).sort(1).values.cpu()
    except Exception as error:  # of a compiler or a driver: any
        reason = f"on {device}: {type(error).__name__}: {str(error)[-400:]}"
        raise Unavailable(reason, unusual=True) from error


def _random_bigram() -> PieceNgram:
    """Return a bigram over the pieces that has half of all pairs."""
    base, generator = _PIECES + 2, torch.Generator().manual_seed(2)
    keys = torch.randperm(base * base, generator=generator)[: base * base // 2].sort().values
    orders = [
        NgramOrder(length, at, -3.0 - torch.rand(len(at), generator=generator), torch.full((len(at),), -0.5))
        for length, at in ((1, torch.arange(base)), (2, keys))
    ]
    return PieceNgram(_PIECES, orders, "trial")
