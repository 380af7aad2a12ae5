"""The options of a recognizer, which all jobs that decode share.
Knows: options of sources, language models, searches, lattices. Must not know: how any of them works.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Union

import torch

from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.decode.language_models import LM_SOURCES, LmOptions, NgramOptions
from icefall_fusion.lattice.source import K2Options
from icefall_fusion.ngram.word_ngram import WordNgramOptions
from icefall_fusion.search import PrefixSearchOptions
from icefall_fusion.text.language import language_of


@dataclass(frozen=True)
class RecognizerOptions:
    """Models, the search, and how much is decoded at once.

    Args:
        emissions: where log-probs come from.
        nlm: LM over the acoustic pieces.
        llm: LM with a vocabulary of its own.
        matched_llm: LLM over the acoustic pieces, for llm-shallow.
        ngram, wordngram: n-grams over the acoustic pieces, and over words.
        lodr: ARPA file of an n-gram over the acoustic pieces that lodr-shallow subtracts.
        hotwords: file of phrases for hotwords-shallow, lines ``phrase`` or ``phrase<TAB>nats``.
        search: the prefix search.
        k2: lattices, for the methods k2-*.
        weights: weight by method and source (words: the bonus a word), or a YAML file that has them.
        batch_size: utterances (or segments of long ones) in a batch; none: 64 on a GPU, where two groups of
            32 are searched in turns (``search.groups``), else 32.
        batch_seconds: padded audio in a batch, in seconds; none: 960 on a GPU, else 480.
        longest: seconds; longer utterances are decoded in segments cut at quiet points.
        language: ISO 639 code of the text, e.g. en, es, zh; empty: that of the acoustic model, else en.
        normalizer: module:function from a text to its spoken words; empty: that of the language.
    """

    emissions: EmissionOptions = field(default_factory=EmissionOptions)
    nlm: LmOptions = field(default_factory=LmOptions)
    llm: LmOptions = field(default_factory=LmOptions)
    matched_llm: LmOptions = field(default_factory=LmOptions)
    ngram: NgramOptions = field(default_factory=NgramOptions)
    wordngram: WordNgramOptions = field(default_factory=WordNgramOptions)
    hotwords: str = ""
    lodr: str = ""
    search: PrefixSearchOptions = field(default_factory=PrefixSearchOptions)
    k2: K2Options = field(default_factory=K2Options)
    weights: Union[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    batch_size: Optional[int] = None
    batch_seconds: Optional[float] = None
    longest: float = 60.0
    language: str = ""
    normalizer: str = ""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.batch_size is not None:
            check_at_least(1, self, "batch_size")
        good = self.batch_seconds is None or self.batch_seconds > 0
        check(good, f"{name}.batch_seconds", "be above 0 s", self.batch_seconds)
        language_of(self.language, self.normalizer)
        check(self.longest >= 1, f"{name}.longest", "be at least 1 s", self.longest)
        shift, default = self.search.frame_shift, PrefixSearchOptions().frame_shift
        check(shift == default, "search.frame_shift", "be left alone: it is the acoustic model's", shift)

    def batch_limits(self, device: str) -> tuple[int, float]:
        """Return utterances and seconds of a batch on a device."""
        size, seconds = (64, 960.0) if torch.device(device).type == "cuda" else (32, 480.0)
        return self.batch_size or size, self.batch_seconds or seconds

    def named_models(self) -> set[str]:
        """Return the sources whose models are named: of `LM_SOURCES`, the n-grams' and ``hotwords``."""
        named = {source for source in (*LM_SOURCES, "ngram", "wordngram") if getattr(self, source).path}
        return named | {source for source in ("hotwords", "lodr") if getattr(self, source)}


def check_nothing_is_normalized(options: RecognizerOptions) -> None:
    """Refuse the normalizer for a job that would not ask it.

    Raises:
        ValueError: there is one.
    """
    rule = "be left out: this job normalizes no text"
    check(not options.normalizer, f"{type(options).__name__}.normalizer", rule, options.normalizer)


def check_no_language(options: RecognizerOptions, where: str) -> None:
    """Refuse the language for a job in which nothing depends on it.

    Args:
        options: of the job.
        where: for the message, e.g. "in a stream".

    Raises:
        ValueError: it is named.
    """
    rule = f"be left out {where}: nothing depends on it there"
    check(not options.language, f"{type(options).__name__}.language", rule, options.language)
