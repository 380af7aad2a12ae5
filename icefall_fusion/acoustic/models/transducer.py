"""Transducer head: stateless predictor and joiner over encoder frames, as in icefall.
Knows: frames and piece ids. Must not know: data, search, fusion, the encoder, how a loss is computed.

Legend: B utterances, T frames, U tokens, N contexts, D model size, P predictor size, J joiner size, V pieces.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icefall_fusion.common.checks import check, check_at_least

#: Another sum over alignments: (cells [B,T,U+1,2], lens [B], sizes [B]) -> losses [B].
LatticeLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
GROUP = 4  # channels that the predictor's convolution mixes, as in icefall


@dataclass(frozen=True)
class TransducerOptions:
    """The shape of the transducer head and its loss.

    Args:
        predictor_size: of a piece's embedding, a multiple of 4.
        joiner_size: of the sum of a frame and a predictor state.
        context_size: pieces that the predictor sees.
        prune_range: tokens a frame that the pruned loss keeps; 0: all of them, the exact loss.
        simple_scale: share of the simple loss, which finds them (Kuang et al. 2022, section 4), beside the
            pruned loss.
        weight: share of the transducer in the loss of all heads.
    """

    predictor_size: int = 256
    joiner_size: int = 256
    context_size: int = 2
    prune_range: int = 5
    simple_scale: float = 0.5
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_at_least(1, self, "predictor_size", "joiner_size", "context_size")
        even = self.predictor_size % GROUP == 0
        check(even, "TransducerOptions.predictor_size", f"be a multiple of {GROUP}", self.predictor_size)
        good = self.prune_range == 0 or self.prune_range >= 2
        check(good, "TransducerOptions.prune_range", "be 0 or at least 2", self.prune_range)
        check(self.simple_scale > 0, "TransducerOptions.simple_scale", "be above 0", self.simple_scale)
        check(0 < self.weight <= 1, "TransducerOptions.weight", "be in (0, 1]", self.weight)


class Predictor(nn.Module):
    """Embedding and a grouped convolution over the last pieces (Ghodsi et al. 2020).

    The names of its parameters are icefall's (``pruned_transducer_stateless*/decoder.py``).
    """

    def __init__(self, vocab_size: int, size: int, context_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, size)
        self.conv = nn.Conv1d(size, size, context_size, groups=size // GROUP, bias=False)

    def forward(self, pieces: Tensor) -> Tensor:
        """Return states [N,U-context_size+1,P] for pieces [N,U]; -1 stands for no piece."""
        embedded = self.embedding(pieces.clamp(min=0)) * (pieces >= 0).unsqueeze(-1)
        return F.relu(self.conv(embedded.transpose(1, 2)).transpose(1, 2))


class Joiner(nn.Module):
    """The sum of a frame and a predictor state, tanh, an output layer; parameters are named as icefall's."""

    def __init__(self, encoder_size: int, predictor_size: int, size: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_proj = nn.Linear(encoder_size, size)
        self.decoder_proj = nn.Linear(predictor_size, size)
        self.output_linear = nn.Linear(size, vocab_size)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Return logits [...,V] for projected frames and states [...,J], which are broadcast."""
        return self.output_linear(torch.tanh(encoder + predictor))


class TransducerHead(nn.Module):
    """Predictor and joiner (Graves 2012); `project`, `predict` and `join` are what a search asks.

    Args:
        size: D of an encoder frame.
        vocab_size: V, the blank included.
        blank_id: the blank's id.
        options: shape.

    Attributes:
        start: the context before the first piece: no piece, and the blank as start of text.
        lattice_loss: another implementation of the loss's sum over alignments; None: torchaudio's.
    """

    def __init__(self, size: int, vocab_size: int, blank_id: int, options: TransducerOptions) -> None:
        super().__init__()
        self.options = options
        self.lattice_loss: Optional[LatticeLoss] = None
        self.vocab_size, self.blank_id, self.context_size = vocab_size, blank_id, options.context_size
        self.start = (-1,) * (options.context_size - 1) + (blank_id,)
        self.predictor = Predictor(vocab_size, options.predictor_size, options.context_size)
        self.joiner = Joiner(size, options.predictor_size, options.joiner_size, vocab_size)
        if options.prune_range > 0:  # of the simple loss alone
            self.simple_am_proj = nn.Linear(size, vocab_size)
            self.simple_lm_proj = nn.Linear(options.predictor_size, vocab_size)

    def project(self, encoder_out: Tensor) -> Tensor:
        """Return frames [B,T,D] as the joiner adds them up: float32 [B,T,J]."""
        return self.joiner.encoder_proj(encoder_out).float()

    def predict(self, contexts: Tensor) -> Tensor:
        """Return states [N,J] float32 for contexts [N,context_size]; see `acoustic.transducer.Transducer`."""
        return self.joiner.decoder_proj(self.predictor(contexts)[:, 0]).float()

    def join(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Return log-probs [N,V] float32 for projected frames and states [N,J]."""
        return self.joiner(encoder, predictor).float().log_softmax(dim=-1)

    def histories(self, targets: Tensor) -> Tensor:
        """Return the pieces [B,context_size+U] of texts [B,U], their start before them."""
        return torch.cat((targets.new_tensor(self.start).expand(len(targets), -1), targets), dim=1)

    @torch.no_grad()
    def greedy(self, frames: Tensor, lens: Tensor) -> list[list[int]]:
        """Return the pieces of a greedy search, one a frame at most, for projected frames [B,T,J].

        As icefall's ``greedy_search_batch``; a yardstick of training.
        """
        context = torch.tensor([self.start] * len(frames), device=frames.device)
        state, pieces = self.predict(context), []
        for frame, now in enumerate(frames.unbind(1)):
            best = self.join(now, state).argmax(-1)
            best = torch.where(frame < lens, best, self.blank_id)
            said = best != self.blank_id
            pieces.append(torch.where(said, best, -1))
            context = torch.where(said[:, None], torch.cat((context[:, 1:], best[:, None]), 1), context)
            state = torch.where(said[:, None], self.predict(context), state)
        if not pieces:
            return [[] for _ in frames]
        return [[piece for piece in row if piece >= 0] for row in torch.stack(pieces, 1).tolist()]
