"""What all sources of log-probs share.
Knows: features, vocabularies. Must not know: any one model, search, fusion, manifests.
"""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Protocol, Sequence

import torch
from torch import Tensor

from icefall_fusion.acoustic.emissions import Emissions, no_frames, scatter_rows
from icefall_fusion.acoustic.loading import loading
from icefall_fusion.acoustic.transducer import Transducer
from icefall_fusion.data.features import DIM, FRAME_SHIFT, pad_features
from icefall_fusion.text.tokens import AcousticTokens

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources import EmissionOptions
    from icefall_fusion.acoustic.sources.chunked import ChunkedEncoder

_TEN_SECONDS = round(10 / FRAME_SHIFT)  # feature frames


class EmissionSource(Protocol):
    """Turns a batch of inputs into CTC log-probs.

    Attributes:
        wants: kind of input: ``features`` [T,80] log-mel, ``audio`` [samples] at 16 kHz, or ``nothing``
            (saved log-probs need ids only).
        tokens: the vocabulary.
        model: scores token lists by an attention decoder
            (``score_tokens(encoder_out, lens, token_lists)``), or None.
        transducer: predictor and joiner for the ``joiner_frames`` of its emissions, or None.
        has_ctc: whether it has a CTC head; without one its ``log_probs`` are -inf.
    """

    wants: str
    tokens: AcousticTokens
    model: Any
    transducer: Optional[Transducer]
    has_ctc: bool

    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor]) -> Emissions:
        """Return the log-probs of a batch; an input too short for one output frame gets none."""
        ...


class FeatureSource:
    """A source over log-mel features; a subclass says how features become frames and frames log-probs.

    A subclass sets ``tokens``, ``device`` and ``frame_shift`` (seconds an output frame).
    """

    wants = "features"
    least_frames = 1  # shorter utterances have no output frame
    chunked: Optional[ChunkedEncoder] = None  # its encoder, if that is a streaming one
    model: Any = None
    transducer: Optional[Transducer] = None
    has_ctc = True
    tokens: AcousticTokens
    device: torch.device
    frame_shift: float

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """Return encoder frames [B,T',D] and their numbers [B] for features [B,T,80] and lengths [B]."""
        raise NotImplementedError

    def log_probs(self, encoder_out: Tensor) -> Tensor:
        """Return natural-log probabilities [B,T',V] of the pieces for encoder frames [B,T',D].

        Without a CTC head they are -inf (one number, expanded).
        """
        never = encoder_out.new_full((1, 1, 1), -math.inf)
        return never.expand(*encoder_out.shape[:2], self.tokens.size)

    def joiner_frames(self, encoder_out: Tensor) -> Optional[Tensor]:
        """Return what a transducer's joiner reads [B,T',J] of encoder frames [B,T',D]; None without one."""
        return None if self.transducer is None else self.transducer.project(encoder_out)

    @torch.no_grad()
    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor]) -> Emissions:
        rows = [row for row, features in enumerate(inputs) if len(features) >= self.least_frames]
        if not rows:
            return self._no_frames(ids)
        features, lens = pad_features([inputs[row] for row in rows])
        encoder_out, kept = self.encode(features.to(self.device), lens.to(self.device))
        out_lens = torch.zeros(len(ids), dtype=torch.long)
        out_lens[rows] = kept.cpu().long()
        log_probs = scatter_rows(rows, self.log_probs(encoder_out), len(ids))
        joined = self.joiner_frames(encoder_out)
        if joined is not None:
            joined = scatter_rows(rows, joined, len(ids))
        encoder_out = scatter_rows(rows, encoder_out, len(ids))
        return Emissions(list(ids), log_probs, out_lens, self.tokens, self.frame_shift, encoder_out, joined)

    def _no_frames(self, ids: Sequence[str]) -> Emissions:
        made = no_frames(ids, self.tokens, self.frame_shift)
        if self.transducer is None:
            return made
        start = torch.tensor([self.transducer.start], device=self.device)
        return replace(made, joiner_frames=self.transducer.predict(start)[None, :0].expand(len(ids), -1, -1))

    @torch.no_grad()
    def measured_frame_shift(self, name: str) -> float:
        """Return the seconds of an output frame, measured on ten seconds of features.

        Subsampling loses frames at the edges, so a short input would mislead. A streaming encoder makes whole
        chunks, the last one of padding: one of its chunks tells.

        Args:
            name: the model, for messages.

        Raises:
            ValueError: the encoder does not take features [B,T,80] and lengths, or the log-probs are of
                another vocabulary.
        """
        silence = torch.zeros(1, _TEN_SECONDS, DIM, device=self.device)
        with loading(name, f"an encoder of {DIM} features a frame"):
            encoder_out = self.encode(silence, torch.tensor([_TEN_SECONDS], device=self.device))[0]
        sizes = []
        if self.has_ctc:
            with loading(name, "a CTC output layer"):
                sizes.append(self.log_probs(encoder_out[:, :1]).shape[-1])
        if self.transducer is not None:
            with loading(name, "a transducer"):
                start = torch.tensor([self.transducer.start], device=self.device)
                joined = self.joiner_frames(encoder_out[:, :1])
                sizes.append(self.transducer.join(joined[0], self.transducer.predict(start)).shape[-1])
        for outputs in sizes:
            if outputs != self.tokens.size:
                raise ValueError(f"the vocabulary has {self.tokens.size} pieces, but {name} has {outputs}")
        subsampling = _TEN_SECONDS / max(1, encoder_out.shape[1])
        if self.chunked is not None and self.chunked.subsampling is not None:
            subsampling = self.chunked.subsampling
        return round(subsampling) * FRAME_SHIFT


def tokens_of(options: EmissionOptions) -> AcousticTokens:
    """Load the vocabulary that the options name, else the one beside the model (see `AcousticTokens.load`).

    Raises:
        FileNotFoundError: there is none.
    """
    if options.tokens:
        return AcousticTokens.load(options.tokens)
    folder = Path(options.model) if Path(options.model).is_dir() else Path(options.model).parent
    try:
        return AcousticTokens.load(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "EmissionOptions.tokens must name a bpe.model, tokens.txt, units.txt or vocab.json, for there is "
            f"none beside {options.model!r}"
        ) from error
