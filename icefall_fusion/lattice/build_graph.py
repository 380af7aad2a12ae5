"""Decoding graphs by k2: CTC topologies, H, HL, HLG from a lexicon and an n-gram over words; G for rescoring.
Knows: lexicons, ARPA files (through kaldilm), k2. Must not know: log-probs, searches, language models.

Labels of the lexicon's side: pieces, then the disambiguation symbol #0 (back-off of G), then marked pieces.
Labels of words: 0 none, 1 .. N words, N + 1 is #0.
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
from icefall_fusion.lattice.graph import TOPOLOGIES, DecodingGraph
from icefall_fusion.lattice.k2_lattice import load_k2
from icefall_fusion.text.lexicon import Lexicon
from icefall_fusion.text.tokens import AcousticTokens

_START, _END, _UNKNOWN, _BACKOFF = "<s>", "</s>", "<unk>", "#0"


def make_h(tokens: AcousticTokens, topology: str = "standard") -> DecodingGraph:
    """Return the CTC topology over all pieces: it says pieces.

    Raises:
        ValueError: the blank is not piece 0, as k2 has it.
    """
    fsa = load_k2().arc_sort(_ctc_topology(tokens, topology))
    fsa.piece = fsa.aux_labels
    saying = fsa.aux_labels.clamp(min=0)
    sayings = [(), *((piece,) for piece in range(1, tokens.size))]
    return _plain(fsa, saying, sayings, "H", topology, [], tokens)


def make_hl(tokens: AcousticTokens, lexicon: Lexicon, topology: str = "standard") -> DecodingGraph:
    """Return H composed with the lexicon: any words, none more probable than others."""
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
        order: longest n-gram taken; -1: all.

    Raises:
        ValueError: words of the n-gram are missing from the lexicon.
        ModuleNotFoundError: kaldilm is not installed.
    """
    k2 = load_k2()
    g = read_g(arpa, lexicon.words, order)
    g = k2.arc_sort(_without(g, "aux_labels"))
    lex = k2.arc_sort(_lexicon_fst(lexicon, tokens, with_backoff=True))
    lg = k2.connect(k2.compose(lex, g))
    lg = _clean(lg, lexicon, tokens, with_backoff=True)
    return _compose_h(lg, tokens, lexicon, topology, "HLG")


def make_g(tokens: AcousticTokens, lexicon: Lexicon, arpa: PathLike, order: int = -1) -> DecodingGraph:
    """Return an n-gram over words for rescoring: back-off arcs and a loop of each state have label 0."""
    k2 = load_k2()
    g = _without(read_g(arpa, lexicon.words, order), "aux_labels")
    g.labels[g.labels > len(lexicon.words)] = 0
    g.__dict__["_properties"] = None  # labels have changed
    g = k2.arc_sort(k2.add_epsilon_self_loops(k2.arc_sort(g)))
    nothing = torch.zeros_like(g.labels)
    g.piece = nothing
    return _plain(g, nothing, [()], "G", "standard", lexicon.words, tokens)


def read_g(arpa: PathLike, words: Sequence[str], order: int = -1) -> Any:
    """Return an ARPA file as a k2 FSA over word ids; back-off arcs have the label #0 and say nothing.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has words that the lexicon lacks (they are named).
    """
    import_kaldilm()
    import kaldilm

    if not Path(arpa).is_file():
        raise FileNotFoundError(f"there is no ARPA file at {arpa}")
    known = {word: index for index, word in enumerate(words, 1)}
    lacking = [word for word in arpa_words(arpa) if word not in known]
    rule = f"be in the lexicon, but {len(lacking)} are not: make the lexicon from the n-gram's own words"
    check(not lacking, f"the words of {arpa}", rule, lacking[:3])
    with tempfile.TemporaryDirectory() as folder:
        table, plain = Path(folder) / "words.txt", Path(folder) / "g.arpa"
        names = ["<eps>", *words, _BACKOFF, _START, _END]
        table.write_text("".join(f"{name} {index}\n" for index, name in enumerate(names)), encoding="utf-8")
        with opener(arpa)(arpa, "rb") as source, open(plain, "wb") as target:
            shutil.copyfileobj(source, target)
        text = kaldilm.arpa2fst(
            input_arpa=str(plain), disambig_symbol=_BACKOFF, read_symbol_table=str(table), max_order=order,
            max_arpa_warnings=0,
        )  # fmt: skip
    return load_k2().Fsa.from_openfst(text, acceptor=False)


def import_kaldilm() -> None:
    """Raise ModuleNotFoundError, with the remedy, unless kaldilm is there."""
    try:
        import kaldilm  # noqa: F401
    except ImportError as error:
        message = "kaldilm, which turns an ARPA file into a graph, is not installed: pip install kaldilm"
        raise ModuleNotFoundError(message, name="kaldilm") from error


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
    return [word for word in words if word not in (_START, _END, _UNKNOWN, "<UNK>")]


# --- parts --------------------------------------------------------------------------------------------


def _ctc_topology(tokens: AcousticTokens, topology: str) -> Any:
    check_choice(topology, TOPOLOGIES, "topology")
    check(tokens.blank_id == 0, "the blank", "be piece 0, as k2 has it", tokens.blank_id)
    return load_k2().ctc_topo(tokens.size - 1, modified=topology == "modified")


def _lexicon_fst(lexicon: Lexicon, tokens: AcousticTokens, with_backoff: bool) -> Any:
    """Return the lexicon as a transducer from pieces (marked ones: see `_marked`) to any number of words."""
    marked = {pair: tokens.size + 1 + place for place, pair in enumerate(_marked(lexicon))}
    rows: list[tuple[int, int, int, int]] = []
    state = 1
    for word, (spelling, mark) in enumerate(zip(lexicon.spellings, lexicon.marks), 1):
        labels = [*spelling[:-1], marked[spelling[-1], mark] if mark else spelling[-1]]
        path = [0, *range(state, state + len(labels) - 1), 0]
        state += len(labels) - 1
        for place, label in enumerate(labels):
            rows.append((path[place], path[place + 1], label, 0 if place else word))
    if with_backoff:
        rows.append((0, 0, tokens.size, len(lexicon.words) + 1))
    rows.append((0, state, -1, -1))
    table = np.array(sorted(rows), np.int32)
    arcs = np.concatenate([table[:, :3], np.zeros((len(table), 1), np.int32)], axis=1)
    return load_k2().Fsa(torch.from_numpy(arcs), aux_labels=torch.from_numpy(table[:, 3].copy()))


def _marked(lexicon: Lexicon) -> list[tuple[int, int]]:
    """Return what stands for the last piece of spellings that need a disambiguation symbol: piece and symbol.

    The symbol is made one with the piece, not an arc of its own: when symbols go, no epsilon is left that k2
    would remove together with all but the best of words that sound alike.
    """
    return sorted({(s[-1], mark) for s, mark in zip(lexicon.spellings, lexicon.marks) if mark})


def _clean(lg: Any, lexicon: Lexicon, tokens: AcousticTokens, with_backoff: bool) -> Any:
    """Determinize, take disambiguation symbols away, and then the epsilons that back-off leaves."""
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
    saying, sayings = _sayings(graph.aux_labels)
    return _plain(graph, saying, sayings, kind, topology, lexicon.words, tokens)


def _sayings(said: Any) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Number the different word sequences that arcs say (a ragged tensor); the empty one is 0."""
    splits = said.shape.row_splits(1).numpy().astype(np.int64)
    values = said.values.numpy()
    kept = np.concatenate([[0], np.cumsum(values > 0)])  # -1 stands in arcs into the final state
    values, splits = values[values > 0], kept[splits]
    lengths = np.diff(splits)
    numbers = np.zeros(len(lengths), np.int32)
    sayings: list[tuple[int, ...]] = [()]
    single = lengths == 1
    found, inverse = np.unique(values[splits[:-1][single]], return_inverse=True)
    numbers[single] = inverse + 1
    sayings += [(word,) for word in found.tolist()]
    more: dict[tuple[int, ...], int] = {}
    for arc in np.flatnonzero(lengths > 1).tolist():
        saying = tuple(values[splits[arc] : splits[arc + 1]].tolist())
        numbers[arc] = more.setdefault(saying, len(sayings) + len(more))
    return torch.from_numpy(numbers), [*sayings, *more]


def _plain(
    fsa: Any,
    saying: torch.Tensor,
    sayings: list[tuple[int, ...]],
    kind: str,
    topology: str,
    words: Sequence[str],
    tokens: AcousticTokens,
) -> DecodingGraph:
    arcs = fsa.arcs.values()
    check(len(arcs) > 0, f"the graph {kind}", "have a path: is the lexicon's language that of the n-gram?", 0)
    source, target, label = (arcs[:, column].clone() for column in range(3))
    piece = fsa.piece.to(torch.int32).clamp(min=0)
    arcs = (source, target, label, piece, saying.to(torch.int32), fsa.scores.clone())
    return DecodingGraph(kind, topology, *arcs, sayings, list(words), tokens.size, tokens.fingerprint())


def _without(fsa: Any, name: str) -> Any:
    delattr(fsa, name)
    return fsa
