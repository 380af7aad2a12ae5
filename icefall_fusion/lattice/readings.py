"""The methods k2-*: their names, and how each decodes a batch with lattices.
Knows: lattices, the beam search along them, N-best lists. Must not know: language models, manifests, files.
"""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check
from icefall_fusion.lattice.beam import lattice_beam_search
from icefall_fusion.lattice.source import K2Options, LatticeSource, best_lists, no_words
from icefall_fusion.nbest import NBest
from icefall_fusion.scoring.wer import oracle

#: What a name begins with -> (how lattices are read, sources of that, the further parts by name).
K2_PARTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
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
    *K2_PARTS,
    "k2-llm-delayed-shortest",
    "k2-llm-delayed-interval-16",
    "k2-llm-delayed-at-end",
)
DELAYED = "k2-llm-delayed-"


def split_name(name: str) -> Optional[tuple[str, str, list[str]]]:
    """Return how a method k2-* reads lattices, the source of that, and its other parts by their own names.

    None for the name of another method. An unknown beginning is handed on, to be refused with the known ones.
    """
    first, *rest = name.split("+")
    if first.startswith(DELAYED):
        return "beam", "hlg", [first[len("k2-") :], *rest]
    if first not in K2_PARTS:
        return None
    reading, source, parts = K2_PARTS[first]
    return reading, source, [*parts, *rest]


def needs_of(reading: str) -> set[str]:
    """Return what a way to read lattices needs: ``graph``, ``word_ngram``."""
    return {"graph", "word_ngram"} if reading in ("nbest-ngram", "whole") else {"graph"}


def read_lattices(
    reading: str,
    source: LatticeSource,
    options: K2Options,
    emissions: Emissions,
    weights: Mapping[str, float],
    fusions: Sequence[Any],
    references: Optional[Mapping[str, Optional[str]]],
) -> list[NBest]:
    """Decode a batch; return one list an utterance.

    Args:
        reading: a key of `K2_PARTS`' values, or ``beam``.
        source: of lattices.
        options: of the beam search along them.
        emissions: log-probs.
        weights: of the method.
        fusions: delayed fusions, for ``beam``.
        references: text by utterance, for ``oracle``.

    Raises:
        ValueError: an oracle has no reference.
    """
    if reading in ("1best", "beam"):
        lattices = source.lattices(emissions)
        if reading == "1best":
            return best_lists(lattices, emissions, source.labels, weights)
        nbests = lattice_beam_search(
            lattices,
            weights["hlg"],
            source.labels,
            options.beam,
            fusions,
            emissions.tokens,
            emissions.frame_shift,
        )
        return [
            nbest if len(nbest) else _nothing(emissions, row, nbest) for row, nbest in enumerate(nbests)
        ]
    nbests = source.lists(emissions, "whole" if reading == "whole" else "nbest")
    nbests = [nbest.reweight({**_known(weights, nbest)}) for nbest in nbests]
    if reading == "oracle":
        nbests = [_oracle_first(nbest, references) for nbest in nbests]
    return nbests


def _known(weights: Mapping[str, float], nbest: NBest) -> dict[str, float]:
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


def _oracle_first(nbest: NBest, references: Optional[Mapping[str, Optional[str]]]) -> NBest:
    reference = None if references is None else references.get(nbest.utterance)
    check(
        reference is not None,
        "k2-nbest-oracle",
        f"have a reference of {nbest.utterance} (one whole utterance)",
        reference,
    )
    best = oracle(nbest, reference or "")
    others = [hypothesis for hypothesis in nbest if hypothesis is not best]
    return NBest(nbest.utterance, [best, *others], dict(nbest.weights))
