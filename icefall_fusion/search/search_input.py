"""Options and input of a search, checked once.
Knows: names, ranges, shapes, legal log-probs. Must not know: how it is searched, language models.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check, check_choice, is_count, is_number
from icefall_fusion.search.engines import ENGINES
from icefall_fusion.text.tokens import AcousticTokens

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ABOVE_ZERO = 1e-2  # nats by which rounding may lift a log-prob above 0, in float32 and better
_ROUNDINGS = 32  # the same in units of the type's own precision: 0.03 in float16, 0.25 in bfloat16


@dataclass(frozen=True)
class PrefixSearchOptions:
    """Options of the prefix beam search. With the defaults nothing but the beam prunes.

    Args:
        beam: prefixes kept per utterance (K).
        top_pieces: number of best pieces of a frame that may extend a prefix; none: all (exact, no slower).
        score_beam: prefixes that score this many nats less than the best are dropped; none: no limit.
        blank_skip: frames whose blank probability exceeds this count as pure blank; between 0.5 and 1; none:
            no frame is skipped. A piece may repeat after a skipped frame. 0.999 is harmless and faster.
        recover_mass: give a prefix that was pruned and is born again the mass of its earlier alignments.
            Scores are closer to the true probability; the search is slower.
        nbest: hypotheses returned; none: all of the beam.
        frame_shift: seconds per frame, for word times.
        word_times: whether hypotheses carry word times.
        engine: native (C++, for a CPU), triton (a kernel, for a GPU), torch (tensors, for every device and
            fusion), or auto: native or triton where it serves, else torch. The results are the same. The
            table `ENGINES` in engines/__init__.py tells which searches an engine serves.
        groups: groups of utterances that are searched in turns, so that a GPU scores for one while the host
            works for another; none: 2 where that is so, else 1 (see turns.py). The results are the same.
        symbols: of transducers: pieces that a frame may emit (see transducer.py).
    """

    beam: int = 10
    top_pieces: Optional[int] = None
    score_beam: Optional[float] = None
    blank_skip: Optional[float] = None
    recover_mass: bool = False
    nbest: Optional[int] = None
    frame_shift: float = 0.04
    word_times: bool = True
    engine: str = "auto"
    groups: Optional[int] = None
    symbols: int = 1

    def __post_init__(self) -> None:
        name, least, skip = "PrefixSearchOptions.", self.score_beam, self.blank_skip
        for field, value in (("beam", self.beam), ("symbols", self.symbols)):
            check(is_count(value), name + field, "be an integer, at least 1", value)
        counts = {"top_pieces": self.top_pieces, "nbest": self.nbest, "groups": self.groups}
        for field, value in counts.items():
            check(value is None or is_count(value), name + field, "be none or an integer, at least 1", value)
        good = least is None or (isinstance(least, float) and least == math.inf)
        good = good or (is_number(least) and least > 0)
        check(good, name + "score_beam", "be none or above 0", least)
        good = skip is None or (is_number(skip) and 0.5 <= skip <= 1)
        check(good, name + "blank_skip", "be none or between 0.5 and 1", skip)
        check_frame_shift(self.frame_shift, name + "frame_shift")
        for field, value in (("recover_mass", self.recover_mass), ("word_times", self.word_times)):
            check(isinstance(value, bool), name + field, "be True or False", value)
        check_choice(self.engine, ("auto", *ENGINES), name + "engine")

    def most_columns(self, pieces: int) -> int:
        """Return how many of V = ``pieces`` may extend a prefix in a frame, blank left out."""
        return pieces - 1 if self.top_pieces is None else min(self.top_pieces, pieces - 1)


def check_frame_shift(value: Any, name: str) -> None:
    """Raise ValueError unless a value is a length of time in seconds."""
    check(is_number(value) and value > 0, name, "be above 0 seconds", value)


class SearchInput(NamedTuple):
    """Checked log-probs of a batch.

    log_probs: [B, T, V] float32, T the longest length; padding is free of NaN and +inf.
    best: [B, T] largest log-prob of each frame, 0 in padding; live: [B, T] bool, False in padding.
    lens: [B] int64; ids: B names; blank: id of blank.
    """

    log_probs: Tensor
    best: Tensor
    live: Tensor
    lens: Tensor
    ids: list[str]
    blank: int


def check_input(log_probs: Tensor, lens: Tensor, blank_id: Optional[int], tokens: Optional[AcousticTokens],
                ids: Optional[Sequence[str]]) -> SearchInput:
    """Check the arguments of a search and bring them into one form.

    Raises:
        ValueError: see ctc_prefix_search.
    """
    check_tensor(log_probs, "log_probs", "floating point log-probs [B, T, V]", FLOATS)
    check(log_probs.dim() == 3, "log_probs", "have 3 dimensions [B, T, V]", tuple(log_probs.shape))
    batch, frames, pieces = log_probs.shape
    check(pieces >= 2, "log_probs", "have a blank and at least one more piece (V >= 2)", pieces)
    blank = _check_blank(blank_id, tokens, pieces)
    names, lengths = check_utterances(lens, ids, batch, frames)
    longest = max(lengths, default=0)
    lens = lens.to(device=log_probs.device, dtype=torch.int64)
    allowed = max(_ABOVE_ZERO, _ROUNDINGS * torch.finfo(log_probs.dtype).eps)
    log_probs = log_probs[:, :longest].float()
    live = torch.arange(log_probs.shape[1], device=lens.device) < lens.unsqueeze(1)
    if not log_probs.numel():
        return SearchInput(log_probs, live.float(), live, lens, names, blank)
    best = log_probs.amax(-1)  # NaN passes through a maximum
    _refuse_bad_frames(best, live, names, allowed)
    if min(lengths) < longest and bool((~live & ~(best < torch.inf)).any()):
        log_probs = log_probs.masked_fill(~live.unsqueeze(-1), 0.0)
    return SearchInput(log_probs, best.masked_fill(~live, 0.0), live, lens, names, blank)


def check_utterances(lens: Tensor, ids: Optional[Sequence[str]], batch: int,
                     frames: int) -> tuple[list[str], list[int]]:
    """Return the names and lengths of the utterances of a batch; else raise ValueError."""
    check_tensor(lens, "lens", "integers [B]", _INTEGERS)
    check(lens.shape == (batch,), "lens", f"have shape [{batch}]", tuple(lens.shape))
    good = ids is None or (isinstance(ids, Sequence) and not isinstance(ids, (str, bytes)))
    check(good, "ids", "be a sequence of names of utterances", ids)
    names = [str(i) for i in (range(batch) if ids is None else ids)]
    check(len(names) == batch, "ids", f"name {batch} utterances", len(names))
    lengths = lens.tolist()
    for name, length in zip(names, lengths):
        check(0 <= length <= frames, f"lens of utterance {name}", f"be in 0..{frames}", length)
    return names, lengths


def check_tensor(value: Any, name: str, what: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raise ValueError unless a value is a plain tensor that holds numbers of one of these types."""
    check(isinstance(value, Tensor), name, f"be a tensor of {what}", type(value).__name__)
    check(value.dtype in dtypes, name, f"be a tensor of {what}", value.dtype)
    kind = "nested" if value.is_nested else "without data" if value.is_meta else str(value.layout)
    check(kind == str(torch.strided), name, "be a dense tensor", kind)


def _check_blank(blank_id: Optional[int], tokens: Optional[AcousticTokens], pieces: int) -> int:
    """Return the id of blank: that asked for, that of the vocabulary, or 0."""
    if tokens is not None:
        check(isinstance(tokens, AcousticTokens), "tokens", "be AcousticTokens", type(tokens).__name__)
        check(tokens.size == pieces, "tokens.size", f"equal the {pieces} pieces of log_probs", tokens.size)
    blank = blank_id if blank_id is not None else tokens.blank_id if tokens is not None else 0
    good = is_count(blank, 0) and blank < pieces
    check(good, "blank_id", f"be in 0..{pieces - 1}", blank)
    if tokens is not None:
        rule = f"be the blank of tokens ({tokens.blank_id})"
        check(tokens.blank_id == blank, "blank_id", rule, blank)
    return int(blank)


def _refuse_bad_frames(best: Tensor, live: Tensor, names: Sequence[str], allowed: float) -> None:
    """Raise ValueError, with utterance, value and frame, unless -inf < best <= allowed in all live frames."""
    bad = live & ~((best > -torch.inf) & (best <= allowed))  # NaN fails both
    if not bool(bad.any()):
        return
    utterance, frame = bad.nonzero()[0].tolist()
    value = float(best[utterance, frame])
    what = "not hold NaN or +inf"
    if value == -torch.inf:
        what = "have a possible piece in every frame"
    elif allowed < value < torch.inf:
        what = "be normalized, none above 0 (apply log_softmax to logits)"
    check(False, f"log_probs of utterance {names[utterance]}", what, f"{value} in frame {frame}")
