"""What a search asks of a transducer: predictor states by context, log-probs of pieces.
Knows: tensors and piece ids. Must not know: any one model, search, fusion, files.

Legend: B utterances, T frames, N pairs of a frame and a context, D size of an encoder frame, J size of the
joiner, V pieces.

A transducer (Graves 2012, arXiv 1211.3711) of a stateless predictor (Ghodsi et al. 2020) sees the last
``context_size`` pieces of a hypothesis and nothing older. So the predictor's states can be kept in a table by
context, and equal contexts share one.
"""
from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Transducer(Protocol):
    """A transducer with a stateless predictor.

    Attributes:
        context_size: pieces that the predictor sees, 2 in icefall's recipes.
        vocab_size: V, the blank included.
        blank_id: id of the blank.
        start: the ``context_size`` ids before the first piece: a search sees from it how many pieces the
            predictor reads. -1 stands for no piece; only ``start`` and the contexts after it hold it.
    """

    context_size: int
    vocab_size: int
    blank_id: int
    start: tuple[int, ...]

    def project(self, encoder_out: Tensor) -> Tensor:
        """Return frames [B,T,D] of a source's encoder as the joiner adds them up, float32 [B,T,J]."""
        ...

    def predict(self, contexts: Tensor) -> Tensor:
        """Return the predictor's states as the joiner adds them up, float32 [N,J].

        Args:
            contexts: [N,context_size] int64, the last pieces, the newest last.
        """
        ...

    def join(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Return natural-log probabilities [N,V] of the next piece or the blank, in float32.

        Args:
            encoder: [N,J] of ``project``.
            predictor: [N,J] of ``predict``; the two are broadcast against each other.
        """
        ...
