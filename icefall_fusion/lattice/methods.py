"""The methods k2-*: their names, and how each decodes a batch with lattices.
Knows: sources of lattices, the beam search along them, N-best lists. Must not know: language models, files.
"""
from __future__ import annotations

from typing import Mapping, MutableMapping, Optional, Sequence

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check
from icefall_fusion.lattice.beam import LatticeBeamOptions, lattice_beam_search
from icefall_fusion.lattice.nbest_lists import best_lists, no_words
from icefall_fusion.lattice.source import LatticeSource
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.wer import oracle
from icefall_fusion.search.fusion import Fusion
from icefall_fusion.text.language import ENGLISH, Language

#: First component of a name -> (search of `decode_lattices`, its source of scores, second passes by name).
K2_SEARCHES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "k2-1best": ("1best", "hlg", ()),
    "k2-nbest": ("nbest", "hlg", ()),
    "k2-nbest-oracle": ("oracle", "hlg", ()),
    "k2-nbest-ngram-rescoring": ("nbest-ngram", "hlg", ()),
    "k2-whole-lattice-ngram-rescoring": ("whole", "ngram", ()),
    "k2-attention-rescoring": ("nbest", "hlg", ("attention-rescoring",)),
    "k2-llm-nbest-rescoring": ("nbest", "hlg", ("llm-nbest-rescoring",)),
}
#: The comparison, in the order of the table.
K2_METHODS = (
    *K2_SEARCHES,
    "k2-llm-delayed-shortest",
    "k2-llm-delayed-interval-16",
    "k2-llm-delayed-at-end",
)
DELAYED = "k2-llm-delayed-"


def split_name(name: str) -> Optional[tuple[str, str, list[str]]]:
    """Return the search of a method k2-*, the source of its scores, and the names of its other components.

    None for the name of another method. The caller refuses an unknown beginning, with the known ones.
    """
    first, *rest = name.split("+")
    if first.startswith(DELAYED):
        return "beam", "hlg", [first[len("k2-") :], *rest]
    if first not in K2_SEARCHES:
        return None
    search, source, passes = K2_SEARCHES[first]
    return search, source, [*passes, *rest]


def needs_of(search: str) -> set[str]:
    """Return the names of what a search needs: ``graph``, ``word_ngram``."""
    return {"graph", "word_ngram"} if search in ("nbest-ngram", "whole") else {"graph"}


def decode_lattices(
    search: str, source: LatticeSource, beam: LatticeBeamOptions, emissions: Emissions,
    weights: Mapping[str, float], fusions: Sequence[Fusion],
    references: Optional[Mapping[str, Optional[str]]], counters: MutableMapping[str, float],
    language: Language = ENGLISH,
) -> list[NBest]:
    """Decode a batch; return one list per utterance.

    Args:
        search: ``1best``, ``nbest``, ``oracle``, ``nbest-ngram``, ``whole`` or ``beam``.
        source: of lattices.
        beam: options of the beam search along them.
        emissions: log-probs.
        weights: of the method.
        fusions: delayed fusions, for ``beam``.
        references: text by utterance, for ``oracle``.
        counters: to which the source adds.
        language: of the references.

    Raises:
        ValueError: an oracle has no reference.
    """
    if search in ("1best", "beam"):
        lattices = source.lattices(emissions, counters)
        if search == "1best":
            return best_lists(lattices, emissions, source.labels, weights)
        nbests = lattice_beam_search(lattices, weights["hlg"], source.labels, beam, fusions, emissions.tokens,
                                     emissions.frame_shift)
        return [nbest if len(nbest) else _nothing(emissions, row, nbest) for row, nbest in enumerate(nbests)]
    nbests = source.lists(emissions, "whole" if search == "whole" else "nbest", counters)
    nbests = [nbest.reweight(_scored(weights, nbest)) for nbest in nbests]
    return [_oracle_first(nbest, references, language) for nbest in nbests] if search == "oracle" else nbests


def _scored(weights: Mapping[str, float], nbest: NBest) -> dict[str, float]:
    """Return the weights of sources that were scored already; second passes add the others."""
    scored = {"words", *nbest.sources()}
    return {source: weight for source, weight in weights.items() if source in scored}


def _nothing(emissions: Emissions, row: int, nbest: NBest) -> NBest:
    """Return the empty hypothesis, with a score of 0 by every fusion, for an utterance without a lattice."""
    empty = no_words(emissions, row)
    for source in nbest.weights:
        if source not in empty[0].scores:
            empty = empty.with_scores(source, [0.0])
    return empty.reweight(nbest.weights)


def _oracle_first(nbest: NBest, references: Optional[Mapping[str, Optional[str]]],
                  language: Language) -> NBest:
    reference = (references or {}).get(nbest.utterance)
    rule = f"have a reference of {nbest.utterance} (one whole utterance)"
    check(reference is not None, "k2-nbest-oracle", rule, reference)
    best = oracle(nbest, reference or "", language)
    others = [hypothesis for hypothesis in nbest if hypothesis is not best]
    return NBest(nbest.utterance, [best, *others], dict(nbest.weights))
