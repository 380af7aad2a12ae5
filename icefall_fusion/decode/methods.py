"""The table of decoding methods: a name such as ``nlm-shallow+llm-delayed-shortest`` and what it does.
Knows: searches, fusions, rescoring, weights. Must not know: manifests, files, word error rates.

A name joins parts by "+". A part is a fusion that takes part in the search, or a second pass over the N-best.
Names k2-* begin with a way to read lattices instead of the prefix search.
"""
from __future__ import annotations

import logging
import math
import re
import time
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Container, Mapping, MutableMapping, Optional, Sequence, Union

import torch

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check, check_choice, nearest
from icefall_fusion.common.counters import add_counters
from icefall_fusion.decode.language_models import Lms
from icefall_fusion.fusion import (
    AtEnd,
    DelayedFusion,
    EveryFrame,
    FixedInterval,
    NgramFusion,
    ShallowFusion,
    ShortestHypothesis,
)
from icefall_fusion.fusion.rescoring import (
    rescore_with_attention,
    rescore_with_lm,
    rescore_with_ngram,
)
from icefall_fusion.lattice.readings import K2_METHODS, needs_of, read_lattices, split_name
from icefall_fusion.lattice.source import K2Options, LatticeSource
from icefall_fusion.nbest import NBest
from icefall_fusion.search import (
    PrefixSearchOptions,
    ctc_greedy_search,
    ctc_prefix_search,
)
from icefall_fusion.search.engines.native import prepare_ngram

#: The methods of the comparison, in the order of the table.
METHODS = (
    "ctc-greedy",
    "ctc-prefix",
    "attention-rescoring",
    "nlm-shallow",
    "llm-shallow",
    "llm-nbest-rescoring",
    "llm-delayed-shortest",
    "llm-delayed-interval-16",
    "llm-delayed-interval-32",
    "llm-delayed-interval-64",
    "nlm-shallow+llm-delayed-shortest",
    "nlm-shallow+llm-delayed-interval-16",
    "ngram-shallow",
    "llm-delayed-shortest-ahead",
    "llm-delayed-interval-16-ahead",
    "llm-delayed-interval-64-ahead",
    "ngram-shallow+llm-delayed-shortest",
)
#: Used for a method that the weights file does not name.
DEFAULT_WEIGHTS = {
    "attention": 1.0, "nlm": 0.3, "ngram": 0.3, "llm": 0.4, "matched_llm": 0.4, "hlg": 0.5, "words": 0.5,
}  # fmt: skip
_TABLES = {"all": METHODS, "k2-all": K2_METHODS}
_GRAPHS = {
    "graph": "k2.graph must name a decoding graph of the job make-graph, or k2.saved lattices,",
    "word_ngram": "k2.ngram must name a graph G of the job make-graph (or k2.saved lattices made with one)",
}
NO_DECODER = (
    "{} must have an acoustic model with an attention decoder (EmissionOptions.model), but this one has none"
)


# --- names --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part of a method's name: what it is, the source of its score, when and how delayed fusion acts.

    ``kind``: shallow, delayed, rescoring, lattice (``reading`` says how) or given (a score that paths of
    lattices come with).
    """

    kind: str
    source: str
    trigger: Any = None
    look_ahead: bool = False
    late: int = 0
    reading: str = ""

    @property
    def in_search(self) -> bool:
        """Whether it is a fusion that takes part in the search."""
        return self.kind in ("shallow", "delayed")


_PARTS: dict[str, Part] = {
    "ngram-shallow": Part("shallow", "ngram"),
    "nlm-shallow": Part("shallow", "nlm"),
    "llm-shallow": Part("shallow", "matched_llm"),
    "attention-rescoring": Part("rescoring", "attention"),
    "ngram-nbest-rescoring": Part("rescoring", "ngram"),
    "nlm-nbest-rescoring": Part("rescoring", "nlm"),
    "llm-nbest-rescoring": Part("rescoring", "llm"),
    "matched-nbest-rescoring": Part("rescoring", "matched_llm"),
    # every=4: the utterances of a batch fuse in the same frames, in a quarter of the calls
    "llm-delayed-shortest": Part("delayed", "llm", ShortestHypothesis(every=4)),
    "llm-delayed-every-frame": Part("delayed", "llm", EveryFrame()),
    "llm-delayed-at-end": Part("delayed", "llm", AtEnd()),
}
_AHEAD = "-ahead"  # at the end of a part of delayed fusion: with look-ahead by the n-gram
_LATE = re.compile(r"(llm-delayed-.+)-late-(\d+)")  # before that: asynchronous, at most so many frames late
_INTERVAL = re.compile(r"llm-delayed-interval-(\d+)")


def parse_method(name: str) -> tuple[Part, ...]:
    """Return the parts of a method's name; ``ctc-greedy`` and ``ctc-prefix`` have none.

    Raises:
        ValueError: a part is unknown (the message gives the nearest), or a source comes twice.
    """
    if name in ("ctc-greedy", "ctc-prefix"):
        return ()
    parts, texts = [], name.removeprefix("ctc-prefix+").split("+")
    of_lattices = split_name(name)
    if of_lattices is not None:
        reading, source, texts = of_lattices
        parts.append(Part("lattice", source, reading=reading))
        if reading == "nbest-ngram":
            parts.append(Part("given", "ngram"))
    for text in texts:
        plain = text.removesuffix(_AHEAD) if text.startswith("llm-delayed-") else text
        ahead, late = plain != text, _LATE.fullmatch(plain)
        plain = late.group(1) if late else plain
        interval = _INTERVAL.fullmatch(plain)
        if interval:
            part = Part("delayed", "llm", FixedInterval(int(interval.group(1))))
        elif plain in _PARTS:
            part = _PARTS[plain]
        else:
            known = [*METHODS, *_PARTS, *K2_METHODS, "llm-delayed-interval-N", "llm-delayed-...-late-N"]
            raise ValueError(f"method must be built of known parts, but {text!r} of {name!r} is none"
                             f"{nearest(text, known)} (known: {known})")  # fmt: skip
        parts.append(replace(part, look_ahead=ahead, late=int(late.group(2)) if late else 0))
    sources = [part.source for part in parts]
    check(len(set(sources)) == len(sources), f"method {name!r}", "use each source of scores once", sources)
    shallow = [part.source for part in parts if part.kind == "shallow"]
    rule = "have no shallow fusion: hypotheses on a lattice are not extended by pieces"
    check(of_lattices is None or not shallow, f"method {name!r}", rule, shallow)
    return tuple(parts)


def needs(name: str) -> set[str]:
    """Return the models that a method needs: sources of scores, ``ngram`` for look-ahead, and for lattices
    ``graph`` and ``word_ngram``.
    """
    parts = parse_method(name)
    models = {part.source for part in parts if part.kind not in ("lattice", "given")}
    models |= {"ngram"} if any(part.look_ahead for part in parts) else set()
    return models.union(*(needs_of(part.reading) for part in parts if part.reading))


def choose_methods(names: Union[str, Sequence[str]], available: Container[str]) -> list[str]:
    """Return the methods as `parse_methods` does; of ``all`` those that the available models allow.

    Args:
        names: as for `parse_methods`. What ``all`` would have been too is told by a warning.
        available: sources, see `needs`.

    Raises:
        ValueError: a method that is named lacks a model.
    """
    named = set(_split_names(names))
    chosen, left_out = [], {}
    for name in parse_methods(names):
        lacking = sorted(source for source in needs(name) if source not in available)
        if lacking and name in named:
            if lacking[0] == "attention":
                raise ValueError(NO_DECODER.format(name))
            if lacking[0] in _GRAPHS:
                raise ValueError(f"{_GRAPHS[lacking[0]]} for the method {name!r}")
            raise ValueError(f"{lacking[0]}.path must name a model for the method {name!r}, but is ''")
        if lacking:
            left_out[name] = lacking
        else:
            chosen.append(name)
    for name, lacking in left_out.items():
        logging.warning("%s is left out of the comparison: there is no %s", name, ", ".join(lacking))
    return chosen


def parse_methods(names: Union[str, Sequence[str]]) -> list[str]:
    """Return the methods of a list or a comma-separated text.

    ``all`` is the whole comparison, ``k2-all`` that of lattices.
    """
    chosen = [name for given in _split_names(names) for name in _TABLES.get(given, (given,))]
    check(len(chosen) > 0, "methods", "name at least one method", names)
    for name in chosen:
        parse_method(name)
    return list(dict.fromkeys(chosen))


def _split_names(names: Union[str, Sequence[str]]) -> list[str]:
    names = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in names if name.strip()]


def is_named(name: str, given: Container[str]) -> bool:
    """Return whether there are weights for a method (see `weights_of`)."""
    return name in given or _not_late(name) in given


def _not_late(name: str) -> str:
    return re.sub(r"-late-\d+", "", name)


def weights_of(name: str, given: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the weight of every source of a method, and of ``words`` (its word bonus).

    Args:
        name: the method.
        given: weights by method, as in the YAML file that ``tune`` writes. A method ``...-late-N`` that is
            not named there has those of the same method without it.

    Raises:
        ValueError: a weight is negative, not a number, or of a source that the method has not.
    """
    sources = [part.source for part in parse_method(name)]
    if not sources:
        return {"ctc": 1.0}
    wanted = [*sources, "words"]
    weights = dict(given.get(name, given.get(_not_late(name), {})))
    weights.pop("ctc", None)
    for source, weight in weights.items():
        check_choice(source, wanted, f"weights of {name}: the source")
        number = isinstance(weight, (int, float)) and math.isfinite(weight)
        check(number, f"weights.{name}.{source}", "be a number", weight)
        check(weight >= 0 or source == "words", f"weights.{name}.{source}", "be at least 0", weight)
    return {"ctc": 1.0, **{source: float(weights.get(source, DEFAULT_WEIGHTS[source])) for source in wanted}}


# --- decoding -----------------------------------------------------------------------------------------


@dataclass
class Work:
    """What a method did to a batch: seconds and counters.

    Args:
        search_seconds: wall time of the search without ``lm_seconds``.
        lm_seconds: wall time inside language models, and of second passes.
        counters: of the token trees, by name; peaks are maxima, the rest sums.
    """

    search_seconds: float = 0.0
    lm_seconds: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)


class Method:
    """A decoding method, ready to run.

    Args:
        name: see :func:`parse_method`.
        weights: per source, see :func:`weights_of`.
        search: options of the prefix search.
        lms: the language models.
        lattices: for methods k2-*.
        k2: options of the beam search along lattices.
    """

    def __init__(
        self, name: str, weights: Mapping[str, float], search: PrefixSearchOptions, lms: Lms,
        lattices: Optional[LatticeSource] = None,
        k2: K2Options = K2Options(),  # noqa: B008 (a frozen value)
    ) -> None:  # fmt: skip
        self.name, self.weights, self.search, self._lms = name, dict(weights), search, lms
        self._lattices, self._k2 = lattices, k2
        self.parts, self.needs = parse_method(name), needs(name)
        self._fused = [part for part in self.parts if part.in_search]
        self._fusions = [self._make_fusion(part) for part in self._fused]
        by_ngram = any(part.look_ahead or part.source == "ngram" for part in self._fused)
        neural = any(part.kind == "shallow" and part.source != "ngram" for part in self._fused)
        if by_ngram and not neural:  # now, so that its memory is part of what is there before the first batch
            prepare_ngram(lms.ngram())

    def _make_fusion(self, part: Part) -> Any:
        weight = self.weights[part.source]
        fused = sum(self.weights[p.source] for p in self._fused)
        share = weight / fused if fused else 1.0 / len(self._fused)
        bonus = self.weights["words"] * share  # it makes up for what the LM takes a word
        if part.source == "ngram":
            return NgramFusion(self._lms.ngram(), weight, bonus)
        lm, options = self._lms.get(part.source), self._lms.options[part.source]
        if part.kind == "shallow":
            rule = "be left alone: shallow fusion reads acoustic pieces as they come"
            check(options.text == "as-is", f"{part.source}.text", rule, options.text)
            check(options.prompt is None, f"{part.source}.prompt", rule, options.prompt)
            check(not options.context, f"{part.source}.context", rule, options.context)
            check(not options.carry, f"{part.source}.carry", rule, options.carry)
            return ShallowFusion(lm, weight, bonus, eos=options.eos, source=part.source)
        prompt = self._lms.prompt(part.source)
        ahead = self._lms.look_ahead() if part.look_ahead else None
        return DelayedFusion(
            lm, weight, bonus, part.trigger, options.text, prompt, options.eos, look_ahead=ahead,
            late=part.late,
        )  # fmt: skip

    def describe(self) -> list[dict[str, Any]]:
        """Return what each part received: kind, source, weight, and of a fusion its bonus and trigger."""
        fusions = iter(self._fusions)
        described = []
        for part in self.parts:
            values = {"kind": part.kind, "source": part.source, "weight": self.weights[part.source]}
            if part.in_search:
                values["word_bonus"] = next(fusions).word_bonus
            if part.trigger is not None:
                values["trigger"] = repr(part.trigger)
            if part.look_ahead:
                values["look_ahead"] = True
            if part.late:
                values["late"] = part.late
            described.append(values)
        return described

    def decode(
        self, emissions: Emissions, model: Any = None,
        references: Optional[Mapping[str, Optional[str]]] = None,
    ) -> tuple[list[NBest], Work]:  # fmt: skip
        """Decode a batch.

        Args:
            emissions: log-probs, and encoder frames where an attention decoder is to rescore.
            model: the acoustic model, for its attention decoder.
            references: text by utterance, for an oracle.

        Returns:
            one N-best list an utterance, and what it cost.
        """
        work = Work()
        with _Stopwatch(emissions.log_probs.device) as clock:
            nbests, elsewhere = self._first_pass(emissions, work.counters, references)
        for fusion in self._fusions:
            add_counters(work.counters, fusion.stats())
        work.lm_seconds = work.counters.pop("lm_seconds", 0.0)
        work.search_seconds = clock.seconds - work.lm_seconds + elsewhere
        passes = [part for part in self.parts if part.kind == "rescoring"]
        if passes:
            with _Stopwatch(emissions.log_probs.device) as clock:
                for part in passes:
                    nbests = self._second_pass(part, nbests, emissions, model, work.counters)
                nbests = [nbest.reweight(self.weights) for nbest in nbests]
            work.counters.pop("lm_seconds", None)
            work.lm_seconds += clock.seconds
        return nbests, work

    def _first_pass(
        self, emissions: Emissions, counters: MutableMapping[str, float],
        references: Optional[Mapping[str, Optional[str]]],
    ) -> tuple[list[NBest], float]:  # fmt: skip
        """Return one list an utterance, and seconds that were spent elsewhere (on lattices from files)."""
        if self.parts and self.parts[0].kind == "lattice":
            return self._read_lattices(emissions, counters, references)
        arguments = (emissions.log_probs, emissions.lens)
        if self.name == "ctc-greedy":
            return ctc_greedy_search(*arguments, emissions.tokens, emissions.ids, emissions.frame_shift), 0.0
        search = replace(self.search, frame_shift=emissions.frame_shift)
        return ctc_prefix_search(*arguments, search, emissions.tokens, self._fusions, emissions.ids), 0.0

    def _read_lattices(
        self, emissions: Emissions, counters: MutableMapping[str, float],
        references: Optional[Mapping[str, Optional[str]]],
    ) -> tuple[list[NBest], float]:  # fmt: skip
        lattices = self._lattices
        check(lattices is not None, f"method {self.name!r}", "have lattices (k2.graph or k2.saved)", None)
        before, reading = dict(lattices.counters), self.parts[0].reading
        found = read_lattices(
            reading, lattices, self._k2, emissions, self.weights, self._fusions, references
        )
        more = {name: value - before.get(name, 0) for name, value in lattices.counters.items()}
        add_counters(counters, more)
        return found

    def _second_pass(
        self, part: Part, nbests: list[NBest], emissions: Emissions, model: Any, counters: dict[str, float]
    ) -> list[NBest]:
        if part.source == "attention":
            if model is None or emissions.encoder_out is None:
                raise ValueError(NO_DECODER.format(self.name))
            return rescore_with_attention(nbests, model, emissions.encoder_out, emissions.lens)
        if part.source == "ngram":
            return rescore_with_ngram(nbests, self._lms.ngram())
        lm, options = self._lms.get(part.source), self._lms.options[part.source]
        prompt = self._lms.prompt(part.source)
        return rescore_with_lm(nbests, lm, part.source, options.text, prompt, options.eos, counters=counters)


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
