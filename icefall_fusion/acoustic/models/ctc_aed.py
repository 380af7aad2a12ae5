"""CTC and attention encoder-decoder: loss, N-best scores.
Knows: features and piece ids. Must not know: data, search, fusion.

Legend: B utterances, N token lists an utterance, U tokens, T frames, D model size, V pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icefall_fusion.acoustic.models.conformer import ChunkOptions, ConformerEncoder, EncoderOptions
from icefall_fusion.acoustic.models.ctc import CtcHead
from icefall_fusion.acoustic.models.decoder import AttentionDecoder, DecoderOptions
from icefall_fusion.acoustic.models.subsampling import FACTOR
from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.files import PathLike
from icefall_fusion.common.processes import upload
from icefall_fusion.text.tokens import AcousticTokens

IGNORED = -100  # target id that the decoder's loss skips


@dataclass(frozen=True)
class ModelOptions:
    """The acoustic model and its loss.

    Args:
        vocab_size: V, blank included.
        blank_id: id of the CTC blank.
        sos_eos_id: id that starts and ends the decoder's text.
        encoder: shape of the encoder.
        decoder: shape of the attention decoder.
        ctc_weight: share of CTC in the loss; the rest is the attention decoder's.
        middle_weight: share of the encoder's middle (80 ms frames) in the CTC loss.
        label_smoothing: probability spread over all pieces in the decoder's targets.
        chunk_probability: share of training batches that see a random chunk mask.
        chunk_sizes: chunk sizes (40 ms frames), one of which is drawn for such a batch.
    """

    vocab_size: int = 500
    blank_id: int = 0
    sos_eos_id: int = 1
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    ctc_weight: float = 0.3
    middle_weight: float = 0.3
    label_smoothing: float = 0.1
    chunk_probability: float = 0.0
    chunk_sizes: tuple[int, ...] = (8, 16, 32)

    def __post_init__(self) -> None:
        check_at_least(2, self, "vocab_size")
        for name in ("blank_id", "sos_eos_id"):
            value, last = getattr(self, name), self.vocab_size - 1
            check(0 <= value <= last, f"ModelOptions.{name}", f"be in 0..{last}", value)
        for name in ("ctc_weight", "middle_weight", "label_smoothing", "chunk_probability"):
            check(0 <= getattr(self, name) <= 1, f"ModelOptions.{name}", "be in [0, 1]", getattr(self, name))
        object.__setattr__(self, "chunk_sizes", tuple(self.chunk_sizes))
        check(len(self.chunk_sizes) > 0, "ModelOptions.chunk_sizes", "not be empty", self.chunk_sizes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelOptions":
        """Build from ``dataclasses.asdict`` output; unknown names are refused by the constructor."""
        values = dict(values)
        values["encoder"] = EncoderOptions(**values.get("encoder", {}))
        values["decoder"] = DecoderOptions(**values.get("decoder", {}))
        return cls(**values)


class CtcAed(nn.Module):
    """Conformer encoder, CTC head, attention decoder.

    Args:
        options: shape and loss.
        bpe: the SentencePiece model (file or folder) of its pieces, if known; ``save`` copies it.

    Attributes:
        tokens: the vocabulary of ``bpe``, or None.
    """

    def __init__(self, options: ModelOptions, bpe: Optional[PathLike] = None) -> None:
        super().__init__()
        self.options = options
        self.bpe = None if bpe is None else Path(bpe) / "bpe.model" if Path(bpe).is_dir() else Path(bpe)
        self.tokens = None if self.bpe is None else AcousticTokens.load(self.bpe)
        if self.tokens is not None:
            check_vocabulary(options, self.tokens.size, self.tokens.blank_id, f"the pieces of {self.bpe}")
        size = options.encoder.size
        self.encoder = ConformerEncoder(options.encoder)
        self.ctc = CtcHead(size, options.vocab_size, options.blank_id)
        self.middle_norm = nn.LayerNorm(size)
        self.middle_ctc = CtcHead(size, options.vocab_size, options.blank_id)
        self.decoder = AttentionDecoder(size, options.vocab_size, options.decoder)

    def forward(
        self, features: Tensor, lens: Tensor, targets: Sequence[Sequence[int]],
        frames: Optional[Sequence[int]] = None,
    ) -> tuple[Tensor, dict]:
        """Return ``loss``; a DDP wrapper calls ``forward``."""
        return self.loss(features, lens, targets, frames)

    def ctc_log_probs(self, encoder_out: Tensor) -> Tensor:
        """Return float32 log-probs [B,T,V] of encoder frames [B,T,D]."""
        return self.ctc(encoder_out)

    def loss(
        self, features: Tensor, lens: Tensor, targets: Sequence[Sequence[int]],
        frames: Optional[Sequence[int]] = None,
    ) -> tuple[Tensor, dict]:
        """Return the loss a token (CTC and attention) and its terms.

        Args:
            features: [B,T,bins]; lens: [B].
            targets: pieces of each utterance, without blank, sos or eos.
            frames: the numbers of ``lens`` on the host; without them a GPU is waited for.

        Returns:
            scalar loss; dict of detached scalars: ``loss``, ``ctc``, ``ctc_middle``, ``attention`` (all a
            token), ``tokens``, ``frames``, ``impossible`` (utterances too short for CTC; they count zero).
        """
        options = self.options
        frames = lens.tolist() if frames is None else frames
        tokens = max(sum(len(pieces) for pieces in targets), 1)
        x, out_lens, middle = self.encoder.forward_with_middle(features, lens, self._random_chunk(), frames)
        teacher = self._teacher([[pieces] for pieces in targets], x.device)
        padded = teacher[1][:, 0].clamp(min=0)
        host_lens = [-(-count // FACTOR) for count in frames]
        ctc, impossible = self.ctc.loss(x, host_lens, targets, padded)
        ctc = ctc / tokens
        total = ctc
        terms = {"ctc": ctc}
        if options.middle_weight > 0:
            half_lens = [(count + 1) // 2 for count in host_lens]
            inner, _ = self.middle_ctc.loss(self.middle_norm(middle), half_lens, targets, padded)
            terms["ctc_middle"] = inner / tokens
            total = (1 - options.middle_weight) * ctc + options.middle_weight * terms["ctc_middle"]
        if options.ctc_weight < 1:
            terms["attention"] = self.decoder_loss(x, out_lens, targets, teacher)
            total = options.ctc_weight * total + (1 - options.ctc_weight) * terms["attention"]
        info: dict[str, Any] = {name: value.detach() for name, value in {"loss": total, **terms}.items()}
        info.update(tokens=tokens, frames=sum(frames), impossible=impossible)
        return total, info

    def decoder_loss(
        self, encoder_out: Tensor, lens: Tensor, targets: Sequence[Sequence[int]],
        teacher: Optional[tuple[Tensor, Tensor]] = None,
    ) -> Tensor:
        """Return the label-smoothed cross-entropy a token (eos included) of teacher forcing.

        Args:
            encoder_out: [B,T,D]; lens: [B].
            targets: pieces of each utterance.
            teacher: inputs and outputs made of them, if they are there.
        """
        inputs, outputs = teacher or self._teacher([[pieces] for pieces in targets], encoder_out.device)
        logits = self.decoder(inputs, encoder_out, lens)
        return F.cross_entropy(
            logits.flatten(0, 2).float(),
            outputs.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.options.label_smoothing,
        )

    @torch.no_grad()
    def score_tokens(
        self, encoder_out: Tensor, lens: Tensor, token_lists: Sequence[Sequence[Sequence[int]]]
    ) -> list[Tensor]:
        """Return the decoder's natural-log probability of each token list of each utterance, eos included.

        Args:
            encoder_out: [B,T,D]; lens: [B].
            token_lists: for each utterance any number of token lists (an N-best list).

        Returns:
            for each utterance a float32 tensor [N] on the CPU.
        """
        count = len(encoder_out)
        check(len(token_lists) == count, "token_lists", f"hold {count} utterances", len(token_lists))
        most = max((len(lists) for lists in token_lists), default=0)
        if most == 0:
            return [torch.zeros(0) for _ in token_lists]
        padded = [list(lists) + [[]] * (most - len(lists)) for lists in token_lists]
        inputs, outputs = self._teacher(padded, encoder_out.device)
        log_probs = self.decoder(inputs, encoder_out, lens).float().log_softmax(dim=-1)
        real = outputs != IGNORED
        picked = log_probs.gather(3, outputs.clamp(min=0)[..., None])[..., 0]
        scores = torch.where(real, picked, picked.new_zeros(())).sum(dim=2).cpu()
        return [scores[row, : len(lists)] for row, lists in enumerate(token_lists)]

    def _teacher(
        self, token_lists: Sequence[Sequence[Sequence[int]]], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return decoder inputs and targets [B,N,U+1] of equally many lists an utterance."""
        end = self.options.sos_eos_id
        length = 1 + max((len(pieces) for lists in token_lists for pieces in lists), default=0)
        inputs = [[[end, *p] + [end] * (length - 1 - len(p)) for p in lists] for lists in token_lists]
        outputs = [[[*p, end] + [IGNORED] * (length - 1 - len(p)) for p in lists] for lists in token_lists]
        both = upload([inputs, outputs], device, torch.long)
        return both[0], both[1]

    def _random_chunk(self) -> Optional[ChunkOptions]:
        options = self.options
        if not self.training or options.chunk_probability == 0:
            return None
        if float(torch.rand(())) >= options.chunk_probability:
            return None
        return ChunkOptions(options.chunk_sizes[int(torch.randint(len(options.chunk_sizes), ()))], None)


def check_vocabulary(options: ModelOptions, size: int, blank_id: int, what: str) -> None:
    """Raise ValueError, with both sizes, unless a vocabulary fits the model."""
    if size != options.vocab_size:
        outputs = options.vocab_size
        raise ValueError(f"{what} have {size} pieces, but the acoustic model has {outputs} outputs")
    rule = f"be {options.blank_id} as in the acoustic model"
    check(blank_id == options.blank_id, "blank_id", rule, blank_id)
