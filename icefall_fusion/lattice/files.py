"""Lattices and lists of their paths in files: one environment makes them, another one decodes them.
Knows: plain lattices, N-best lists, .npz files. Must not know: k2, language models, methods.
"""

from __future__ import annotations

import json
import logging
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import numpy as np
import torch

from icefall_fusion.acoustic.emissions import Emissions
from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path
from icefall_fusion.lattice.graph import WordTokens
from icefall_fusion.lattice.value import Lattices, join
from icefall_fusion.nbest import NBest, to_json
from icefall_fusion.text.tokens import AcousticTokens


def save_lattices(
    path: PathLike,
    lattices: Lattices,
    lists: Mapping[str, Sequence[NBest]],
    labels: Any,
    tokens: AcousticTokens,
    seconds: Mapping[str, float],
    counters: Mapping[str, float],
) -> None:
    """Write the lattices and lists of a batch to ``.npz``; whole or not at all.

    Args:
        path: ends with ``.npz``.
        lattices: of the batch.
        lists: by kind (``nbest``, ``whole``).
        labels: vocabulary of what arcs say.
        tokens: the acoustic pieces.
        seconds: that ``lattices`` and each kind of lists took.
        counters: of this batch.
    """
    said = getattr(labels, "sayings", None)
    texts = None if said is None else [" ".join(labels.words([i])) for i in range(labels.size)]
    meta = {
        "ids": lattices.ids, "fingerprint": tokens.fingerprint(), "lists": sorted(lists),
        "seconds": dict(seconds), "counters": dict(counters), "sayings": texts,
    }  # fmt: skip
    arrays = {name: _small(values.cpu().numpy()) for name, values in lattices.arcs().items()}
    lines = {
        f"list_{kind}": _bytes("\n".join(to_json(nbest.as_plain()) for nbest in nbests))
        for kind, nbests in lists.items()
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        head = {"meta": _bytes(json.dumps(meta, ensure_ascii=False))}
        head.update(lens=lattices.lens.numpy(), bounds=lattices.bounds.numpy())
        np.savez_compressed(file, **head, **arrays, **lines)


def _small(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32) if values.dtype == np.int64 else values


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8)


class SavedLattices:
    """Lattices from the files of the job make-lattices.

    Args:
        folder: of the files.
        tokens: the acoustic pieces.
        device: where they are wanted.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is broken or was made for other acoustic pieces, or two hold the same utterance.
    """

    def __init__(self, folder: PathLike, tokens: AcousticTokens, device: torch.device) -> None:
        self.device, self.folder = device, Path(folder)
        self._files: dict[str, tuple[Path, int]] = {}
        self._open: tuple[Optional[Path], dict[str, Any]] = (None, {})
        sayings: Optional[list[str]] = None
        for number, path in enumerate(_files_of(folder)):
            meta = self._read(path)["meta"]
            rule = (
                f"be made for the acoustic pieces with the hash {tokens.fingerprint()[:12]}: make them again"
            )
            check(meta["fingerprint"] == tokens.fingerprint(), f"{path}", rule, meta["fingerprint"][:12])
            check(
                number == 0 or sayings == meta["sayings"],
                f"{path}",
                "be of one graph with the others",
                "another",
            )
            sayings = meta["sayings"]
            for row, name in enumerate(meta["ids"]):
                check(name not in self._files, f"{path}", "hold other utterances than the others", name)
                self._files[name] = (path, row)
        self.labels: Any = tokens if sayings is None else _labels_of(sayings)
        self.counters: dict[str, float] = {"lattice_arcs": 0, "lattice_frames": 0, "lattice_seconds": 0.0}

    @classmethod
    def read_meta(cls, folder: PathLike) -> dict[str, Any]:
        """Return what the first file says of itself."""
        return _load(_files_of(folder)[0])["meta"]

    def lattices(self, emissions: Emissions) -> Lattices:
        lattices = []
        for name in emissions.ids:
            archive, row = self._find(name)
            lattices.append(archive["lattices"].select([row]))
            frames = int(emissions.lens[len(lattices) - 1])
            rule = f"be of the same log-probs ({frames} frames); make them again"
            check(int(lattices[-1].lens) == frames, f"the lattice of {name}", rule, int(lattices[-1].lens))
            self._count(archive, row)
        return join(lattices).to(self.device)

    def lists(self, emissions: Emissions, kind: str) -> list[NBest]:
        lists = []
        for name in emissions.ids:
            archive, row = self._find(name)
            has = archive["meta"]["lists"]
            check(
                kind in has,
                f"the lattices of {self.folder}",
                f"have {kind!r} lists: make them with an n-gram",
                has,
            )
            lists.append(archive[kind][row])
            self._count(archive, row, kind)
        return lists

    def _count(self, archive: Mapping[str, Any], row: int, *lists: str) -> None:
        lattices, meta = archive["lattices"], archive["meta"]
        self.counters["lattice_arcs"] += int(lattices.counts[row])
        self.counters["lattice_frames"] += int(lattices.lens[row])
        seconds = sum(meta["seconds"][name] for name in ("lattices", *lists))
        self.counters["lattice_seconds"] += seconds / len(meta["ids"])

    def _find(self, name: str) -> tuple[dict[str, Any], int]:
        if name not in self._files:
            raise ValueError(
                f"the saved lattices in {str(self.folder)!r} must hold every utterance, but lack {name!r}: "
                "make them from this test set's log-probs"
            )
        path, row = self._files[name]
        return self._read(path), row

    def _read(self, path: Path) -> dict[str, Any]:
        if self._open[0] != path:
            self._open = (path, _load(path))
        return self._open[1]


def _files_of(folder: PathLike) -> list[Path]:
    files = sorted(Path(folder).rglob("lattices-*.npz"))
    if not files:
        raise FileNotFoundError(
            f"there are no lattices (lattices-*.npz) in {folder}: the job make-lattices makes them"
        )
    return files


def _load(path: Path) -> dict[str, Any]:
    try:
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(arrays.pop("meta").tobytes().decode("utf-8"))
        found: dict[str, Any] = {"meta": meta}
        for kind in meta["lists"]:
            text = arrays.pop(f"list_{kind}").tobytes().decode("utf-8")
            found[kind] = [NBest.from_plain(json.loads(line)) for line in text.split("\n")]
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        found["lattices"] = Lattices(meta["ids"], **{
            name: values.long() if values.dtype == torch.int32 else values for name, values in tensors.items()
        })  # fmt: skip
        return found
    except (OSError, KeyError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be loaded as saved lattices: {error!r}") from error


def _labels_of(sayings: Sequence[str]) -> WordTokens:
    """Return the vocabulary of sayings that were saved as texts."""
    words = list(dict.fromkeys(word for text in sayings for word in text.split()))
    numbers = {word: index for index, word in enumerate(words, 1)}
    return WordTokens(words, [tuple(numbers[word] for word in text.split()) for text in sayings])


def write_folder(
    source: Any, batches: Sequence[Sequence[str]], emit: Any, out: PathLike, kinds: Sequence[str]
) -> dict[str, float]:
    """Make and write lattices and lists of batches of utterances; return the counters.

    Args:
        source: k2's.
        batches: utterance ids.
        emit: from ids to emissions.
        out: the folder; batches whose file is there are left as they are.
        kinds: of lists.
    """
    for number, ids in enumerate(batches):
        path = Path(out) / f"lattices-{number:05d}.npz"
        if path.is_file():
            continue
        emissions, before, seconds = emit(ids), dict(source.counters), {}
        begun = time.perf_counter()
        fsas, plain = source.make(emissions)
        seconds["lattices"] = time.perf_counter() - begun
        lists = {}
        for kind in kinds:
            begun = time.perf_counter()
            lists[kind] = source.lists_of(fsas, plain, emissions, kind)
            seconds[kind] = time.perf_counter() - begun
        counters = {name: value - before[name] for name, value in source.counters.items()}
        save_lattices(path, plain, lists, source.labels, source.tokens, seconds, counters)
        logging.info("%s: %d utterances, %.0f arcs a frame, %s", path, len(ids), plain.density(),
                     {name: round(value, 2) for name, value in seconds.items()})  # fmt: skip
    return dict(source.counters)
