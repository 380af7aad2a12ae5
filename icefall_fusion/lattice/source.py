"""Where lattices come from: k2 in this process, or files that the job make-lattices wrote where k2 is.
Knows: graphs, emissions, N-best lists. Must not know: language models, methods, word errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Optional, Protocol, Sequence, Union

import torch

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check
from icefall_fusion.lattice.beam import LatticeBeamOptions
from icefall_fusion.lattice.ctc_forward import ctc_scores
from icefall_fusion.lattice.export import best_paths, make_hypothesis
from icefall_fusion.lattice.files import SavedLattices
from icefall_fusion.lattice.graph import WordTokens, load_graph
from icefall_fusion.lattice.k2_lattice import LatticeMaker, LatticeOptions, to_plain, why_no_k2
from icefall_fusion.lattice.paths import Paths, WordNgram, random_paths
from icefall_fusion.lattice.value import Lattices
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.text.tokens import AcousticTokens

#: N-gram weights under which the best path of a whole lattice is in its list.
NGRAM_SCALES = (0.5, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7)


@dataclass(frozen=True)
class K2Options:
    """Lattices, for the methods k2-*.

    Args:
        graph: decoding graph of the job make-graph (H, HL or HLG); empty: there is none.
        ngram: n-gram over words as a graph (kind G of make-graph), for rescoring; empty: there is none.
        saved: folder that the job make-lattices wrote, taken instead of k2; empty: k2 in this process.
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
        check(not both, "K2Options.saved", "be left out where K2Options.graph or ngram is given", self.saved)

    def sources(self) -> set[str]:
        """Return what methods may ask for: ``graph``, ``word_ngram``."""
        if self.saved:
            has = SavedLattices.read_meta(self.saved)["lists"]
            return {"graph"} | ({"word_ngram"} if "whole" in has else set())
        return ({"graph"} if self.graph else set()) | ({"word_ngram"} if self.graph and self.ngram else set())


class LatticeSource(Protocol):
    """Makes lattices of a batch, and N-best lists of their paths.

    ``labels`` is the vocabulary of what arcs say; ``counters`` are of all calls, ``lattice_seconds`` among
    them: what lattices that come from files took where they were made.
    """

    labels: Union[AcousticTokens, WordTokens]
    counters: dict[str, float]

    def lattices(self, emissions: Emissions) -> Lattices:
        """Return lattices."""
        ...

    def lists(self, emissions: Emissions, kind: str) -> list[NBest]:
        """Return lists of paths.

        Args:
            kind: ``nbest`` (random paths of lattices, with an ``ngram`` score where there is an n-gram) or
                ``whole`` (paths of lattices that the n-gram has rescored).
        """
        ...


def open_lattices(options: K2Options, tokens: AcousticTokens, device: str) -> LatticeSource:
    """Open what options name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a graph or lattices were made for other acoustic pieces.
        ModuleNotFoundError: k2 is wanted in this process, but cannot be imported; with the remedy.
    """
    if options.saved:
        return SavedLattices(options.saved, tokens, torch.device(device))
    why = why_no_k2()
    if why:
        elsewhere = "Or make lattices where k2 is (job make-lattices) and give their folder as --k2.saved"
        raise ModuleNotFoundError(f"{why}. {elsewhere}", name="k2")
    return K2Lattices(options, tokens, torch.device(device))


class K2Lattices:
    """Lattices by k2 in this process."""

    def __init__(self, options: K2Options, tokens: AcousticTokens, device: torch.device) -> None:
        check(bool(options.graph), "k2.graph", "name a decoding graph (job make-graph)", options.graph)
        self.options, self.tokens = options.lattice, tokens
        self.graph = load_graph(options.graph)
        self.graph.check_tokens(tokens, f"the graph {options.graph}")
        check(self.graph.kind != "G", "k2.graph", "be H, HL or HLG (a G is for k2.ngram)", options.graph)
        self.labels = self.graph.labels(tokens)
        self._maker = LatticeMaker(self.graph, options.lattice, device)
        self._ngram: Optional[WordNgram] = None
        if options.ngram:
            ngram = load_graph(options.ngram)
            ngram.check_tokens(tokens, f"the graph {options.ngram}")
            rule = f"be a G over the words of {options.graph}: make both from one lexicon"
            check(ngram.kind == "G" and ngram.words == self.graph.words, "k2.ngram", rule, options.ngram)
            self._ngram = WordNgram(ngram, device)
        of_lattices = dict.fromkeys(("lattices_thinned", "lattice_arcs", "lattice_frames"), 0)
        self.counters: dict[str, float] = {**self._maker.counters, **of_lattices}

    @property
    def has_ngram(self) -> bool:
        return self._ngram is not None

    def make(self, emissions: Emissions) -> tuple[Any, Lattices]:
        """Return the lattices as k2's (of those that have one) and as plain tensors."""
        fsas, rows = self._maker.make(emissions.log_probs, emissions.lens, emissions.ids)
        plain = to_plain(fsas, rows, emissions.log_probs, emissions.lens, emissions.ids)
        self.counters.update(self._maker.counters)
        self.counters["lattice_arcs"] += len(plain.source)
        self.counters["lattice_frames"] += int(emissions.lens.sum())
        return fsas, plain

    def lattices(self, emissions: Emissions) -> Lattices:
        return self.make(emissions)[1]

    def lists(self, emissions: Emissions, kind: str) -> list[NBest]:
        return self.lists_of(*self.make(emissions), emissions, kind)

    def lists_of(self, fsas: Any, plain: Lattices, emissions: Emissions, kind: str) -> list[NBest]:
        """Return lists of lattices that `make` gave."""
        if fsas is None:
            return [no_words(emissions, row) for row in range(len(plain))]
        options = self.options
        scores = options.graph_scale * plain.hlg + plain.ctc
        if kind == "whole":
            check(self._ngram is not None, "k2.ngram", "name an n-gram over words (make-graph, kind G)", "")
            least, sayings = options.rescore_posterior, self.graph.sayings
            paths, thinned = self._ngram.rescore(
                fsas, plain.ctc, scores, least, sayings, NGRAM_SCALES, options.paths, options.rescore_arcs
            )
            self.counters["lattices_thinned"] += thinned
        else:
            paths = random_paths(fsas, options.path_scale * scores, options.paths)
        return self._to_lists(paths, plain, emissions)

    def _to_lists(self, paths: Paths, plain: Lattices, emissions: Emissions) -> list[NBest]:
        """Return the paths of each utterance as hypotheses, one for each sequence of words, all scored."""
        rows = plain.counts.nonzero().squeeze(1).tolist()
        saying, piece = plain.saying.cpu().numpy(), plain.piece.cpu().numpy()
        hlg = plain.hlg.cpu().double().numpy()
        found: dict[int, dict[tuple[int, ...], tuple[float, int]]] = {row: {} for row in range(len(plain))}
        for number, place in enumerate(paths.owner.tolist()):
            arcs = paths.path(number)
            said = saying[arcs]
            key, score = tuple(said[said > 0].tolist()), float(hlg[arcs].sum())
            known = found[rows[place]]
            if key not in known or known[key][0] < score:  # of equal words the graph's best way counts
                known[key] = (score, number)
        pieces = [
            [[i for i in piece[paths.path(number)].tolist() if i] for _, number in found[row].values()]
            for row in range(len(plain))
        ]
        ctc = ctc_scores(emissions.log_probs, emissions.lens, pieces, 0, self.graph.topology)
        ngram = iter(self._ngram_scores([key for row in range(len(plain)) for key in found[row]]))
        lists = []
        for row, name in enumerate(plain.ids):
            hypotheses = []
            for (key, (score, number)), heard in zip(found[row].items(), ctc[row]):
                words = self.labels.words(key)
                scores = {"ctc": heard, "hlg": score, **next(ngram), "words": float(len(words))}
                scores["total"] = heard + self.options.graph_scale * score
                hypotheses.append(make_hypothesis(plain, paths.path(number), words, scores, self.tokens,
                                                  emissions.frame_shift))  # fmt: skip
            nbest = NBest(name, hypotheses) if hypotheses else no_words(emissions, row)
            lists.append(nbest.reweight({"ctc": 1.0, "hlg": self.options.graph_scale}))
        return lists

    def _ngram_scores(self, sayings: Sequence[tuple[int, ...]]) -> list[dict[str, float]]:
        if self._ngram is None:
            return [{} for _ in sayings]
        words = [[word for saying in key for word in self.graph.sayings[saying]] for key in sayings]
        return [{"ngram": float(score)} for score in self._ngram.score(words)]


def no_words(emissions: Emissions, row: int) -> NBest:
    """Return what stands for an utterance without a lattice: no words, the score of blanks alone."""
    frames = int(emissions.lens[row])
    heard = (
        float(emissions.log_probs[row, :frames, emissions.tokens.blank_id].double().sum()) if frames else 0.0
    )
    scores = {"ctc": heard, "hlg": 0.0, "ngram": 0.0, "words": 0.0, "total": heard}
    return NBest(emissions.ids[row], [Hypothesis([], "", scores)])


def best_lists(
    lattices: Lattices, emissions: Emissions, labels: Any, weights: Mapping[str, float]
) -> list[NBest]:
    """Return the best path of each lattice as a list of one (``ctc`` is of that alignment alone).

    Args:
        lattices: of ``emissions``, in their order.
        labels: vocabulary of what arcs say.
        weights: of ``ctc``, ``hlg`` and ``words``.
    """
    sayings = getattr(labels, "sayings", None)
    sizes = None if sayings is None else [len(saying) for saying in sayings]
    bonus = weights.get("words", 0.0) if sayings is not None else 0.0  # pieces are no words
    lists = []
    for row, path in enumerate(best_paths(lattices, weights, bonus, sizes)):
        if not len(path):
            lists.append(no_words(emissions, row).reweight(weights))
            continue
        arcs = path.to(lattices.source.device)
        words = labels.words([saying for saying in lattices.saying[arcs].tolist() if saying])
        scores = {name: float(getattr(lattices, name)[arcs].double().sum()) for name in ("ctc", "hlg")}
        scores.update(words=float(len(words)), total=0.0)
        made = make_hypothesis(lattices, path.numpy(), words, scores, emissions.tokens, emissions.frame_shift)
        lists.append(NBest(lattices.ids[row], [made]).reweight(weights))
    return lists
