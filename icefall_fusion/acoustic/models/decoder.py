"""Transformer attention decoder over encoder frames.
Knows: frames and piece ids. Must not know: data, search, fusion, the encoder.

Legend: B utterances, N token lists an utterance, U tokens, T frames, D model size, V pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icefall_fusion.acoustic.models.attention import CrossAttention, SelfAttention, masked_bias, rotary_table
from icefall_fusion.common.checks import check, check_at_least


@dataclass(frozen=True)
class DecoderOptions:
    """The shape of the attention decoder; its model size is the encoder's.

    Args:
        heads: attention heads.
        feedforward: inner size of the feed-forward module.
        layers: number of layers.
        dropout: probability of dropping a value of a module's output in training.
    """

    heads: int = 4
    feedforward: int = 768
    layers: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(1, self, "heads", "feedforward", "layers")
        check(0 <= self.dropout < 1, "DecoderOptions.dropout", "be in [0, 1)", self.dropout)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over frames, feed-forward; pre-norm residuals."""

    def __init__(self, size: int, options: DecoderOptions) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(size)
        self.self_attention = SelfAttention(size, options.heads)
        self.cross_norm = nn.LayerNorm(size)
        self.cross_attention = CrossAttention(size, options.heads)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(size),
            nn.Linear(size, options.feedforward),
            nn.SiLU(),
            nn.Linear(options.feedforward, size),
        )
        self.dropout = nn.Dropout(options.dropout) if options.dropout > 0 else nn.Identity()

    def forward(
        self, x: Tensor, causal: Tensor, rotary: tuple, memory: Tensor, memory_bias: Tensor
    ) -> Tensor:
        """Return [B,N,U,D] for tokens x [B,N,U,D] over frames ``memory`` [B,T,D]."""
        batch, lists, length, size = x.shape
        y, _ = self.self_attention(self.self_norm(x).flatten(0, 1), causal, rotary)
        x = x + self.dropout(y.view(x.shape))
        # all token lists of an utterance are queries to one copy of its frames
        y = self.cross_attention(self.cross_norm(x).view(batch, lists * length, size), memory, memory_bias)
        x = x + self.dropout(y.view(x.shape))
        return x + self.dropout(self.feedforward(x))


class AttentionDecoder(nn.Module):
    """Transformer decoder (Vaswani et al. 2017) with rotary positions.

    Args:
        size: D.
        vocab_size: V.
    """

    def __init__(self, size: int, vocab_size: int, options: DecoderOptions) -> None:
        super().__init__()
        even = size % (2 * options.heads) == 0
        check(even, "DecoderOptions.heads", f"divide {size} into even sizes", options.heads)
        self.head_size = size // options.heads
        self.embedding = nn.Embedding(vocab_size, size)
        nn.init.normal_(self.embedding.weight, std=size**-0.5)
        self.scale = size**0.5
        self.layers = nn.ModuleList(DecoderLayer(size, options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(size)
        self.out = nn.Linear(size, vocab_size)

    def forward(self, tokens: Tensor, memory: Tensor, lens: Tensor) -> Tensor:
        """Return logits [B,N,U,V] of the piece after each token.

        Args:
            tokens: [B,N,U] inputs, sos first, padded at the end with any id.
            memory: [B,T,D] encoder frames; lens: [B] how many are real.
        """
        x = self.embedding(tokens) * self.scale
        length = tokens.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        causal_bias = masked_bias(causal[None, None], x.dtype)
        real = torch.arange(memory.shape[1], device=x.device) < lens.to(x.device)[:, None]
        memory_bias = masked_bias(real[:, None, None, :], x.dtype)
        if memory.shape[1] == 0:  # no frames: attend to one zero frame
            memory = memory.new_zeros(x.shape[0], 1, x.shape[3])
            memory_bias = x.new_zeros(x.shape[0], 1, 1, 1)
        rotary = rotary_table(0, length, self.head_size, x)
        for layer in self.layers:
            x = layer(x, causal_bias, rotary, memory, memory_bias)
        return self.out(self.norm(x))
