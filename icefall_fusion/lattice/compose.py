"""Decoding graphs composed by k2: H, HL, HLG from a lexicon and an n-gram over words; G for rescoring.
Knows: lexicons, ARPA files (through kaldilm), k2. Must not know: log-probs, searches, language models.

Input labels of the lexicon: pieces, then the disambiguation symbol #0 (back-off of G), then marked pieces.
Its output labels: 0 none, 1 .. N words, N + 1 is #0.
"""
from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import PathLike, opener
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.lattice.graph import TOPOLOGIES, DecodingGraph, outputs_of
from icefall_fusion.lattice.k2_fsas import load_k2
from icefall_fusion.ngram.arpa import END, START, UNKNOWN
from icefall_fusion.text.lexicon import Lexicon
from icefall_fusion.text.tokens import AcousticTokens

_BACKOFF = "#0"


def make_h(tokens: AcousticTokens, topology: str = "standard") -> DecodingGraph:
    """Return the CTC topology over all pieces; its output labels are pieces.

    Raises:
        ValueError: the blank is not piece 0, as k2 has it.
        Unavailable: there is no k2 that works.
    """
    fsa = load_k2().arc_sort(_ctc_topology(tokens, topology))
    fsa.piece = fsa.aux_labels
    outputs = outputs_of(tokens)
    return _to_graph(fsa, fsa.aux_labels.clamp(min=0), outputs, "H", topology, [], tokens)


def make_hl(tokens: AcousticTokens, lexicon: Lexicon, topology: str = "standard") -> DecodingGraph:
    """Return H composed with the lexicon: any words, all equally probable."""
    lex = load_k2().connect(_lexicon_fst(lexicon, tokens, with_backoff=False))
    lg = _clean(lex, lexicon, tokens, with_backoff=False)
    return _compose_h(lg, tokens, lexicon, topology, "HL")


def make_hlg(
    tokens: AcousticTokens, lexicon: Lexicon, arpa: PathLike, topology: str = "standard", order: int = -1
) -> DecodingGraph:
    """Return H composed with the lexicon and an n-gram over words.

    Args:
        tokens: the acoustic pieces.
        lexicon: has every word of the n-gram.
        arpa: the n-gram, gzipped or not.
        topology: of CTC.
        order: longest n-gram to take; -1: all.

    Raises:
        ValueError: words of the n-gram are missing from the lexicon.
        Unavailable: there is no k2 or no kaldilm.
    """
    k2 = load_k2()
    g = k2.arc_sort(_read_g(arpa, lexicon.words, order))
    lex = k2.arc_sort(_lexicon_fst(lexicon, tokens, with_backoff=True))
    lg = _clean(k2.connect(k2.compose(lex, g)), lexicon, tokens, with_backoff=True)
    return _compose_h(lg, tokens, lexicon, topology, "HLG")


def make_g(tokens: AcousticTokens, lexicon: Lexicon, arpa: PathLike, order: int = -1) -> DecodingGraph:
    """Return an n-gram over words for rescoring: back-off arcs and a loop of each state have label 0."""
    k2 = load_k2()
    g = _read_g(arpa, lexicon.words, order)
    g.labels[g.labels > len(lexicon.words)] = 0
    g.__dict__["_properties"] = None  # labels have changed
    g = k2.arc_sort(k2.add_epsilon_self_loops(k2.arc_sort(g)))
    g.piece = torch.zeros_like(g.labels)
    return _to_graph(g, g.piece, [()], "G", "standard", lexicon.words, tokens)


def arpa_words(arpa: PathLike) -> list[str]:
    """Return the words of an ARPA file's unigrams, without <s>, </s> and <unk>.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has no unigrams.
    """
    if not Path(arpa).is_file():
        raise FileNotFoundError(f"there is no ARPA file at {arpa}")
    words, inside = [], False
    with opener(arpa)(arpa, "rb") as file:
        for raw in file:
            line = raw.decode("utf-8").strip()
            if line == "\\1-grams:":
                inside = True
            elif inside and (not line or line.startswith("\\")):
                break
            elif inside:
                words.append(line.split()[1])
    check(bool(words), f"{arpa}", "have unigrams", len(words))
    return [word for word in words if word not in (START, END, UNKNOWN, "<UNK>")]


# --- steps of the composition ---------------------------------------------------------------------------


def _read_g(arpa: PathLike, words: Sequence[str], order: int) -> Any:
    """Return an ARPA file as a k2 acceptor of word ids; back-off arcs have the label #0."""
    try:
        import kaldilm
    except ImportError as error:
        message = "kaldilm, which turns an ARPA file into a graph, is not installed: pip install kaldilm"
        raise Unavailable(message) from error
    known = set(words)
    lacking = [word for word in arpa_words(arpa) if word not in known]
    rule = f"be in the lexicon, but {len(lacking)} are not: make the lexicon from the n-gram's own words"
    check(not lacking, f"the words of {arpa}", rule, lacking[:3])
    with tempfile.TemporaryDirectory() as folder:
        table, plain = Path(folder) / "words.txt", Path(folder) / "g.arpa"
        names = ["<eps>", *words, _BACKOFF, START, END]
        table.write_text("".join(f"{name} {index}\n" for index, name in enumerate(names)), encoding="utf-8")
        with opener(arpa)(arpa, "rb") as source, open(plain, "wb") as target:
            shutil.copyfileobj(source, target)
        text = kaldilm.arpa2fst(
            input_arpa=str(plain), disambig_symbol=_BACKOFF, read_symbol_table=str(table), max_order=order,
            max_arpa_warnings=0,
        )
    g = load_k2().Fsa.from_openfst(text, acceptor=False)
    del g.aux_labels
    return g


def _ctc_topology(tokens: AcousticTokens, topology: str) -> Any:
    check_choice(topology, TOPOLOGIES, "topology")
    check(tokens.blank_id == 0, "the blank", "be piece 0, as k2 has it", tokens.blank_id)
    return load_k2().ctc_topo(tokens.size - 1, modified=topology == "modified")


def _lexicon_fst(lexicon: Lexicon, tokens: AcousticTokens, with_backoff: bool) -> Any:
    """Return the lexicon as a transducer from pieces (marked ones: see `_marked`) to any number of words."""
    marked = {pair: tokens.size + 1 + index for index, pair in enumerate(_marked(lexicon))}
    arcs: list[tuple[int, int, int, int]] = []  # source, target, piece, word
    state = 1
    for word, (spelling, mark) in enumerate(zip(lexicon.spellings, lexicon.marks), 1):
        labels = [*spelling[:-1], marked[spelling[-1], mark] if mark else spelling[-1]]
        path = [0, *range(state, state + len(labels) - 1), 0]
        state += len(labels) - 1
        outputs = [word, *[0] * (len(labels) - 1)]
        arcs += zip(path, path[1:], labels, outputs)
    if with_backoff:
        arcs.append((0, 0, tokens.size, len(lexicon.words) + 1))
    arcs.append((0, state, -1, -1))
    table = torch.from_numpy(np.array(sorted(arcs), np.int32))
    no_scores = torch.zeros(len(arcs), 1, dtype=torch.int32)
    fsa = torch.cat([table[:, :3], no_scores], dim=1)
    return load_k2().Fsa(fsa, aux_labels=table[:, 3].contiguous())


def _marked(lexicon: Lexicon) -> list[tuple[int, int]]:
    """Return last pieces of spellings that need a disambiguation symbol, each with the symbol, once.

    Piece and symbol are one label, not two arcs: when symbols go, no epsilon is left. k2 would remove an
    epsilon together with all but the best of words that have the same spelling.
    """
    return sorted({(s[-1], mark) for s, mark in zip(lexicon.spellings, lexicon.marks) if mark})


def _clean(lg: Any, lexicon: Lexicon, tokens: AcousticTokens, with_backoff: bool) -> Any:
    """Determinize; remove disambiguation symbols, then the epsilons that back-off leaves."""
    k2 = load_k2()
    lg = k2.connect(k2.determinize(lg, k2.DeterminizeWeightPushingType.kLogWeightPushing))
    pieces = [*range(tokens.size), 0, *(piece for piece, _ in _marked(lexicon)), -1]  # last: of label -1
    lg.labels = torch.tensor(pieces, dtype=torch.int32)[lg.labels.long()]
    if with_backoff:
        values = lg.aux_labels.values
        values[values > len(lexicon.words)] = 0
        lg = k2.connect(k2.remove_epsilon(lg))
    lg.aux_labels = lg.aux_labels.remove_values_eq(0)
    return k2.arc_sort(lg)


def _compose_h(lg: Any, tokens: AcousticTokens, lexicon: Lexicon, topology: str, kind: str) -> DecodingGraph:
    k2 = load_k2()
    graph = k2.compose(_ctc_topology(tokens, topology), lg, inner_labels="piece")
    graph = k2.arc_sort(k2.connect(graph))
    output, outputs = _number_outputs(graph.aux_labels)
    return _to_graph(graph, output, outputs, kind, topology, lexicon.words, tokens)


def _number_outputs(words: Any) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Number the different word sequences of arcs (a k2 ragged tensor); the empty one is 0."""
    splits = words.shape.row_splits(1).numpy().astype(np.int64)
    values = words.values.numpy()
    kept = np.concatenate([[0], np.cumsum(values > 0)])  # -1 stands in arcs into the final state
    values, splits = values[values > 0], kept[splits]
    lengths = np.diff(splits)
    numbers = np.zeros(len(lengths), np.int32)
    outputs: list[tuple[int, ...]] = [()]
    single = lengths == 1
    unique, inverse = np.unique(values[splits[:-1][single]], return_inverse=True)
    numbers[single] = inverse + 1
    outputs += [(word,) for word in unique.tolist()]
    more: dict[tuple[int, ...], int] = {}
    for arc in np.flatnonzero(lengths > 1).tolist():
        output = tuple(values[splits[arc] : splits[arc + 1]].tolist())
        numbers[arc] = more.setdefault(output, len(outputs) + len(more))
    return torch.from_numpy(numbers), [*outputs, *more]


def _to_graph(
    fsa: Any, output: torch.Tensor, outputs: list[tuple[int, ...]], kind: str, topology: str,
    words: Sequence[str], tokens: AcousticTokens,
) -> DecodingGraph:
    arcs = fsa.arcs.values()
    check(len(arcs) > 0, f"the graph {kind}", "have a path: is the lexicon's language that of the n-gram?", 0)
    source, target, label = (arcs[:, column].clone() for column in range(3))
    piece = fsa.piece.to(torch.int32).clamp(min=0)
    arcs = (source, target, label, piece, output.to(torch.int32), fsa.scores.clone())
    return DecodingGraph(kind, topology, *arcs, outputs, list(words), tokens.size, tokens.fingerprint())
