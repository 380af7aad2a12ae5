"""Conformer with a CTC head, an attention decoder and a transducer head, each optional: loss, N-best scores.
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
from icefall_fusion.acoustic.models.transducer import TransducerHead, TransducerOptions
from icefall_fusion.acoustic.models.transducer_loss import rnnt_loss_sum
from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.files import PathLike
from icefall_fusion.common.processes import upload
from icefall_fusion.text.tokens import AcousticTokens

IGNORED = -100  # target id that the decoder's loss skips
HEADS = ("ctc", "aed", "transducer")


@dataclass(frozen=True)
class ModelOptions:
    """The acoustic model and its loss.

    Args:
        vocab_size: V, blank included.
        blank_id: id of the CTC blank.
        sos_eos_id: id that starts and ends the decoder's text.
        heads: which there are: ctc, aed (the attention decoder), transducer.
        encoder: shape of the encoder.
        decoder: shape of the attention decoder.
        transducer: shape and loss of the transducer head.
        ctc_weight: share of CTC in the loss of CTC and attention; the rest is the attention decoder's.
        middle_weight: share of the encoder's middle (80 ms frames) in the CTC loss.
        label_smoothing: probability spread over all pieces in the decoder's targets.
        chunk_probability: share of training batches that see a random chunk mask.
        chunk_sizes: chunk sizes (40 ms frames), one of which is drawn for such a batch.
    """

    vocab_size: int = 500
    blank_id: int = 0
    sos_eos_id: int = 1
    heads: tuple[str, ...] = ("ctc", "aed")
    encoder: EncoderOptions = field(default_factory=EncoderOptions)
    decoder: DecoderOptions = field(default_factory=DecoderOptions)
    transducer: TransducerOptions = field(default_factory=TransducerOptions)
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
        for head in self.heads:
            check_choice(head, HEADS, "ModelOptions.heads")
        object.__setattr__(self, "heads", tuple(head for head in HEADS if head in self.heads))
        check(len(self.heads) > 0, "ModelOptions.heads", "name at least one head", self.heads)
        object.__setattr__(self, "chunk_sizes", tuple(self.chunk_sizes))
        check(len(self.chunk_sizes) > 0, "ModelOptions.chunk_sizes", "not be empty", self.chunk_sizes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelOptions":
        """Build from ``dataclasses.asdict`` output; unknown names are refused by the constructor."""
        values = dict(values)
        values["encoder"] = EncoderOptions(**values.get("encoder", {}))
        values["decoder"] = DecoderOptions(**values.get("decoder", {}))
        values["transducer"] = TransducerOptions(**values.get("transducer", {}))
        return cls(**values)


class CtcAed(nn.Module):
    """Conformer encoder with a CTC head, an attention decoder and a transducer head; those left out are None.

    Args:
        options: heads, shape and loss.
        bpe: the SentencePiece model (file or folder) of its pieces, if known; ``save`` copies it.

    Attributes:
        tokens: the vocabulary of ``bpe``, or None.
        frozen: parts that are not trained, see ``freeze``.
    """

    def __init__(self, options: ModelOptions, bpe: Optional[PathLike] = None) -> None:
        super().__init__()
        self.options = options
        self.bpe = None if bpe is None else Path(bpe) / "bpe.model" if Path(bpe).is_dir() else Path(bpe)
        self.tokens = None if self.bpe is None else AcousticTokens.load(self.bpe)
        if self.tokens is not None:
            check_vocabulary(options, self.tokens.size, self.tokens.blank_id, f"the pieces of {self.bpe}")
        size = options.encoder.size
        self.frozen: tuple[str, ...] = ()
        self.encoder = ConformerEncoder(options.encoder)
        self.ctc = self.middle_norm = self.middle_ctc = self.decoder = self.transducer = None
        if "ctc" in options.heads:
            self.ctc = CtcHead(size, options.vocab_size, options.blank_id)
            self.middle_norm = nn.LayerNorm(size)
            self.middle_ctc = CtcHead(size, options.vocab_size, options.blank_id)
        if "aed" in options.heads:
            self.decoder = AttentionDecoder(size, options.vocab_size, options.decoder)
        if "transducer" in options.heads:
            self.transducer = TransducerHead(size, options.vocab_size, options.blank_id, options.transducer)

    def forward(
        self, features: Tensor, lens: Tensor, targets: Sequence[Sequence[int]],
        frames: Optional[Sequence[int]] = None, encoded: bool = False,
    ) -> tuple[Tensor, dict]:
        """Return ``loss``; a DDP wrapper calls ``forward``."""
        return self.loss(features, lens, targets, frames, encoded)

    @property
    def trained_heads(self) -> tuple[str, ...]:
        """The heads that are not frozen."""
        return tuple(head for head in self.options.heads if head not in self.frozen)

    def freeze(self, parts: Sequence[str]) -> None:
        """Do not train some parts; frozen heads have no part in the loss.

        Args:
            parts: of ``encoder`` and the heads.

        Raises:
            ValueError: the model has no such part, or no head is left to train.
        """
        for part in parts:
            check_choice(part, ("encoder", *self.options.heads), "TrainOptions.freeze")
        self.frozen = tuple(parts)
        rule = f"leave one of {list(self.options.heads)} to train"
        check(len(self.trained_heads) > 0, "TrainOptions.freeze", rule, list(parts))
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> CtcAed:
        """Set the mode of training or evaluation; frozen parts stay in evaluation (no dropout)."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        parts = {"encoder": [self.encoder], "ctc": [self.ctc, self.middle_norm, self.middle_ctc],
                 "aed": [self.decoder], "transducer": [self.transducer]}
        return [module for part in self.frozen for module in parts[part]]

    def ctc_log_probs(self, encoder_out: Tensor) -> Tensor:
        """Return float32 log-probs [B,T,V] of encoder frames [B,T,D]."""
        return self.ctc(encoder_out)

    def loss(
        self, features: Tensor, lens: Tensor, targets: Sequence[Sequence[int]],
        frames: Optional[Sequence[int]] = None, encoded: bool = False,
    ) -> tuple[Tensor, dict]:
        """Return the loss a token of the heads that are trained, and its terms.

        Args:
            features: [B,T,bins]; lens: [B].
            targets: pieces of each utterance, without blank, sos or eos.
            frames: the numbers of ``lens`` on the host; without them a GPU is waited for.
            encoded: ``features`` are frames [B,T,D] of the encoder (ctc then needs ``middle_weight`` 0).

        Returns:
            scalar loss; dict of detached scalars: ``loss``, ``ctc``, ``ctc_middle``, ``attention``,
            ``transducer``, ``transducer_simple`` (all a token), ``tokens``, ``frames``, ``impossible``
            (utterances too short for a head; they count zero).
        """
        options, heads = self.options, self.trained_heads
        frames = lens.tolist() if frames is None else frames
        tokens = max(sum(len(pieces) for pieces in targets), 1)
        x, out_lens, middle, host_lens = features, lens, None, list(frames)
        if not encoded:
            chunk, host_lens = self._random_chunk(), [-(-count // FACTOR) for count in frames]
            x, out_lens, middle = self.encoder.forward_with_middle(features, lens, chunk, frames)
        terms: dict[str, Tensor] = {}
        total, impossible = None, 0
        teacher = None if heads == ("transducer",) else self._teacher([[p] for p in targets], x.device)
        if "ctc" in heads:
            padded = teacher[1][:, 0].clamp(min=0)
            ctc, impossible = self.ctc.loss(x, host_lens, targets, padded)
            total = terms["ctc"] = ctc / tokens
            if options.middle_weight > 0:
                half_lens = [(count + 1) // 2 for count in host_lens]
                inner, _ = self.middle_ctc.loss(self.middle_norm(middle), half_lens, targets, padded)
                terms["ctc_middle"] = inner / tokens
                total = (1 - options.middle_weight) * total + options.middle_weight * terms["ctc_middle"]
        if "aed" in heads and (options.ctc_weight < 1 or total is None):
            terms["attention"] = self.decoder_loss(x, out_lens, targets, teacher)
            total = join_losses(total, terms["attention"], options.ctc_weight)
        if "transducer" in heads:
            found, lost = self.transducer_loss(x, host_lens, targets)
            terms.update({name: value / tokens for name, value in found.items()})
            loss = terms["transducer"]
            if "transducer_simple" in terms:
                loss = loss + options.transducer.simple_scale * terms["transducer_simple"]
            total = join_losses(total, loss, 1 - options.transducer.weight)
            impossible = max(impossible, lost)
        info: dict[str, Any] = {name: value.detach() for name, value in {"loss": total, **terms}.items()}
        info.update(tokens=tokens, frames=sum(frames), impossible=impossible)
        return total, info

    def transducer_loss(
        self, encoder_out: Tensor, lens: Sequence[int], targets: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Tensor], int]:
        """Return the summed losses of the transducer head, by name, and the utterances without a frame."""
        found = rnnt_loss_sum(self.transducer, encoder_out, lens, targets)
        losses = {"transducer": found.loss}
        if found.simple is not None:
            losses["transducer_simple"] = found.simple
        return losses, found.impossible

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
        return F.cross_entropy(logits.flatten(0, 2).float(), outputs.flatten(), ignore_index=IGNORED,
                               label_smoothing=self.options.label_smoothing)

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


def join_losses(first: Optional[Tensor], second: Tensor, share: float) -> Tensor:
    """Return ``share`` of the first loss and the rest of the second, or the second if there is no first."""
    return second if first is None else share * first + (1 - share) * second


def check_vocabulary(options: ModelOptions, size: int, blank_id: int, what: str) -> None:
    """Raise ValueError, with both sizes, unless a vocabulary fits the model."""
    if size != options.vocab_size:
        outputs = options.vocab_size
        raise ValueError(f"{what} have {size} pieces, but the acoustic model has {outputs} outputs")
    rule = f"be {options.blank_id} as in the acoustic model"
    check(blank_id == options.blank_id, "blank_id", rule, blank_id)
