"""torchaudio's calls, answered by our search: `ctc_decoder`, `cuda_ctc_decoder` and the decoders they return.
Knows: torchaudio's names and defaults. Must not know: how a search works, files of a run.

What differs by intent (README.md beside this file has figures): scores are exact sums over all alignments,
where torchaudio keeps the best one (or, with ``log_add``, sums in two slots for a prefix); ``log_add`` has no
effect. A word n-gram scores words when all hypotheses have closed one more. ``sil_score`` counts once a word.
"""
from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from icefall_fusion.common.checks import check, is_count, is_number
from icefall_fusion.compat.alignment import first_frames
from icefall_fusion.compat.lexicon import LexiconTokens, read_lexicon
from icefall_fusion.fusion import (
    DelayedFusion,
    HotWordFusion,
    NgramFusion,
    ShortestHypothesis,
    WordNgramFusion,
)
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.ngram.arpa import LN10
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.ngram.vocabulary import FORBIDDEN
from icefall_fusion.ngram.word_ngram import WordNgram
from icefall_fusion.search import Fusion, PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.tokens import WORD_START, AcousticTokens

_NO_WORD_START = "\x00"
_DEFAULT_BLANK_SKIP = 0.95


class CTCHypothesis(NamedTuple):
    """A hypothesis: tokens [L] int64, words (with a lexicon), its score, frames of the tokens [L] int32.

    As torchaudio has them: tokens begin and end with the silence, frames count from 1, and the silences at
    the ends have the frames 0 and T + 1.
    """

    tokens: Tensor
    words: list[str]
    score: float
    timesteps: Tensor


class CUCTCHypothesis(NamedTuple):
    """A hypothesis of `cuda_ctc_decoder`: token ids, their texts, its natural-log probability."""

    tokens: list[int]
    words: list[str]
    score: float


class CTCDecoder:
    """A decoder of emissions; see `ctc_decoder`."""

    def __init__(self, tokens: AcousticTokens, options: PrefixSearchOptions, nbest: int,
                 fusions: Sequence[Fusion], silence: Optional[int]) -> None:
        self._tokens, self._options, self.nbest = tokens, options, nbest
        self._fusions, self._silence, self._stream = list(fusions), silence, None
        self.blank = tokens.blank_id

    def __call__(self, emissions: Tensor, lengths: Optional[Tensor] = None) -> list[list[CTCHypothesis]]:
        """Return the N-best list of each utterance.

        Args:
            emissions: [B, T, V] float: log-probs, or logits (a constant a frame changes no order).
            lengths: [B] frames of each utterance; None: all.

        Raises:
            ValueError: shapes or lengths do not fit, or values are no numbers.
        """
        log_probs, extra = _normalized(emissions, 3, self._tokens.size)
        batch, frames, _ = emissions.shape
        lens = torch.full((batch,), frames) if lengths is None else torch.as_tensor(lengths).cpu()
        found = ctc_prefix_search(log_probs, lens, self._options, self._tokens, self._fusions)
        live = torch.arange(frames) < lens.unsqueeze(1)
        return self._lists(found, log_probs, lens.tolist(), (extra * live).sum(1).tolist())

    def decode_begin(self) -> None:
        """Start a stream; the last one is forgotten."""
        from icefall_fusion.search.streaming import StreamingSearch

        self._stream = StreamingSearch(self._tokens, self._options, self._fusions, "stream")
        self._heard: list[Tensor] = []
        self._extra = 0.0

    def decode_step(self, emissions: Tensor) -> None:
        """Search the next frames [T, V] of the stream.

        Raises:
            ValueError: there is no stream (`decode_begin`), or emissions do not fit.
        """
        check(self._stream is not None, "decode_step", "be called after decode_begin", None)
        log_probs, extra = _normalized(emissions, 2, self._tokens.size)
        if len(emissions):
            self._heard.append(log_probs)
            self._extra += float(extra.sum())
            self._stream.feed(log_probs)
            for _ in self._stream.advance():
                pass

    def decode_end(self) -> None:
        """End the stream: score the last words."""
        check(self._stream is not None, "decode_end", "be called after decode_begin", None)
        for _ in self._stream.finish():
            pass

    def get_final_hypothesis(self) -> list[CTCHypothesis]:
        """Return the N-best list of the stream, after `decode_end`."""
        check(self._stream is not None, "get_final_hypothesis", "be called after decode_end", None)
        heard = torch.cat([torch.zeros(0, self._tokens.size), *self._heard])
        return self._lists([self._stream.nbest()], heard.unsqueeze(0), [len(heard)], [self._extra])[0]

    def idxs_to_tokens(self, idxs: Tensor) -> list[str]:
        """Return the text of token ids."""
        return [self._tokens.pieces[int(index)] for index in idxs]

    def _lists(self, found: Sequence[NBest], log_probs: Tensor, lens: Sequence[int],
               extra: Sequence[float]) -> list[list[CTCHypothesis]]:
        """Return hypotheses in torchaudio's form; those with forbidden words are none."""
        lists = [[h for h in nbest if h.total > FORBIDDEN / 2][: self.nbest] for nbest in found]
        owners = [number for number, some in enumerate(lists) for _ in some]
        ids = [h.tokens for some in lists for h in some]
        frames = iter(first_frames(log_probs, lens, owners, ids, self.blank))
        return [
            [self._hypothesis(h, next(frames), length, h.total + more) for h in some]
            for some, length, more in zip(lists, lens, extra)
        ]

    def _hypothesis(self, found: Hypothesis, frames: list[int], length: int, score: float) -> CTCHypothesis:
        ids, at = list(found.tokens), [1 + frame for frame in frames]
        if self._silence is not None:
            if ids[:1] != [self._silence] or at[0] > 1:
                ids, at = [self._silence, *ids], [0, *at]
            if ids[-1] != self._silence or len(ids) == 1:
                ids, at = [*ids, self._silence], [*at, length + 1]
        words = found.words() if isinstance(self._tokens, LexiconTokens) else []
        return CTCHypothesis(torch.tensor(ids, dtype=torch.int64), words, score,
                             torch.tensor(at, dtype=torch.int32))


def _normalized(emissions: Any, dims: int, pieces: int) -> tuple[Tensor, Tensor]:
    """Return log-probs of emissions on the CPU, and what was taken out of each frame."""
    good = isinstance(emissions, Tensor) and emissions.is_floating_point()
    check(good, "emissions", "be a tensor of floating point numbers", type(emissions).__name__)
    check(emissions.dim() == dims, "emissions", f"have {dims} dimensions", tuple(emissions.shape))
    check(emissions.shape[-1] == pieces, "emissions", f"have {pieces} tokens", emissions.shape[-1])
    values = emissions.detach().cpu().float()
    extra = values.logsumexp(-1)
    bad = ~torch.isfinite(extra)
    check(not bool(bad.any()), "emissions", "be numbers, and finite somewhere in every frame", "not so")
    return values - extra.unsqueeze(-1), extra.double()


def ctc_decoder(
    lexicon: Union[None, str, os.PathLike],
    tokens: Union[str, os.PathLike, Sequence[str]],
    lm: Any = None,
    lm_dict: Optional[str] = None,
    nbest: int = 1,
    beam_size: int = 50,
    beam_size_token: Optional[int] = None,
    beam_threshold: float = 50,
    lm_weight: float = 2,
    word_score: float = 0,
    unk_score: float = float("-inf"),
    sil_score: float = 0,
    log_add: bool = False,
    blank_token: str = "-",
    sil_token: str = "|",
    unk_word: str = "<unk>",
) -> CTCDecoder:
    """Return a decoder.

    Args:
        lexicon: file of words and their spellings, to which the search is held; None: any tokens.
        tokens: list, or file with a token a line; names on one line are the same token, the first counts.
        lm: KenLM binary or ARPA file over words (with a lexicon), ARPA file over tokens (without), a
            `CausalLm` (delayed fusion, beyond torchaudio), or None.
        lm_dict: has no effect: an n-gram knows its words.
        nbest: hypotheses returned.
        beam_size, beam_size_token, beam_threshold: prefixes kept; tokens tried a frame; nats below the best.
        lm_weight: of the LM's score: log10 for n-grams, as torchaudio has it, natural log for a `CausalLm`.
        word_score, sil_score: added for each word (with a lexicon; without one ``sil_score`` alone).
        unk_score: natural log of a word that is not in the lexicon, at most 0; -inf: there is none.
        log_add: has no effect: sums are exact.
        blank_token, sil_token: their names; without such a silence, tokens with "▁" begin words.
        unk_word: has no effect: words outside the lexicon are written as their tokens.

    Raises:
        FileNotFoundError, ModuleNotFoundError: a file, or kenlm for a binary, is missing.
        TypeError: an LM of another kind, such as torchaudio's CTCDecoderLM.
        ValueError: a bad file or argument, e.g. a lexicon word without spelling.
    """
    for name, value in (("nbest", nbest), ("beam_size", beam_size)):
        check(is_count(value), name, "be an integer, at least 1", value)
    for name, value in (("lm_weight", lm_weight), ("word_score", word_score), ("sil_score", sil_score)):
        check(is_number(value), name, "be finite", value)
    check(lm_dict is None or isinstance(lm_dict, str), "lm_dict", "be None or a file", lm_dict)
    pieces = _read_tokens(tokens)
    check(blank_token in pieces, "blank_token", "be one of the tokens", blank_token)
    silence = sil_token if sil_token in pieces else None
    marked = any(piece.startswith(WORD_START) for piece in pieces)
    start = WORD_START if marked and silence is None else _NO_WORD_START
    vocabulary = AcousticTokens.from_pieces(pieces, pieces.index(blank_token), start, silence)
    if lexicon:
        vocabulary = LexiconTokens(vocabulary, read_lexicon(lexicon), silence)
    threshold = None if math.isinf(beam_threshold) else float(beam_threshold)
    options = PrefixSearchOptions(beam=int(beam_size), top_pieces=beam_size_token, score_beam=threshold,
                                  word_times=False)
    bonus = float(sil_score + (word_score if lexicon else 0))
    fusions = _fusions(vocabulary, lm, float(lm_weight), bonus, float(unk_score))
    index = None if silence is None else pieces.index(silence)
    return CTCDecoder(vocabulary, options, int(nbest), fusions, index)


def _fusions(tokens: AcousticTokens, lm: Any, weight: float, bonus: float, unk_score: float) -> list[Fusion]:
    """Return what holds the search to a lexicon, and the language model; the bonus a word goes with one."""
    found: list[Fusion] = []
    words = isinstance(tokens, LexiconTokens)
    if words:
        found.append(HotWordFusion(tokens.automaton(unk_score), source="lexicon", word_bonus=bonus))
    elif bonus:
        found.append(HotWordFusion([], source="silence", word_bonus=bonus))
    if isinstance(lm, (str, os.PathLike)) and not words:
        found.append(NgramFusion(PieceNgram.load(lm, tokens.pieces), weight / LN10))
    elif isinstance(lm, (str, os.PathLike)):
        found.append(WordNgramFusion(WordNgram(lm, units=False), weight / LN10, trigger=ShortestHypothesis()))
    elif hasattr(lm, "open_tree"):
        found.append(DelayedFusion(lm, weight, eos=lm.eos_id is not None))
    elif lm is not None:
        raise TypeError(f"lm must be None, a path or a CausalLm, but is {type(lm).__name__}")
    return found


def _read_tokens(tokens: Union[str, os.PathLike, Sequence[str]]) -> list[str]:
    """Return the tokens of a list or of a file."""
    if isinstance(tokens, (str, os.PathLike)):
        if not Path(tokens).is_file():
            raise FileNotFoundError(f"there is no file of tokens at {tokens}")
        lines = Path(tokens).read_text(encoding="utf-8").splitlines()
        return [line.split()[0] for line in lines if line.strip()]
    good = isinstance(tokens, Sequence) and all(isinstance(token, str) for token in tokens)
    check(good, "tokens", "be a file or a list of texts", tokens)
    return list(tokens)


class CUCTCDecoder:
    """A decoder of log-probs on any device; see `cuda_ctc_decoder`."""

    def __init__(self, vocab_list: Sequence[str], blank_id: int = 0, beam_size: int = 10, nbest: int = 1,
                 blank_skip_threshold: float = _DEFAULT_BLANK_SKIP, cuda_stream: Any = None) -> None:
        check(is_number(blank_skip_threshold) and 0.5 <= blank_skip_threshold <= 1, "blank_skip_threshold",
              "be between 0.5 and 1", blank_skip_threshold)
        skip = None if blank_skip_threshold == 1 else float(blank_skip_threshold)
        self.vocab_list, self.blank_id = list(vocab_list), blank_id
        self._options = PrefixSearchOptions(beam=beam_size, nbest=nbest, blank_skip=skip, word_times=False)

    def __call__(self, log_prob: Tensor, encoder_out_lens: Tensor) -> list[list[CUCTCHypothesis]]:
        """Return the N-best list of each utterance of log-probs [B, T, V] with their frames [B]."""
        found = ctc_prefix_search(log_prob, encoder_out_lens, self._options, blank_id=self.blank_id)
        return [[CUCTCHypothesis(h.tokens, [self.vocab_list[v] for v in h.tokens], h.total) for h in nbest]
                for nbest in found]


def cuda_ctc_decoder(tokens: Union[str, os.PathLike, Sequence[str]], nbest: int = 1, beam_size: int = 10,
                     blank_skip_threshold: float = _DEFAULT_BLANK_SKIP) -> CUCTCDecoder:
    """Return a decoder of log-probs; blank is token 0.

    Args:
        tokens: list, or file with a token a line.
        nbest, beam_size: hypotheses returned, and kept.
        blank_skip_threshold: frames with a blank more probable than this are skipped; 1: none.
    """
    return CUCTCDecoder(_read_tokens(tokens), 0, beam_size, nbest, blank_skip_threshold)
