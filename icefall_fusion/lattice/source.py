"""Sources of lattices: k2 in this process, or files that the job make-lattices wrote where k2 is.
Knows: graphs, emissions, N-best lists. Must not know: language models, methods, word errors.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import MutableMapping, Optional, Protocol

import torch

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lattice.beam import LatticeBeamOptions
from icefall_fusion.lattice.graph import DecodingGraph, Labels, load_graph
from icefall_fusion.lattice.k2_fsas import load_k2
from icefall_fusion.lattice.k2_lattice import K2Lattices, LatticeMaker, LatticeOptions
from icefall_fusion.lattice.lattices import Lattices
from icefall_fusion.lattice.nbest_lists import no_words, path_lists
from icefall_fusion.lattice.paths import random_paths
from icefall_fusion.lattice.saved import SavedLattices, list_kinds
from icefall_fusion.lattice.word_ngram import WordNgram
from icefall_fusion.nbest import NBest
from icefall_fusion.text.tokens import AcousticTokens


@dataclass(frozen=True)
class K2Options:
    """Lattices, for the methods k2-*.

    Args:
        graph: decoding graph of the job make-graph (H, HL or HLG); empty: none.
        ngram: n-gram over words as a graph (kind G of make-graph), for rescoring; empty: none.
        saved: folder of the job make-lattices, read instead of running k2; empty: k2 in this process.
        lattice: how lattices are made.
        beam: of the beam search along lattices (k2-llm-delayed-*).
    """

    graph: str = ""
    ngram: str = ""
    saved: str = ""
    lattice: LatticeOptions = field(default_factory=LatticeOptions)
    beam: LatticeBeamOptions = field(default_factory=LatticeBeamOptions)

    def __post_init__(self) -> None:
        both = bool(self.graph or self.ngram) and bool(self.saved)
        check(not both, "K2Options.saved", "be left out together with K2Options.graph or ngram", self.saved)

    def sources(self) -> set[str]:
        """Return the names of what methods may ask for: ``graph``, ``word_ngram``."""
        graph = bool(self.graph or self.saved)
        ngram = "whole" in list_kinds(self.saved) if self.saved else bool(self.graph and self.ngram)
        return {name for name, there in (("graph", graph), ("word_ngram", ngram)) if there}


class LatticeSource(Protocol):
    """Makes lattices of a batch, and N-best lists of their paths; ``labels`` are of their output labels.

    ``counters`` get ``lattice_arcs``, ``lattice_frames`` and, for lattices from files, ``lattice_seconds``:
    the time they took where they were made.
    """

    labels: Labels

    def lattices(self, emissions: Emissions, counters: MutableMapping[str, float]) -> Lattices:
        """Return lattices."""
        ...

    def lists(
        self, emissions: Emissions, kind: str, counters: MutableMapping[str, float]
    ) -> list[NBest]:
        """Return lists of paths.

        Args:
            kind: ``nbest`` (random paths of lattices, with an ``ngram`` score where there is an n-gram) or
                ``whole`` (paths of lattices that the n-gram has rescored).
        """
        ...


def open_lattices(options: K2Options, tokens: AcousticTokens, device: str) -> LatticeSource:
    """Open the source that options name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a graph or lattices were made for other acoustic pieces.
        Unavailable: k2 is wanted in this process, but cannot be imported; with the remedy.
    """
    if options.saved:
        return SavedLattices(options.saved, tokens, torch.device(device))
    try:
        load_k2()
    except Unavailable as reason:
        elsewhere = "Or make lattices where k2 is (job make-lattices) and give their folder as --k2.saved"
        raise Unavailable(f"{reason}. {elsewhere}") from reason
    return K2Source(options, tokens, torch.device(device))


class K2Source:
    """Lattices by k2 in this process."""

    def __init__(self, options: K2Options, tokens: AcousticTokens, device: torch.device) -> None:
        check(bool(options.graph), "k2.graph", "name a decoding graph (job make-graph)", options.graph)
        self.options = options.lattice
        self.graph = _load(options.graph, tokens)
        check(self.graph.kind != "G", "k2.graph", "be H, HL or HLG (a G is for k2.ngram)", options.graph)
        self.labels = self.graph.labels(tokens)
        self._maker = LatticeMaker(self.graph, options.lattice, device)
        self._ngram: Optional[WordNgram] = None
        if options.ngram:
            ngram = _load(options.ngram, tokens)
            rule = f"be a G over the words of {options.graph}: make both from one lexicon"
            check(ngram.kind == "G" and ngram.words == self.graph.words, "k2.ngram", rule, options.ngram)
            self._ngram = WordNgram(ngram, self.graph.outputs, device)

    @property
    def list_kinds(self) -> list[str]:
        """The kinds of lists that it can make."""
        return ["nbest"] if self._ngram is None else ["nbest", "whole"]

    def make(self, emissions: Emissions, counters: MutableMapping[str, float]) -> K2Lattices:
        """Return the lattices as k2's and as plain tensors."""
        return self._maker.make(emissions, counters)

    def lattices(self, emissions: Emissions, counters: MutableMapping[str, float]) -> Lattices:
        return self.make(emissions, counters).plain

    def lists(
        self, emissions: Emissions, kind: str, counters: MutableMapping[str, float]
    ) -> list[NBest]:
        return self.lists_of(self.make(emissions, counters), emissions, kind, counters)

    def lists_of(
        self, lattices: K2Lattices, emissions: Emissions, kind: str, counters: MutableMapping[str, float]
    ) -> list[NBest]:
        """Return lists of lattices of `make`."""
        if lattices.fsas is None:
            return [no_words(emissions, row) for row in range(len(emissions))]
        options, plain = self.options, lattices.plain
        weights = {"ctc": 1.0, "hlg": options.graph_scale}
        if kind == "whole":
            check(self._ngram is not None, "k2.ngram", "name an n-gram over words (make-graph, kind G)", "")
            paths = self._ngram.rescore(lattices, options, counters)
        else:
            scores = options.graph_scale * plain.hlg + plain.ctc
            paths = random_paths(lattices.fsas, options.path_scale * scores, options.paths)
        return path_lists(paths, plain, emissions, self.labels, weights, self.graph.topology, self._ngram)


def _load(path: str, tokens: AcousticTokens) -> DecodingGraph:
    graph = load_graph(path)
    graph.check_tokens(tokens, f"the graph {path}")
    return graph
