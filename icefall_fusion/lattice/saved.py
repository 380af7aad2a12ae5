"""Lattices and lists of their paths in files: one environment makes them, another one decodes them.
Knows: plain lattices, N-best lists, their files. Must not know: k2, language models, methods.
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Mapping, MutableMapping, NamedTuple, Sequence

import numpy as np
import torch

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check
from icefall_fusion.common.counters import add_counters
from icefall_fusion.common.files import PathLike
from icefall_fusion.lattice.graph import Labels, WordTokens
from icefall_fusion.lattice.lattices import Lattices, join
from icefall_fusion.lattice.npz import array_text, open_npz, text_array, write_npz
from icefall_fusion.nbest import NBest, to_json
from icefall_fusion.text.tokens import AcousticTokens

_NAME = "saved lattices"  # in messages
_KEPT = 4  # files in memory: those of a batch, which all methods read in turn


def save_lattices(
    path: PathLike, lattices: Lattices, lists: Mapping[str, Sequence[NBest]], labels: Labels,
    tokens: AcousticTokens, seconds: Mapping[str, float],
) -> None:
    """Write the lattices and lists of a batch to ``.npz``; whole or not at all.

    Args:
        path: ends with ``.npz``.
        lattices: of the batch.
        lists: by kind (``nbest``, ``whole``).
        labels: vocabulary of the output labels.
        tokens: the acoustic pieces.
        seconds: that ``lattices`` and each kind of lists took.
    """
    outputs = "\n".join(labels.pieces) if isinstance(labels, WordTokens) else ""
    head = {
        "ids": lattices.ids, "fingerprint": tokens.fingerprint(), "lists": sorted(lists),
        "seconds": dict(seconds), "outputs": hashlib.sha1(outputs.encode("utf-8")).hexdigest(),
    }
    arrays = {name: _small(values.cpu().numpy()) for name, values in lattices.arcs().items()}
    arrays.update(lens=lattices.lens.numpy(), bounds=lattices.bounds.numpy(), outputs=text_array(outputs))
    for kind, nbests in lists.items():
        arrays[f"list_{kind}"] = text_array("\n".join(to_json(nbest.as_plain()) for nbest in nbests))
    write_npz(path, head, arrays, compress=True)


def _small(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32) if values.dtype == np.int64 else values


class _File(NamedTuple):
    """A file of lattices, read whole."""

    lattices: Lattices
    lists: dict[str, list[NBest]]
    seconds: dict[str, float]


class SavedLattices:
    """Lattices from the files of the job make-lattices.

    Args:
        folder: of the files. Their heads are read here, a whole file when one of its utterances is needed.
        tokens: the acoustic pieces.
        device: of the lattices that are returned.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is broken, of an older format, or was made for other acoustic pieces; or two hold
            the same utterance.
    """

    def __init__(self, folder: PathLike, tokens: AcousticTokens, device: torch.device) -> None:
        self.device, self.folder = device, Path(folder)
        self._rows: dict[str, tuple[Path, int]] = {}
        self._files: dict[Path, _File] = {}  # those read last
        paths = _files_of(folder)
        with open_npz(paths[0], _NAME) as (head, arrays):
            wanted, outputs = head["outputs"], array_text(arrays["outputs"])
        pieces = tokens.fingerprint()
        for path in paths:
            head = _read_head(path)
            rule = f"be made for the acoustic pieces with the hash {pieces[:12]}: make them again"
            check(head["fingerprint"] == pieces, f"{path}", rule, head["fingerprint"][:12])
            rule = f"be of the graph of {paths[0]}, with the output labels {wanted[:12]}"
            check(head["outputs"] == wanted, f"{path}", rule, head["outputs"][:12])
            for row, name in enumerate(head["ids"]):
                check(name not in self._rows, f"{path}", "hold other utterances than the others", name)
                self._rows[name] = (path, row)
        self.labels: Labels = WordTokens.from_texts(outputs.split("\n")) if outputs else tokens

    def lattices(self, emissions: Emissions, counters: MutableMapping[str, float]) -> Lattices:
        """Return the lattices of a batch."""
        lattices = []
        for name, frames in zip(emissions.ids, emissions.lens.tolist()):
            file, row = self._find(name, counters)
            lattices.append(file.lattices.select([row]))
            rule = f"be of the same log-probs ({frames} frames); make them again"
            check(int(lattices[-1].lens) == frames, f"the lattice of {name}", rule, int(lattices[-1].lens))
        return join(lattices).to(self.device)

    def lists(
        self, emissions: Emissions, kind: str, counters: MutableMapping[str, float]
    ) -> list[NBest]:
        """Return lists of paths of a batch."""
        nbests = []
        for name in emissions.ids:
            file, row = self._find(name, counters, kind)
            nbests.append(file.lists[kind][row])
        return nbests

    def _find(
        self, name: str, counters: MutableMapping[str, float], *kinds: str
    ) -> tuple[_File, int]:
        """Return the file and row of an utterance; count its arcs and its share of the seconds.

        Args:
            kinds: of lists that are needed too.
        """
        if name not in self._rows:
            raise ValueError(
                f"the saved lattices in {str(self.folder)!r} must hold every utterance, but lack {name!r}: "
                "make them from this test set's log-probs"
            )
        path, row = self._rows[name]
        if path not in self._files:
            if len(self._files) == _KEPT:
                del self._files[next(iter(self._files))]
            self._files[path] = _read(path)
        file = self._files[path]
        for kind in kinds:
            rule = f"have {kind!r} lists: make them with an n-gram"
            check(kind in file.lists, f"the lattices of {self.folder}", rule, sorted(file.lists))
        seconds = sum(file.seconds[step] for step in ("lattices", *kinds)) / len(file.lattices)
        frames, arcs = int(file.lattices.lens[row]), int(file.lattices.counts[row])
        more = {"lattice_arcs": arcs, "lattice_frames": frames, "lattice_seconds": seconds}
        add_counters(counters, more)
        return file, row


def list_kinds(folder: PathLike) -> list[str]:
    """Return the kinds of lists that the files of a folder have."""
    return _read_head(_files_of(folder)[0])["lists"]


def _files_of(folder: PathLike) -> list[Path]:
    files = sorted(Path(folder).rglob("lattices-*.npz"))
    if not files:
        raise FileNotFoundError(
            f"there are no lattices (lattices-*.npz) in {folder}: the job make-lattices makes them"
        )
    return files


def _read_head(path: Path) -> dict[str, Any]:
    with open_npz(path, _NAME) as (head, _):
        return head


def _read(path: Path) -> _File:
    with open_npz(path, _NAME) as (head, arrays):
        lists = {}
        for kind in head["lists"]:
            lines = array_text(arrays[f"list_{kind}"]).split("\n")
            lists[kind] = [NBest.from_plain(json.loads(line)) for line in lines]
        names = [field.name for field in fields(Lattices) if field.name != "ids"]
        tensors = {name: torch.from_numpy(arrays[name]) for name in names}
        whole = {name: x.long() if x.dtype == torch.int32 else x for name, x in tensors.items()}
        return _File(Lattices(head["ids"], **whole), lists, head["seconds"])
