"""The language models of a decode: their options, loading on first use, the earlier text of utterances.
Knows: causal language models. Must not know: searches, fusions, files of a run.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Container, Iterable, Mapping, Optional, Sequence

import torch

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.devices import check_device, weight_bytes
from icefall_fusion.common.files import PathLike
from icefall_fusion.common.precision import FAST
from icefall_fusion.decode.hotwords import HotWords
from icefall_fusion.fusion.boundaries import BOUNDARIES
from icefall_fusion.fusion.delayed import Prompt
from icefall_fusion.fusion.ngram import SCALE, LookAhead
from icefall_fusion.lm import QUANTIZATIONS, CausalLm
from icefall_fusion.lm.remembered import RememberingLm
from icefall_fusion.lm.starts import probe_start
from icefall_fusion.ngram.piece_ngram import PieceNgram
from icefall_fusion.ngram.vocabulary import WordAutomaton
from icefall_fusion.ngram.word_ngram import WordNgram, WordNgramOptions
from icefall_fusion.text.scripts import join_words, split_units
from icefall_fusion.text.styles import TEXT_STYLES, adapt
from icefall_fusion.text.tokens import AcousticTokens

#: LM of a score: (source) -> field of the options.
LM_SOURCES = ("nlm", "llm", "matched_llm")
PROBED = 32  # references of dev


@dataclass(frozen=True)
class LmOptions:
    """A language model and how it is used.

    Args:
        path: folder, GGUF file (also package:NAME/FILE), Hugging Face name, or the PEFT folder of an adapter,
            which names its base; empty: there is none.
        adapter: PEFT folder of a LoRA adapter of this model, e.g. of train-lm --base; empty: none.
        dtype: float32, bfloat16, float16, auto (as saved), or fast: bfloat16 where the device is faster with
            it than with float32, else float32.
        device: e.g. cpu or cuda; empty: that of the acoustic model.
        device_map: for models that need more than one device, e.g. auto.
        quantization: 8bit or 4bit (by bitsandbytes), or int8 (weights alone, by torchao).
        text: how the LM sees words: as-is, lower or sentence.
        prompt: earlier text, read but not scored.
        prompt_from_hotwords: build the prompt from the phrases of ``hotwords``, at most context_words words.
        context: a custom field of the cuts, e.g. pre_text: the earlier text of each utterance, as its prompt.
        carry: of audio that is decoded in segments, take the text recognized so far as earlier text; the
            segments of an utterance are then decoded one after the other.
        context_words: number of trailing words of the earlier text to keep.
        eos: score the end of the utterance too.
        bos_token: what starts a text: a token of the LM or the text of one; default: as its tokenizer says.
        eos_token: what ends one.
        boundaries: how much of the closed words delayed fusion shows the LM where words have no spaces
            between them: words (all), tokens (those that cannot change any more) or jieba (its words).
    """

    path: str = ""
    adapter: str = ""
    dtype: str = "float32"
    device: str = ""
    device_map: Optional[str] = None
    quantization: Optional[str] = None
    text: str = "as-is"
    prompt: Optional[str] = None
    prompt_from_hotwords: bool = False
    context: str = ""
    carry: bool = False
    context_words: int = 200
    eos: bool = True
    bos_token: Optional[str] = None
    eos_token: Optional[str] = None
    boundaries: str = "words"

    def __post_init__(self) -> None:
        check_choice(self.dtype, ("float32", "bfloat16", "float16", "auto", FAST), "LmOptions.dtype")
        check_choice(self.text, TEXT_STYLES, "LmOptions.text")
        check_choice(self.quantization, QUANTIZATIONS, "LmOptions.quantization")
        check_choice(self.boundaries, BOUNDARIES, "LmOptions.boundaries")
        both = self.prompt is not None and self.tracks_context
        check(not both, "LmOptions.prompt", "be left out with LmOptions.context or carry", self.prompt)
        good = not self.prompt_from_hotwords or (self.prompt is None and not self.tracks_context)
        check(good, "LmOptions.prompt_from_hotwords", "be left out with prompt, context or carry", True)
        check_at_least(1, self, "context_words")
        rule = "be left out where LmOptions.path names no model, or with LmOptions.quantization"
        check(not self.adapter or bool(self.path) and self.quantization is None, "LmOptions.adapter", rule,
              self.adapter)

    @property
    def tracks_context(self) -> bool:
        """Whether each utterance or segment has an earlier text of its own."""
        return bool(self.context) or self.carry


@dataclass(frozen=True)
class NgramOptions:
    """An n-gram over the acoustic pieces, for ngram-shallow and for the look-ahead of delayed fusion.

    Args:
        path: ARPA file, gzipped or not, e.g. of the job train-ngram; empty: there is none.
        scale: in look-ahead, factor of its log-probs beside the weight of the LLM.
        every: in look-ahead, frames after which new pieces are taken into account.
    """

    path: str = ""
    scale: float = SCALE
    every: int = 1

    def __post_init__(self) -> None:
        check(self.scale > 0, "NgramOptions.scale", "be above 0", self.scale)
        check_at_least(1, self, "every")


class LanguageModels:
    """The language models of a run, each loaded when a method first asks for it.

    Args:
        options: by source: ``nlm``, ``llm``, ``matched_llm``.
        device: for those that name none.
        ngram: the n-gram over the acoustic pieces.
        tokens: the acoustic pieces.
        word_ngram: the n-gram over words.
        hotwords: a file of phrases, see HotWords.
        lodr: the n-gram to be subtracted.
    """

    def __init__(
        self,
        options: Mapping[str, LmOptions],
        device: str = "cpu",
        ngram: NgramOptions = NgramOptions(),
        tokens: Optional[AcousticTokens] = None,
        word_ngram: WordNgramOptions = WordNgramOptions(),  # noqa: B008 (a frozen value)
        hotwords: PathLike = "",
        lodr: PathLike = "",
    ) -> None:
        self.options, self._device, self.hotwords = dict(options), device, HotWords(hotwords, tokens)
        for source, own in self.options.items():
            if own.prompt_from_hotwords:
                prompt = self.hotwords.prompt(own.text, own.context_words)
                self.options[source] = replace(own, prompt=prompt, prompt_from_hotwords=False)
        self._ngram_options, self._tokens = ngram, tokens
        self.word_ngram_options, self._word_ngram = word_ngram, None
        self._vocabulary: Optional[WordAutomaton] = None
        self._ngram: Optional[PieceNgram] = None
        self._lodr_path, self._lodr = lodr, None
        self._loaded: dict[str, CausalLm] = {}

    def remember(self) -> None:
        """Let the LMs keep the scores of all texts: for utterances that are decoded again and again."""
        self._loaded = {source: RememberingLm(lm) for source, lm in self._loaded.items()}

    def get(self, source: str) -> CausalLm:
        """Return the LM of a source.

        Raises:
            ValueError: the options name none.
        """
        if source not in self._loaded:
            options = self.options.get(source, LmOptions())
            check(bool(options.path), f"{source}.path", "name a language model for this method", options.path)
            check_device(options.device or self._device, f"{source}.device")
            self._loaded[source] = CausalLm.from_pretrained(
                options.path, dtype=options.dtype, device=options.device or self._device,
                device_map=options.device_map, quantization=options.quantization,
                adapter=options.adapter or None, bos_token=options.bos_token,
                eos_token=options.eos_token,
            )
        return self._loaded[source]

    def warn_of_starts(self, references: Sequence[str]) -> None:
        """Warn of every loaded LM whose bos is clearly not what best starts the references of dev.

        Args:
            references: of dev, normalized; the first `PROBED` are used.
        """
        for source, lm in self._loaded.items():
            options = self.options[source]
            if options.prompt is None and not options.tracks_context:  # else a text does not start with bos
                better = probe_start(lm, [adapt(text.split(), options.text) for text in references[:PROBED]])
                if better is not None:
                    logging.warning("%s.path %s: texts of dev have %.2f nats a token, but with "
                                    "--%s.bos_token %r they would have %.2f", source, options.path,
                                    better.own, source, better.token, better.better)

    def ngram(self) -> PieceNgram:
        """Return the n-gram over the acoustic pieces.

        Raises:
            ValueError: the options name none, or the acoustic pieces are not known.
        """
        if self._ngram is None:
            self._ngram = self._load_ngram("ngram.path", self._ngram_options.path)
        return self._ngram

    def lodr(self) -> PieceNgram:
        """Return the n-gram over the acoustic pieces that is to be subtracted; errors as of `ngram`."""
        if self._lodr is None:
            self._lodr = self._load_ngram("lodr", self._lodr_path)
        return self._lodr

    def _load_ngram(self, name: str, path: PathLike) -> PieceNgram:
        check(bool(path), name, "name an ARPA file of acoustic pieces for this method", path)
        check(self._tokens is not None, "tokens", "be known to a method with an n-gram", None)
        return PieceNgram.load(path, self._tokens.pieces).to(torch.device(self._device))

    def word_ngram(self) -> WordNgram:
        """Return the n-gram over words.

        Raises:
            ValueError: the options name none.
        """
        if self._word_ngram is None:
            options = self.word_ngram_options
            rule = "name a KenLM binary or ARPA file of words for this method"
            check(bool(options.path), "wordngram.path", rule, options.path)
            self._word_ngram = WordNgram(options.path, oov_score=options.oov_score)
        return self._word_ngram

    def vocabulary(self) -> Optional[WordAutomaton]:
        """Return the words that the n-gram over words knows, where they are to guide a search.

        None: other words cost nothing, KenLM's binary does not tell its words, or they begin in upper case.
        """
        options = self.word_ngram_options
        if self._vocabulary is None and options.oov_score < 0 and options.text != "sentence":
            from icefall_fusion.fusion.word_ngram import word_automaton

            words, lower = self.word_ngram().known_words(), options.text == "lower"
            if words:
                self._vocabulary = word_automaton(words, self._tokens, options.oov_score, lower)
        return self._vocabulary

    def look_ahead(self) -> LookAhead:
        """Return the look-ahead of delayed fusion, by the n-gram."""
        return LookAhead(self.ngram(), self._ngram_options.scale, self._ngram_options.every)

    def carry(self, sources: Container[str]) -> bool:
        """Return whether an LM of ``sources`` reads the text of earlier segments of long audio."""
        return any(options.carry for source, options in self.options.items() if source in sources)

    def prompts(
        self,
        customs: Mapping[str, Optional[Mapping[str, Any]]],
        recognized: Optional[Mapping[str, str]] = None,
    ) -> dict[str, Prompt]:
        """Return the earlier text of each source's LM: one for all, by utterance, or None.

        Args:
            customs: fields of each utterance by its id; None for a segment that is not the first of one.
            recognized: text of the earlier segments of the utterance, by the id of the segment.

        Raises:
            ValueError: an utterance has no text in the field that an LM wants.
        """
        return {
            source: self._contexts(source, customs, recognized or {}) if own.tracks_context else own.prompt
            for source, own in self.options.items()
        }

    def _contexts(
        self, source: str, customs: Mapping[str, Optional[Mapping[str, Any]]], recognized: Mapping[str, str]
    ) -> dict[str, str]:
        options, texts = self.options[source], {}
        for name, custom in customs.items():
            text = ""
            if custom is not None and options.context:
                text = custom.get(options.context)
                rule = f"name a custom field of every cut that has text ({name} has none)"
                check(isinstance(text, str), f"{source}.context", rule, options.context)
            elif custom is None and options.carry:
                text = adapt(recognized.get(name, "").split(), options.text)
            texts[name] = join_words(split_units(text)[-options.context_words :])
        return texts

    def unused_bytes(self, used: Iterable[str]) -> int:
        """Return the bytes of weights and tables that are loaded for other sources than ``used``."""
        used = set(used)
        lms = [lm for source, lm in self._loaded.items() if source not in used]
        unused_ngram = self._ngram is not None and "ngram" not in used
        return sum(weight_bytes(lm.model) for lm in lms) + (self._ngram.table_bytes if unused_ngram else 0)
