"""A decoding method, ready to run: from log-probs of a batch to N-best lists and their cost.
Knows: searches, fusions, rescoring, lattices, weights. Must not know: manifests, files, word error rates.
"""
from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence

import torch

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.acoustic.transducer import Transducer
from icefall_fusion.common.checks import check
from icefall_fusion.common.counters import add_counters
from icefall_fusion.decode.language_models import LanguageModels, Prompt
from icefall_fusion.decode.method_names import NO_DECODER, NO_LMS, FusionSpec, RescoringSpec, parse_method
from icefall_fusion.fusion import (
    DelayedFusion,
    HotWordFusion,
    InternalLmFusion,
    LodrFusion,
    NgramFusion,
    ShallowFusion,
)
from icefall_fusion.fusion.lodr import subtracted
from icefall_fusion.fusion.rescoring import rescore_with_attention, rescore_with_lm, rescore_with_ngram
from icefall_fusion.lattice.methods import decode_lattices
from icefall_fusion.lattice.source import K2Options, LatticeSource
from icefall_fusion.nbest import NBest
from icefall_fusion.search import Fusion, PrefixSearchOptions, ctc_greedy_search, ctc_prefix_search
from icefall_fusion.search.transducer import check_options, transducer_search
from icefall_fusion.text.language import ENGLISH, Language


class Decoded(NamedTuple):
    """The lists of a batch, and their cost.

    ``cost`` has ``search``, the wall seconds of the search without language models; ``lm``, those of language
    models and second passes; and the counters of the fusions by name (peaks are maxima, all others sums).
    """

    nbests: list[NBest]
    cost: dict[str, float]


class Method:
    """A decoding method.

    Args:
        name: see `parse_method`.
        weights: per source, see `weights_of`.
        search: options of the prefix search.
        models: the language models.
        lattices: for methods k2-*.
        k2: options of the beam search along lattices.
        language: of references.
        transducer: for methods rnnt-*.

    Raises:
        ValueError: a model does not serve the method, or its options do not.
    """

    def __init__(
        self, name: str, weights: Mapping[str, float], search: PrefixSearchOptions, models: LanguageModels,
        lattices: Optional[LatticeSource] = None, k2: Optional[K2Options] = None,
        language: Language = ENGLISH, transducer: Optional[Transducer] = None,
    ) -> None:
        self.name, self.weights, self.search, self._models = name, dict(weights), search, models
        self._lattices, self._k2, self._language, self._transducer = lattices, k2, language, transducer
        self.spec = parse_method(name)
        if self.spec.of_transducer:
            rule = "have an acoustic model with a transducer head"
            check(transducer is not None, f"method {name!r}", rule, None)
            check_options(self._search_options())
        self.make_fusions({})  # an error is raised before anything is decoded

    def make_fusions(self, prompts: Mapping[str, Prompt], emissions: Optional[Emissions] = None
                     ) -> list[Fusion]:
        """Return the fusions for one batch, the outputs of whose encoder are ``emissions``."""
        fusions = [self._make_fusion(spec, prompts.get(spec.source), emissions) for spec in self.spec.fusions]
        if self._guided:
            vocabulary, weight = self._models.vocabulary(), self.weights["wordngram"]
            fusions.append(HotWordFusion(vocabulary, weight, source="oov"))
        return fusions

    @property
    def _guided(self) -> bool:
        """Whether the n-gram's known words guide the search."""
        named = "wordngram" in self.spec.sources and not self.spec.of_lattices
        return named and self._models.vocabulary() is not None

    def _make_fusion(self, spec: FusionSpec, prompt: Prompt, emissions: Optional[Emissions]) -> Fusion:
        weight, bonus = self.weights[spec.source], self._word_bonus(spec)
        if spec.source == "ctc_head":
            from icefall_fusion.fusion.ctc_head import CtcHeadFusion

            outputs = (None, None) if emissions is None else (emissions.log_probs, emissions.lens)
            return CtcHeadFusion(*outputs, weight, bonus)
        if spec.source == "ngram":
            return NgramFusion(self._models.ngram(), weight, bonus)
        if spec.source == "hotwords":
            return HotWordFusion(self._models.hotwords.automaton, weight, word_bonus=bonus)
        if spec.source == "lodr":
            return LodrFusion(self._models.lodr(), weight, bonus)
        if spec.source == "ilm":
            return InternalLmFusion(self._transducer, weight, bonus)
        if spec.source == "wordngram":
            from icefall_fusion.fusion.word_ngram import WordNgramFusion

            ngram, text = self._models.word_ngram(), self._models.word_ngram_options.text
            oov_score = 0.0 if self._guided else None  # the vocabulary charges it
            return WordNgramFusion(ngram, weight, bonus, spec.trigger, text, oov_score=oov_score)
        lm, options = self._models.get(spec.source), self._models.options[spec.source]
        if spec.trigger is None:
            rule = "be left alone: shallow fusion reads acoustic pieces as they come"
            check(options.text == "as-is", f"{spec.source}.text", rule, options.text)
            check(options.prompt is None, f"{spec.source}.prompt", rule, options.prompt)
            check(not options.context, f"{spec.source}.context", rule, options.context)
            check(not options.carry, f"{spec.source}.carry", rule, options.carry)
            return ShallowFusion(lm, weight, bonus, eos=options.eos, source=spec.source)
        ahead = self._models.look_ahead() if spec.look_ahead else None
        return DelayedFusion(
            lm, weight, bonus, spec.trigger, options.text, prompt, options.eos, look_ahead=ahead,
            late=spec.late, boundaries=options.boundaries,
        )

    def _word_bonus(self, spec: FusionSpec) -> float:
        """Return a fusion's share of the bonus a word, which offsets its LM's log-prob of a word."""
        others = [other.source for other in self.spec.fusions]
        others = [source for source in others if source not in NO_LMS] or others
        if spec.source not in others:
            return 0.0
        total = sum(self.weights[source] for source in others)
        share = self.weights[spec.source] / total if total else 1.0 / len(others)
        return self.weights["words"] * share

    def describe(self) -> list[dict[str, Any]]:
        """Return each component: kind, source, weight, and of a fusion its bonus and trigger."""
        described: list[dict[str, Any]] = []
        for source in self.spec.stored:
            described.append({"kind": "lattice", "source": source, "weight": self.weights[source]})
        for spec in self.spec.fusions:
            values = {"kind": "shallow" if spec.trigger is None else "delayed", "source": spec.source}
            values |= {"weight": self.weights[spec.source], "word_bonus": self._word_bonus(spec)}
            if spec.trigger is not None:
                values |= {"trigger": repr(spec.trigger), "look_ahead": spec.look_ahead, "late": spec.late}
            described.append(values)
        for source in (spec.source for spec in self.spec.rescorers):
            described.append({"kind": "rescoring", "source": source, "weight": self.weights[source]})
        return described

    def decode(
        self, emissions: Emissions, model: Any = None,
        references: Optional[Mapping[str, Optional[str]]] = None,
        prompts: Optional[Mapping[str, Prompt]] = None,
    ) -> Decoded:
        """Decode a batch.

        Args:
            emissions: log-probs, and encoder frames where an attention decoder is to rescore.
            model: the acoustic model, for its attention decoder.
            references: text by utterance, for an oracle.
            prompts: earlier text by source (see `LanguageModels.prompts`).
        """
        counters: dict[str, float] = {}
        prompts = prompts or {}
        fusions = self.make_fusions(prompts, emissions)
        with _Stopwatch(emissions.log_probs.device) as clock:
            nbests = self.join(self._first_pass(emissions, fusions, references, counters))
        for fusion in fusions:
            add_counters(counters, fusion.stats())
        lm_seconds = counters.pop("lm_seconds", 0.0)
        search_seconds = clock.seconds - lm_seconds + counters.pop("lattice_seconds", 0.0)
        if self.spec.rescorers:
            with _Stopwatch(emissions.log_probs.device) as clock:
                for rescorer in self.spec.rescorers:
                    nbests = self._second_pass(rescorer, nbests, emissions, model, prompts, counters)
                nbests = [nbest.reweight(self.weights) for nbest in nbests]
            counters.pop("lm_seconds", None)
            lm_seconds += clock.seconds
        return Decoded(nbests, {"search": search_seconds, "lm": lm_seconds, **counters})

    def join(self, nbests: list[NBest]) -> list[NBest]:
        """Return lists in which scores that are parts of one source's are one."""
        if not self._guided:
            return nbests
        from icefall_fusion.fusion.word_ngram import join_oov

        return join_oov(nbests)

    def _first_pass(
        self, emissions: Emissions, fusions: Sequence[Fusion],
        references: Optional[Mapping[str, Optional[str]]], counters: dict[str, float],
    ) -> list[NBest]:
        if self.spec.of_lattices:
            rule = "have lattices (k2.graph or k2.saved)"
            check(self._lattices is not None, f"method {self.name!r}", rule, None)
            return decode_lattices(self.spec.search, self._lattices, self._k2.beam, emissions, self.weights,
                                   fusions, references, counters, self._language)
        arguments = (emissions.log_probs, emissions.lens)
        if self.spec.search == "greedy":
            return ctc_greedy_search(*arguments, emissions.tokens, emissions.ids, emissions.frame_shift)
        search = replace(self._search_options(), frame_shift=emissions.frame_shift)
        if self.spec.of_transducer:
            rule = "have outputs of an encoder for the transducer, which saved log-probs have not"
            check(emissions.joiner_frames is not None, f"method {self.name!r}", rule, None)
            return transducer_search(emissions.joiner_frames, emissions.lens, self._transducer, search,
                                     emissions.tokens, fusions, emissions.ids)
        return ctc_prefix_search(*arguments, search, emissions.tokens, fusions, emissions.ids)

    def _search_options(self) -> PrefixSearchOptions:
        """Return the options of the search; greedy is a beam of one."""
        return replace(self.search, beam=1, nbest=1) if self.spec.search == "rnnt-greedy" else self.search

    def _second_pass(
        self, spec: RescoringSpec, nbests: list[NBest], emissions: Emissions, model: Any,
        prompts: Mapping[str, Prompt], counters: dict[str, float],
    ) -> list[NBest]:
        if spec.source == "attention":
            if model is None or emissions.encoder_out is None:
                raise ValueError(NO_DECODER.format(self.name))
            return rescore_with_attention(nbests, model, emissions.encoder_out, emissions.lens)
        if spec.source == "ngram":
            return rescore_with_ngram(nbests, self._models.ngram())
        if spec.source == "lodr":
            return rescore_with_ngram(nbests, subtracted(self._models.lodr()), "lodr")
        lm, options = self._models.get(spec.source), self._models.options[spec.source]
        prompt = prompts.get(spec.source)
        return rescore_with_lm(nbests, lm, spec.source, options.text, prompt, options.eos, counters=counters)


class _Stopwatch:
    """Wall seconds of a block, the device's queue included."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], None] = (
            torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        )
        self.seconds = 0.0

    def __enter__(self) -> _Stopwatch:
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._start
