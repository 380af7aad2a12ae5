"""A batch of CTC log-probs.
Knows: tensors, a vocabulary. Must not know: acoustic models, search, fusion, manifests.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.text.tokens import AcousticTokens


@dataclass
class Emissions:
    """CTC log-probs of a batch.

    Args:
        ids: utterance ids.
        log_probs: [B,T,V] natural-log; frames beyond ``lens`` are arbitrary.
        lens: [B] frames of each utterance.
        tokens: the vocabulary, V pieces.
        frame_shift: seconds a frame.
        encoder_out: [B,T,D] for an attention decoder, or None.
        joiner_frames: [B,T,J] float32 for a transducer (`acoustic/transducer.py`), or None.

    Raises:
        ValueError: shapes or the vocabulary do not fit, or an utterance (named) has NaN or +inf.
    """

    ids: list[str]
    log_probs: Tensor
    lens: Tensor
    tokens: AcousticTokens
    frame_shift: float
    encoder_out: Optional[Tensor] = None
    joiner_frames: Optional[Tensor] = None

    def __post_init__(self) -> None:
        check(self.log_probs.dim() == 3, "log_probs", "be [B,T,V]", tuple(self.log_probs.shape))
        batch, frames, pieces = self.log_probs.shape
        rows = len(self.ids), len(self.lens)
        check(rows == (batch, batch), "ids and lens", f"have {batch} rows", rows)
        if pieces != self.tokens.size:
            raise ValueError(f"the vocabulary has {self.tokens.size} pieces, but the log-probs have {pieces}")
        check(bool((self.lens <= frames).all()), "lens", f"be at most T = {frames}", self.lens.tolist())
        inside = torch.arange(frames)[None] < self.lens.cpu()[:, None]
        highest = self.log_probs.amax(dim=2).cpu() if frames else torch.zeros(batch, 0)
        bad = (inside & ~(highest < math.inf)).any(dim=1)  # NaN wins amax and fails the comparison
        if bool(bad.any()):
            name = self.ids[int(bad.int().argmax())]
            raise ValueError(f"log_probs must not hold NaN or +inf, but utterance {name} does")

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> Emissions:
        """Return some utterances, cut to the longest of them."""
        index = torch.tensor(list(rows), dtype=torch.long)
        lens = self.lens[index.to(self.lens.device)]
        length = int(lens.max()) if len(rows) else 0
        at = index.to(self.log_probs.device)
        out, joined = (None if x is None else x[at, :length] for x in (self.encoder_out, self.joiner_frames))
        ids = [self.ids[row] for row in rows]
        return Emissions(ids, self.log_probs[at, :length], lens, self.tokens, self.frame_shift, out, joined)


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows [n,...] of different lengths as one float32 tensor [B,T,...], zero-padded, and lengths [B].

    For log-probs; batches of features are padded by `data.features.pad_features`.
    """
    lens = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return torch.nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True), lens


def scatter_rows(rows: Sequence[int], values: Tensor, batch: int) -> Tensor:
    """Put ``values`` [n,T,...] into rows of a zero tensor [batch,T,...]."""
    if len(rows) == batch:
        return values
    out = values.new_zeros((batch, *values.shape[1:]))
    out[torch.tensor(list(rows), device=values.device)] = values
    return out


def no_frames(ids: Sequence[str], tokens: AcousticTokens, frame_shift: float) -> Emissions:
    """Return emissions of utterances none of which has a frame."""
    lens = torch.zeros(len(ids), dtype=torch.long)
    return Emissions(list(ids), torch.zeros(len(ids), 0, tokens.size), lens, tokens, frame_shift)
