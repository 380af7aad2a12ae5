"""The table of decoding methods: names such as ``nlm-shallow+llm-delayed-shortest``, and their specs.
Knows: names, triggers, which models a method needs, usual weights. Must not know: models, searches, files.

A name joins components by "+": fusions of the search, and second passes over the N-best list. Names k2-*
begin with a search of lattices instead of the prefix search, names rnnt-* with the search of a transducer. A
new component is an entry of `_COMPONENTS`.
"""
from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import Container, Optional, Sequence, Union

from icefall_fusion.common.checks import check, nearest
from icefall_fusion.fusion import AtEnd, EveryFrame, FixedInterval, ShortestHypothesis
from icefall_fusion.fusion.triggers import Trigger
from icefall_fusion.lattice.methods import K2_METHODS, needs_of, split_name

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
    "ngram-shallow+lodr-shallow",
    "llm-delayed-shortest-ahead",
    "llm-delayed-interval-16-ahead",
    "llm-delayed-interval-64-ahead",
    "ngram-shallow+llm-delayed-shortest",
    "ngram-shallow+lodr-shallow+llm-delayed-shortest",
)
#: The comparison of transducers, in the order of the table.
RNNT_METHODS = (
    "rnnt-greedy",
    "rnnt-beam",
    "rnnt-nlm-shallow",
    "rnnt-ngram-shallow",
    "rnnt-llm-nbest-rescoring",
    "rnnt-llm-delayed-shortest",
    "rnnt-llm-delayed-interval-16",
    "rnnt-nlm-shallow+llm-delayed-shortest",
    "rnnt-ilm-shallow+llm-delayed-shortest",
    "rnnt-llm-delayed-shortest-ahead",
)
_RNNT = "rnnt-"
#: Used for a method that the weights file does not name.
DEFAULT_WEIGHTS = {
    "attention": 1.0, "nlm": 0.3, "ngram": 0.3, "wordngram": 0.3, "llm": 0.4, "matched_llm": 0.4, "hlg": 0.5,
    "words": 0.5, "hotwords": 1.0, "lodr": 0.1, "ilm": 0.1, "ctc_head": 0.3,
}
#: Sources that are no language models: beside an LM they have no share of the bonus a word.
NO_LMS = ("hotwords", "lodr", "ilm", "ctc_head")
_TABLES = {"all": METHODS, "k2-all": K2_METHODS, "rnnt-all": RNNT_METHODS}
_WANTED = {
    "ctc_head": "emissions.model must be an acoustic model with a CTC head beside its transducer",
    "graph": "k2.graph must name a decoding graph of the job make-graph, or k2.saved lattices,",
    "hotwords": "hotwords must name a file of phrases",
    "lodr": "lodr must name an n-gram over the acoustic pieces (see the job internal-lm)",
    "transducer": "emissions.model must be an acoustic model with a transducer head",
    "word_ngram": "k2.ngram must name a graph G of the job make-graph (or k2.saved lattices made with one)",
}
NO_DECODER = (
    "{} must have an acoustic model with an attention decoder (EmissionOptions.model), but this one has none"
)


@dataclass(frozen=True)
class FusionSpec:
    """A fusion in the search.

    Args:
        source: of its score, and of the model.
        trigger: when delayed fusion scores; None: shallow fusion.
        look_ahead: whether an n-gram ranks words that delayed fusion has not scored yet.
        late: frames by which the scores of delayed fusion may arrive late.
    """

    source: str
    trigger: Optional[Trigger] = None
    look_ahead: bool = False
    late: int = 0


@dataclass(frozen=True)
class RescoringSpec:
    """A second pass: the source of its score, and of the model."""

    source: str


@dataclass(frozen=True)
class MethodSpec:
    """A method.

    Args:
        name: its name.
        search: ``greedy``, ``prefix``, ``rnnt-greedy``, ``rnnt-beam`` or a search of lattices (see
            `lattice.methods.K2_SEARCHES`).
        fusions: those of the search.
        rescorers: second passes, in their order.
        stored: sources of the scores that lattices bring along.
    """

    name: str
    search: str = "prefix"
    fusions: tuple[FusionSpec, ...] = ()
    rescorers: tuple[RescoringSpec, ...] = ()
    stored: tuple[str, ...] = ()

    @property
    def of_lattices(self) -> bool:
        return self.search not in ("greedy", "prefix") and not self.of_transducer

    @property
    def of_transducer(self) -> bool:
        return self.search.startswith(_RNNT)

    @property
    def reads_ctc(self) -> bool:
        """Whether log-probs of the CTC head take part."""
        return not self.of_transducer or "ctc_head" in self.sources

    @property
    def acoustic(self) -> str:
        """The source of the acoustic model's own score, which has weight 1."""
        return "rnnt" if self.of_transducer else "ctc"

    @property
    def sources(self) -> list[str]:
        """All sources of scores beside the acoustic model's own and ``words``."""
        return [*self.stored, *(spec.source for spec in (*self.fusions, *self.rescorers))]

    @property
    def needs(self) -> set[str]:
        """Models by source, ``ngram`` for look-ahead too, ``graph`` and ``word_ngram`` for lattices.

        ``transducer`` where its head is searched; it is its own internal language model.
        """
        models = {spec.source for spec in (*self.fusions, *self.rescorers)}
        models = models - {"ilm"} | ({"transducer"} if self.of_transducer else set())
        models |= {"ngram"} if any(fusion.look_ahead for fusion in self.fusions) else set()
        return models | (needs_of(self.search) if self.of_lattices else set())


_COMPONENTS: dict[str, Union[FusionSpec, RescoringSpec]] = {
    "ngram-shallow": FusionSpec("ngram"),
    "hotwords-shallow": FusionSpec("hotwords"),
    "lodr-shallow": FusionSpec("lodr"),
    "ilm-shallow": FusionSpec("ilm"),
    "ctc-shallow": FusionSpec("ctc_head"),
    "nlm-shallow": FusionSpec("nlm"),
    "llm-shallow": FusionSpec("matched_llm"),
    "attention-rescoring": RescoringSpec("attention"),
    "ngram-nbest-rescoring": RescoringSpec("ngram"),
    "lodr-nbest-rescoring": RescoringSpec("lodr"),
    "nlm-nbest-rescoring": RescoringSpec("nlm"),
    "llm-nbest-rescoring": RescoringSpec("llm"),
    "matched-nbest-rescoring": RescoringSpec("matched_llm"),
    # every=4: the utterances of a batch fuse in the same frames, with a quarter of the calls
    "llm-delayed-shortest": FusionSpec("llm", ShortestHypothesis(every=4)),
    "llm-delayed-every-frame": FusionSpec("llm", EveryFrame()),
    "wordngram-delayed": FusionSpec("wordngram", ShortestHypothesis(every=4)),
    "llm-delayed-at-end": FusionSpec("llm", AtEnd()),
}
# suffixes of delayed fusion: frames by which scores may be late; look-ahead by the n-gram
_DELAYED = re.compile(r"(?P<plain>llm-delayed-.+?)(-late-(?P<late>\d+))?(?P<ahead>-ahead)?")
_INTERVAL = re.compile(r"llm-delayed-interval-(\d+)")


def parse_method(name: str) -> MethodSpec:
    """Return the spec of a method's name.

    Raises:
        ValueError: a component is unknown (the message gives the nearest), or a source comes twice.
    """
    if name in ("ctc-greedy", "ctc-prefix"):
        return MethodSpec(name, name.removeprefix("ctc-"))
    if name in ("rnnt-greedy", "rnnt-beam"):
        return MethodSpec(name, name)
    search, stored, texts = "prefix", (), name.removeprefix("ctc-prefix+").split("+")
    if name.startswith(_RNNT):
        search, texts = "rnnt-beam", name.removeprefix(_RNNT).removeprefix("beam+").split("+")
    of_lattices = split_name(name)
    if of_lattices is not None:
        search, source, texts = of_lattices
        stored = (source, "ngram") if search == "nbest-ngram" else (source,)
    components = [_parse_component(text, name) for text in texts]
    fusions = tuple(spec for spec in components if isinstance(spec, FusionSpec))
    rescorers = tuple(spec for spec in components if isinstance(spec, RescoringSpec))
    spec = MethodSpec(name, search, fusions, rescorers, stored)
    sources = spec.sources
    check(len(set(sources)) == len(sources), f"method {name!r}", "use each source of scores once", sources)
    shallow = [fusion.source for fusion in fusions if fusion.trigger is None]
    rule = "have no shallow fusion: hypotheses on a lattice are not extended by pieces"
    check(of_lattices is None or not shallow, f"method {name!r}", rule, shallow)
    own = [text for text in ("ilm-shallow", "ctc-shallow") if text in texts and not spec.of_transducer]
    rule = f"have {' and '.join(own)} with a transducer alone (rnnt-...): of its internal LM, its CTC head"
    check(not own, f"method {name!r}", rule, sources)
    return spec


def _parse_component(text: str, name: str) -> Union[FusionSpec, RescoringSpec]:
    plain, late, ahead = text, 0, False
    delayed = _DELAYED.fullmatch(text)
    if delayed:
        plain, late, ahead = delayed["plain"], int(delayed["late"] or 0), delayed["ahead"] is not None
    interval = _INTERVAL.fullmatch(plain)
    if not interval and plain not in _COMPONENTS:
        known = [*METHODS, *_COMPONENTS, *K2_METHODS, *RNNT_METHODS]
        known += ["llm-delayed-interval-N", "llm-delayed-...-late-N"]
        raise ValueError(
            f"method must be built of known components, but {text!r} of {name!r} is none"
            f"{nearest(text, known)} (known: {known})"
        )
    spec = FusionSpec("llm", FixedInterval(int(interval.group(1)))) if interval else _COMPONENTS[plain]
    return replace(spec, look_ahead=ahead, late=late) if delayed else spec


def choose_methods(names: Union[str, Sequence[str]], available: Container[str]) -> list[str]:
    """Return the methods of a list; those of ``all``, ... that lack a model are skipped and logged.

    Args:
        names: as for `parse_methods`.
        available: models, see `MethodSpec.needs`.

    Raises:
        ValueError: a method that is named itself lacks a model.
    """
    named = set(_split_names(names))
    chosen = []
    for name in parse_methods(names):
        lacking = sorted(source for source in parse_method(name).needs if source not in available)
        if not lacking:
            chosen.append(name)
        elif name not in named:
            logging.warning("%s is skipped: there is no %s", name, ", ".join(lacking))
        elif lacking[0] == "attention":
            raise ValueError(NO_DECODER.format(name))
        elif lacking[0] in _WANTED:
            raise ValueError(f"{_WANTED[lacking[0]]} for the method {name!r}")
        else:
            raise ValueError(f"{lacking[0]}.path must name a model for the method {name!r}, but is ''")
    return chosen


def parse_methods(names: Union[str, Sequence[str]]) -> list[str]:
    """Return the methods of a list or a comma-separated text.

    ``all`` is the whole comparison, ``k2-all`` that of lattices, ``rnnt-all`` that of transducers.
    """
    chosen = [method for name in _split_names(names) for method in _TABLES.get(name, (name,))]
    check(len(chosen) > 0, "methods", "name at least one method", names)
    for name in chosen:
        parse_method(name)
    return list(dict.fromkeys(chosen))


def _split_names(names: Union[str, Sequence[str]]) -> list[str]:
    names = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in names if name.strip()]
