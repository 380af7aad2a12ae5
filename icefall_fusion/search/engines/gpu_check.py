"""Whether the GPU kernel finds on a device what tensors find there, tried before it is first relied on.
Knows: small random searches. Must not know: language models, real data.
"""
from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor

from icefall_fusion.common.unavailable import Unavailable, asked_once
from icefall_fusion.ngram.piece_ngram import NOTHING, NgramOrder, PieceNgram
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines.base import plan_frames
from icefall_fusion.search.engines.gpu import GpuSearch
from icefall_fusion.search.engines.tensors import TensorSearch
from icefall_fusion.search.fusion import Fusion, FusionSet, StopRule
from icefall_fusion.search.search_input import PrefixSearchOptions, check_input

_PIECES, _BEAM, _FRAMES = 40, 8, 30
_WORST = 1e-2  # nats between two ways to add up the same


class _Trial(Fusion):
    """A fusion that ranks by the last piece every seven frames, and by an n-gram if it has one."""

    weight = 0.4

    def __init__(self, source: str, rule: StopRule, ngram: Optional[PieceNgram] = None) -> None:
        self.source, self._rule, self.piece_ngram = source, rule, ngram
        self.scores_extensions = ngram is not None

    def stop_rule(self) -> StopRule:
        return self._rule

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        before = torch.where(beam.last == beam.blank, self.piece_ngram.start_id, beam.last)
        contexts = [before.unsqueeze(2).expand(-1, -1, pieces.shape[1])]
        contexts += [torch.full_like(contexts[0], NOTHING)] * (self.piece_ngram.order - 2)
        return self.piece_ngram.score(contexts, pieces.unsqueeze(1).expand_as(contexts[0]))

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> bool:
        due = bool(self._rule.every) and (frame + 1) % self._rule.every == 0
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
    """Hold the kernel to the search by tensors on a device; tried once for each form.

    Args:
        device: a GPU.
        form: see `form_of`.

    Raises:
        Unavailable: the kernel does not run there, or finds something else.
    """
    found = [_masses(engine, device, form) for engine in (TensorSearch, _trusted)]
    worst = float((found[0] - found[1]).nan_to_num(0.0).abs().max())
    if not worst < _WORST:
        raise Unavailable(f"on {device} the kernel's scores are {worst:.3g} nats off those of tensors", True)


def _trusted(*arguments: Any) -> GpuSearch:
    return GpuSearch(*arguments, trusted=True)


def _masses(engine: Callable[..., Any], device: torch.device, form: str) -> Tensor:
    """Return the sorted log-masses [B, K] that an engine finds for a small random batch."""
    generator = torch.Generator().manual_seed(1)
    log_probs = (3 * torch.randn(3, _FRAMES, _PIECES, generator=generator)).log_softmax(-1).to(device)
    inputs = check_input(log_probs, torch.tensor([_FRAMES, 21, 0]), 0, None, None)
    fusions = FusionSet(_trials(form, device), None)
    beam = Beam.at_root(inputs, _BEAM, None, len(fusions.members))
    try:
        fusions.begin(beam, inputs.ids)
        engine(inputs, plan_frames(inputs, None, False), beam, PrefixSearchOptions(_BEAM), fusions).run()
        return (beam.log_total.double() + beam.offset.unsqueeze(1)).sort(1).values.cpu()
    except Exception as error:  # of a compiler or a driver: any
        reason = f"on {device}: {type(error).__name__}: {str(error)[-400:]}"
        raise Unavailable(reason, unusual=True) from error


def _trials(form: str, device: torch.device) -> list[Fusion]:
    if form == "alone":
        return []
    ranked: list[Fusion] = [_Trial("trial", StopRule(7))]
    if form == "ngram":
        ranked.append(_Trial("ngram", StopRule(0), _random_bigram().to(device)))
    return ranked


def _random_bigram() -> PieceNgram:
    """Return a bigram over the pieces that has half of all pairs."""
    base, generator = _PIECES + 2, torch.Generator().manual_seed(2)
    keys = torch.randperm(base * base, generator=generator)[: base * base // 2].sort().values
    orders = [
        NgramOrder(length, at, -3.0 - torch.rand(len(at), generator=generator), torch.full((len(at),), -0.5))
        for length, at in ((1, torch.arange(base)), (2, keys))
    ]
    return PieceNgram(_PIECES, orders, "trial")
