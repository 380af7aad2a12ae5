"""Stateless transducers of icefall: modules named decoder and joiner, in Python or in TorchScript.
Knows: icefall's interface of these modules. Must not know: files, search, fusion, manifests.
"""
from __future__ import annotations

import copy
from typing import Any, Callable

import torch
from torch import Tensor

from icefall_fusion.common.checks import check


class ModuleTransducer:
    """``decoder`` (the predictor) and ``joiner`` of a source's network; see `Transducer`.

    Args:
        source: with ``network`` and ``tokens``.
        name: of the model, for messages.

    Raises:
        ValueError: the joiner has no projections of its own, or the blank is not the vocabulary's.
    """

    def __init__(self, source: Any, name: str) -> None:
        network, tokens = source.network, source.tokens
        self._predictor, self._joiner = network.decoder, network.joiner
        for part in ("encoder_proj", "decoder_proj"):
            if not hasattr(self._joiner, part):
                raise ValueError(f"its joiner must have {part}, but has none")
        self.context_size, self.blank_id = int(self._predictor.context_size), int(self._predictor.blank_id)
        self.vocab_size = tokens.size
        check(self.blank_id == tokens.blank_id, f"blank of {name}", f"be {tokens.blank_id}", self.blank_id)
        copied = copy.deepcopy(self._predictor).cpu()
        self.start = start_of(lambda contexts: copied(contexts, False), self.context_size, self.vocab_size,
                              self.blank_id)

    def project(self, encoder_out: Tensor) -> Tensor:
        return self._joiner.encoder_proj(encoder_out).float()

    def predict(self, contexts: Tensor) -> Tensor:
        return self._joiner.decoder_proj(self._predictor(contexts, False)[:, 0]).float()

    def join(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        return self._joiner(encoder, predictor, False).float().log_softmax(dim=-1)


@torch.no_grad()
def start_of(predict: Callable[[Tensor], Tensor], context_size: int, vocab_size: int,
             blank_id: int) -> tuple[int, ...]:
    """Return the context before the first piece that a model of icefall was trained with.

    It is "no piece" (-1) and the blank. Older models do not know -1: they refuse it, or read the last piece
    of the vocabulary. Their texts start with blanks, whose embedding is zero.

    Args:
        predict: of contexts [N,context_size], on a CPU: there a wrong index is an error that can be caught,
            a GPU is of no use after it.
        context_size, vocab_size, blank_id: see `Transducer`.
    """
    rest = context_size - 1
    start, blanks = (-1,) * rest + (blank_id,), (blank_id,) * (rest + 1)
    if rest == 0:
        return start
    last = (vocab_size - 1,) * rest + (blank_id,)
    try:
        none, piece = (predict(torch.tensor([one])) for one in (start, last))
    except Exception as error:  # TorchScript and onnxruntime have types of their own for a wrong index
        if "index" not in str(error).lower() and "indices" not in str(error).lower():
            raise
        return blanks
    return blanks if torch.equal(none, piece) else start
