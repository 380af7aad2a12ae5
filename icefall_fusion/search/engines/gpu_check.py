"""Whether the GPU kernel finds on a device what tensors find there, tried before it is first relied on.
Knows: small random searches. Must not know: language models, real data.
"""
from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
from torch import Tensor

from icefall_fusion.ngram.piece_ngram import NOTHING, NgramOrder, PieceNgram
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.fusion_set import JointFusion
from icefall_fusion.search.search_input import check_input
from icefall_fusion.search.stop_rule import Pace

if TYPE_CHECKING:
    from icefall_fusion.search.beam import Fusion

_PIECES, _BEAM, _FRAMES = 40, 8, 30
_WORST = 1e-2  # nats between two ways to add up the same


class _Trial:
    """A fusion that ranks by the last piece every seven frames, and by an n-gram if it has one."""

    word_bonus, index = 0.0, 0

    def __init__(self, source: str, pace: Pace, ngram: Optional[PieceNgram] = None) -> None:
        self.source, self.weight, self._pace, self.piece_ngram = source, 0.4, pace, ngram

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Any) -> None:
        self.index = index

    def pace(self) -> Pace:
        return self._pace

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Optional[Tensor]:
        if self.piece_ngram is None:
            return None
        before = torch.where(beam.last == beam.blank, self.piece_ngram.start_id, beam.last)
        contexts = [before.unsqueeze(2).expand(-1, -1, pieces.shape[1])]
        contexts += [torch.full_like(contexts[0], NOTHING)] * (self.piece_ngram.order - 2)
        return self.piece_ngram.score(contexts, pieces.unsqueeze(1).expand_as(contexts[0]))

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        return None

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> None:
        if self._pace.every and (frame + 1) % self._pace.every == 0:
            self.fuse_now(beam, active)

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        beam.fused += 0.7 * (beam.last % 3) * fires.unsqueeze(1)

    def finish(self, beam: Beam) -> None:
        return None

    def stats(self) -> dict[str, float]:
        return {}


def kind_of(joint: JointFusion) -> str:
    """Return which of the kernel's main forms a search needs: ``alone``, ``ranked`` or ``ngram``."""
    return "ngram" if joint.shallow else "ranked" if joint.ranks else "alone"


@functools.lru_cache(maxsize=None)
def kernel_fails(device: torch.device, kind: str, run: Callable[..., None]) -> str:
    """Return "" if the kernel finds on a device what tensors find there, else what happens; tried once.

    Args:
        device: a GPU.
        kind: see `kind_of`.
        run: runs an engine by name: ``run(engine, given, beam, joint)``.
    """
    generator = torch.Generator().manual_seed(1)
    log_probs = (3 * torch.randn(3, _FRAMES, _PIECES, generator=generator)).log_softmax(-1).to(device)
    given = check_input(log_probs, torch.tensor([_FRAMES, 21, 0]), 0, None, None)
    found = []
    for engine in ("torch", "triton"):
        joint = JointFusion(_trials(kind, device), None)
        beam = Beam.at_root(given, _BEAM, None, len(joint.fusions))
        try:
            joint.begin(beam, given.ids)
            run(engine, given, beam, joint)
            found.append((beam.log_total.double() + beam.offset.unsqueeze(1)).sort(1).values.cpu())
        except Exception as error:  # of a compiler or a driver: any
            return f"{engine} does not run on {device}: {type(error).__name__}: {str(error)[-400:]}"
    worst = float((found[0] - found[1]).nan_to_num(0.0).abs().max())
    told = f"on {device} the kernel's scores are {worst:.3g} nats off those of tensors"
    return "" if worst < _WORST else told


def _trials(kind: str, device: torch.device) -> list[Fusion]:
    if kind == "alone":
        return []
    ranked: list[Any] = [_Trial("trial", Pace(7))]
    if kind == "ngram":
        ranked.append(_Trial("ngram", Pace(0), _random_bigram().to(device)))
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
