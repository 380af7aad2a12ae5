"""Decoding graphs as plain tensors, their output labels as a vocabulary, their files.
Knows: tensors, acoustic pieces. Must not know: k2, log-probs, searches, how a graph was made.

A graph file has the hash of the acoustic pieces that it was made for. Under other pieces it is refused.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence, Union

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import PathLike
from icefall_fusion.lattice.npz import array_text, open_npz, text_array, write_npz
from icefall_fusion.text.tokens import AcousticTokens

KINDS = ("H", "HL", "HLG", "G")
TOPOLOGIES = ("standard", "modified")
_ARRAYS = ("source", "target", "label", "piece", "output", "score")


@dataclass(frozen=True)
class DecodingGraph:
    """A weighted transducer from pieces in frames to words; A arcs, the final state is the last.

    Args:
        kind: H, HL, HLG, or G (an n-gram over words, for rescoring: ``label`` is then a word).
        topology: of CTC: standard (a blank between equal pieces) or modified (none needed).
        source, target: [A] int32 states; arcs are sorted by source, then label.
        label: [A] int32 piece of the frame (0 is blank), -1 into the final state.
        piece: [A] int32 piece that begins here, 0 for none (blank, or a piece that goes on).
        output: [A] int32 output label: an index into ``outputs``.
        score: [A] float32 natural-log score of the graph (0 without a language model).
        outputs: a tuple of word ids (of pieces, for H) for each output label; the first is empty.
        words: text of word id 1, 2, ... (empty for H).
        pieces: V.
        fingerprint: of the acoustic pieces.
    """

    kind: str
    topology: str
    source: Tensor
    target: Tensor
    label: Tensor
    piece: Tensor
    output: Tensor
    score: Tensor
    outputs: list[tuple[int, ...]]
    words: list[str] = field(repr=False)
    pieces: int
    fingerprint: str

    def __post_init__(self) -> None:
        check_choice(self.kind, KINDS, "DecodingGraph.kind")
        check_choice(self.topology, TOPOLOGIES, "DecodingGraph.topology")
        check(len(self.source) > 0, "DecodingGraph", "have an arc at least", 0)
        check(self.outputs[:1] == [()], "DecodingGraph.outputs", "begin with an empty one", self.outputs[:1])

    def check_tokens(self, tokens: AcousticTokens, name: str = "the decoding graph") -> None:
        """Raise ValueError, with the remedy, unless the graph was made for these acoustic pieces."""
        again = "make it again for this acoustic model (job make-graph, stage graph of the recipe)"
        rule = f"be over {tokens.size} acoustic pieces; {again}"
        check(self.pieces == tokens.size, name, rule, self.pieces)
        wanted = tokens.fingerprint()
        rule = f"be made for the acoustic pieces with the hash {wanted[:12]}; {again}"
        check(self.fingerprint == wanted, name, rule, self.fingerprint[:12])

    def labels(self, tokens: AcousticTokens) -> Labels:
        """Return the vocabulary of the output labels: the acoustic pieces for H, else words."""
        return tokens if self.kind == "H" else WordTokens(self.words, self.outputs)


class WordTokens:
    """The output labels of a graph as a vocabulary for word fusions: each id stands for whole words.

    After determinization one arc can have two words. The interface is that of `AcousticTokens` as far as
    fusions use it.

    Args:
        words: text of word id 1, 2, ...
        outputs: word ids of each output label.

    Attributes:
        pieces: the text of every output label.
    """

    def __init__(self, words: Sequence[str], outputs: Sequence[tuple[int, ...]]) -> None:
        texts = ["", *words]
        self.outputs = list(outputs)
        self.size, self.blank_id, self.sos_eos_id = len(self.outputs), 0, None
        self.starts_word = [True] * self.size
        self._words = [tuple(texts[word] for word in output) for output in self.outputs]
        self.pieces = [" ".join(words) for words in self._words]
        self._fingerprint = hashlib.sha1("\n".join(texts).encode("utf-8")).hexdigest()

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> WordTokens:
        """Return the vocabulary whose ``pieces`` are these texts."""
        words = list(dict.fromkeys(word for text in texts for word in text.split()))
        ids = {word: index for index, word in enumerate(words, 1)}
        return cls(words, [tuple(ids[word] for word in text.split()) for text in texts])

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return the words of output labels."""
        return [word for label in ids for word in self._words[label]]

    def fingerprint(self) -> str:
        """Return a hash of the words."""
        return self._fingerprint


#: The vocabulary of the output labels of a graph.
Labels = Union[AcousticTokens, WordTokens]


def outputs_of(labels: Labels) -> Sequence[tuple[int, ...]]:
    """Return the ids of words or pieces that each output label stands for; label 0 for none."""
    if isinstance(labels, WordTokens):
        return labels.outputs
    return [(), *((piece,) for piece in range(1, labels.size))]


def save_graph(path: PathLike, graph: DecodingGraph) -> None:
    """Write a graph to ``.npz``; whole or not at all."""
    head = {name: getattr(graph, name) for name in ("kind", "topology", "pieces", "fingerprint")}
    arrays = {name: getattr(graph, name).cpu().numpy() for name in _ARRAYS}
    arrays["words"] = text_array("\n".join(graph.words))
    arrays["outputs"] = np.array([word for output in graph.outputs for word in output], np.int32)
    arrays["output_splits"] = np.cumsum([0, *map(len, graph.outputs)]).astype(np.int64)
    write_npz(path, head, arrays)


def load_graph(path: PathLike) -> DecodingGraph:
    """Read a graph.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no graph, or one of an older format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no decoding graph at {path} (the job make-graph makes one)")
    with open_npz(path, "a decoding graph") as (head, arrays):
        text = array_text(arrays["words"])
        splits, values = arrays["output_splits"].tolist(), arrays["outputs"].tolist()
        outputs = [tuple(values[begin:end]) for begin, end in zip(splits, splits[1:])]
        tensors = {name: torch.from_numpy(arrays[name]) for name in _ARRAYS}
        return DecodingGraph(outputs=outputs, words=text.split("\n") if text else [], **tensors, **head)
