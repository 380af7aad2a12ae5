"""Decoding graphs as plain tensors: arcs, the pieces and words that they say, in a file of their own.
Knows: tensors, .npz files, acoustic pieces. Must not know: k2, log-probs, searches, how a graph was made.

A graph file carries the hash of the acoustic pieces that it was made for: under others it is refused.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence, Union

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import PathLike, atomic_path
from icefall_fusion.text.tokens import AcousticTokens

KINDS = ("H", "HL", "HLG", "G")
TOPOLOGIES = ("standard", "modified")
_ARRAYS = ("source", "target", "label", "piece", "saying", "score")
_FORMAT = 1


@dataclass(frozen=True)
class DecodingGraph:
    """A weighted transducer from pieces heard in frames to words; A arcs, the final state is the last.

    Args:
        kind: H, HL, HLG, or G (an n-gram over words, for rescoring: ``label`` is then a word).
        topology: of CTC: standard (a blank between equal pieces) or modified (none needed).
        source, target: [A] int32 states; arcs are sorted by source, then label.
        label: [A] int32 piece heard (0 is blank), -1 into the final state.
        piece: [A] int32 piece that begins here, 0 for none (blank, or a piece that goes on).
        saying: [A] int32 what is said here: an index into ``sayings``.
        score: [A] float32 natural-log score of the graph (0 without a language model).
        sayings: what arcs say: tuples of word ids (of pieces, for H); the first is empty.
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
    saying: Tensor
    score: Tensor
    sayings: list[tuple[int, ...]]
    words: list[str] = field(repr=False)
    pieces: int
    fingerprint: str

    def __post_init__(self) -> None:
        check_choice(self.kind, KINDS, "DecodingGraph.kind")
        check_choice(self.topology, TOPOLOGIES, "DecodingGraph.topology")
        check(len(self.source) > 0, "DecodingGraph", "have an arc at least", 0)
        check(self.sayings[:1] == [()], "DecodingGraph.sayings", "begin with an empty one", self.sayings[:1])

    def check_tokens(self, tokens: AcousticTokens, name: str = "the decoding graph") -> None:
        """Raise ValueError, with what to do, unless the graph was made for these acoustic pieces."""
        again = "make it again for this acoustic model (job make-graph, stage graph of the recipe)"
        rule = f"be over {tokens.size} acoustic pieces; {again}"
        check(self.pieces == tokens.size, name, rule, self.pieces)
        wanted = tokens.fingerprint()
        rule = f"be made for the acoustic pieces with the hash {wanted[:12]}; {again}"
        check(self.fingerprint == wanted, name, rule, self.fingerprint[:12])

    def labels(self, tokens: AcousticTokens) -> Union[AcousticTokens, WordTokens]:
        """Return the vocabulary of what arcs say: the acoustic pieces for H, else words."""
        return tokens if self.kind == "H" else WordTokens(self.words, self.sayings)


class WordTokens:
    """What the arcs of a graph say, as a vocabulary for word fusions: each id stands for whole words.

    After determinization one arc can say two words. The interface is that of `AcousticTokens` as far as
    fusions use it.

    Args:
        words: text of word id 1, 2, ...
        sayings: word ids by saying.

    Attributes:
        pieces: the text of every saying.
    """

    def __init__(self, words: Sequence[str], sayings: Sequence[tuple[int, ...]]) -> None:
        texts = ["", *words]
        self.sayings = list(sayings)
        self.size, self.blank_id, self.sos_eos_id = len(self.sayings), 0, None
        self.starts_word = [True] * self.size
        self._words = [tuple(texts[word] for word in saying) for saying in self.sayings]
        self.pieces = [" ".join(words) for words in self._words]
        self._fingerprint = hashlib.sha1("\n".join(texts).encode("utf-8")).hexdigest()

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return the words that sayings hold."""
        return [word for saying in ids for word in self._words[saying]]

    def fingerprint(self) -> str:
        """Return a hash of the words."""
        return self._fingerprint


def save_graph(path: PathLike, graph: DecodingGraph) -> None:
    """Write a graph to ``.npz``; whole or not at all."""
    check(str(path).endswith(".npz"), "path of a graph", "end with .npz", str(path))
    splits = np.cumsum([0, *(len(saying) for saying in graph.sayings)]).astype(np.int64)
    values = np.array([word for saying in graph.sayings for word in saying], np.int32)
    meta = {
        "format": _FORMAT, "kind": graph.kind, "topology": graph.topology, "pieces": graph.pieces,
        "fingerprint": graph.fingerprint,
    }  # fmt: skip
    arrays = {name: getattr(graph, name).cpu().numpy() for name in _ARRAYS}
    words = np.frombuffer("\n".join(graph.words).encode("utf-8"), np.uint8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file, meta=np.array(json.dumps(meta)), words=words, said=values, said_splits=splits, **arrays
        )


def load_graph(path: PathLike) -> DecodingGraph:
    """Read a graph.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is no graph.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no decoding graph at {path} (the job make-graph makes one)")
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta: dict[str, Any] = json.loads(str(arrays["meta"]))
        check(meta.pop("format") == _FORMAT, f"{path}", f"have the format {_FORMAT}; make it again", meta)
        text = arrays["words"].tobytes().decode("utf-8")
        splits, values = arrays["said_splits"].tolist(), arrays["said"].tolist()
        sayings = [tuple(values[begin:end]) for begin, end in zip(splits, splits[1:])]
        tensors = {name: torch.from_numpy(arrays[name]) for name in _ARRAYS}
        return DecodingGraph(sayings=sayings, words=text.split("\n") if text else [], **tensors, **meta)
    except (OSError, KeyError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be loaded as a decoding graph: {error}") from error
