"""Log-probs in files, and their vocabulary beside them.
Knows: emissions, .npz files, vocabularies. Must not know: acoustic models, search, fusion, manifests.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.acoustic.emissions import Emissions, pad_rows
from icefall_fusion.acoustic.loading import loading
from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path, write_json
from icefall_fusion.text.tokens import AcousticTokens

_META = "__emissions__"
_KIND = "saved log-probs"
_BPE, _PIECES = "bpe.model", "vocabulary.json"


class _Stored(NamedTuple):
    """The array of one segment of an utterance; ``count`` is the number of its segments (mostly 1)."""

    archive: Any
    member: str
    count: int
    file: Path


class SavedSource:
    """Log-probs from ``.npz`` files: an array [T,V] (float16 or float32) for each utterance id.

    The segments of a long utterance are saved one by one (``id``, ``id#1``, ``id#2``, ...), maybe in several
    files. Each file names the utterances of its segments; they are joined again.

    Args:
        path: a file, or a folder of them.
        tokens: the vocabulary of the log-probs.
        device: of the returned log-probs.
        frame_shift: seconds a frame; 0: that of the files, or 0.04 if they have none.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: a file is broken or of another vocabulary, or two files have the same utterance, as those
            of several runs do.
    """

    wants = "nothing"
    model = transducer = None
    has_ctc = True

    def __init__(
        self, path: PathLike, tokens: AcousticTokens, device: str = "cpu", frame_shift: float = 0.0
    ) -> None:
        path = Path(path)
        files = sorted(path.glob("[!.]*.npz")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"there are no saved log-probs (.npz) at {str(path)!r}")
        self.tokens = tokens
        self.frame_shift = frame_shift
        self._segments: dict[str, dict[int, _Stored]] = {}  # by utterance and number of the segment
        for file in files:
            self._add(file)
        self.frame_shift = self.frame_shift or 0.04
        self.device = torch.device(device)

    @property
    def ids(self) -> list[str]:
        """All utterances, in the order of the files."""
        return list(self._segments)

    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor] = ()) -> Emissions:
        missing = [name for name in ids if name not in self._segments]
        if missing:
            raise ValueError(f"the saved log-probs must hold every utterance, but lack {missing[:3]}")
        padded, lens = pad_rows([torch.from_numpy(self._whole(name)) for name in ids])
        return Emissions(list(ids), padded.to(self.device), lens, self.tokens, self.frame_shift)

    def _add(self, file: Path) -> None:
        """Index a file; its arrays are read by `emit`."""
        with loading(file, _KIND):
            archive = np.load(file)
            members = [member for member in archive.files if member != _META]
            meta = json.loads(str(archive[_META])) if _META in archive.files else {}
        if meta.get("fingerprint", self.tokens.fingerprint()) != self.tokens.fingerprint():
            raise ValueError(f"the log-probs in {str(file)!r} were made with another vocabulary")
        unclear = [member for member in members if "#" in member and meta and "parts" not in meta]
        rule = "say which are segments of an utterance (it is old: save it again)"
        check(not unclear, f"{file}", rule, unclear)
        self.frame_shift = self.frame_shift or meta.get("frame_shift", 0.0)
        for member in members:
            name, number, count = meta.get("parts", {}).get(member, (member, 0, 1))
            known = self._segments.setdefault(name, {})
            if number in known:
                raise ValueError(
                    f"saved log-probs must be of one run, but {member!r} is in {str(known[number].file)!r} "
                    f"and in {str(file)!r}; save each run into a folder of its own"
                )
            known[number] = _Stored(archive, member, count, file)

    def _whole(self, name: str) -> np.ndarray:
        """Return the log-probs [T,V] float32 of an utterance, its segments joined."""
        segments = [segment for _, segment in sorted(self._segments[name].items())]
        counts = sorted({segment.count for segment in segments})
        if counts != [len(segments)]:
            raise ValueError(
                f"the saved log-probs of {name!r} must be all segments of one run, but segments "
                f"{sorted(self._segments[name])} of {' or '.join(map(str, counts))} are there"
            )
        arrays = []
        for segment in segments:
            with loading(segment.file, _KIND):
                arrays.append(np.asarray(segment.archive[segment.member], dtype=np.float32))
            check(arrays[-1].ndim == 2, f"saved log-probs of {name}", "be [T,V]", arrays[-1].shape)
            pieces = arrays[-1].shape[1]
            if pieces != self.tokens.size:
                has = f"the vocabulary has {self.tokens.size} pieces"
                raise ValueError(f"{has}, but the log-probs of {name} have {pieces}")
        return np.concatenate(arrays)


def save_emissions(
    path: PathLike,
    emissions: Emissions,
    half: bool = False,
    segments: Sequence[tuple[str, int, int]] = (),
) -> None:
    """Write log-probs to one ``.npz`` file that ``SavedSource`` reads. A failed write leaves no file.

    Args:
        path: ends with ``.npz``.
        emissions: the log-probs.
        half: as float16 (half the size; log-probs below -65504 become -inf, others keep three digits).
        segments: for each row its utterance, the number of the segment (from 0) and the count of the
            utterance's segments; empty: each row is an utterance.
    """
    check(str(path).endswith(".npz"), "path", "end with .npz", str(path))
    check(len(set(emissions.ids)) == len(emissions), "ids", "differ in a file", emissions.ids)
    rule = f"be as many as {len(emissions)} rows"
    check(len(segments) in (0, len(emissions)), "segments", rule, len(segments))
    kind = np.float16 if half else np.float32
    rows = zip(emissions.ids, emissions.log_probs.cpu(), emissions.lens.tolist())
    arrays = {name: row[:frames].numpy().astype(kind) for name, row, frames in rows}
    meta = {
        "fingerprint": emissions.tokens.fingerprint(),
        "frame_shift": emissions.frame_shift,
        "parts": {name: segment for name, segment in zip(emissions.ids, segments) if segment[2] > 1},
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{_META: np.array(json.dumps(meta))}, **arrays)


def save_vocabulary(folder: PathLike, tokens: AcousticTokens) -> None:
    """Write a vocabulary beside saved log-probs: ``bpe.model``, or ``vocabulary.json`` of plain pieces."""
    folder = Path(folder)
    if tokens.processor is not None:
        with atomic_path(folder / _BPE) as temporary:
            temporary.write_bytes(tokens.processor.serialized_model_proto())
        return
    names = ("pieces", "blank_id", "word_start", "delimiter")
    write_json(folder / _PIECES, {name: getattr(tokens, name) for name in names})


def read_vocabulary(path: PathLike) -> AcousticTokens:
    """Return the vocabulary beside saved log-probs.

    Args:
        path: a ``.npz`` file, or a folder of them.

    Raises:
        FileNotFoundError: there is none. ValueError: it is broken.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if (folder / _BPE).is_file():
        return AcousticTokens.load(folder)
    if not (folder / _PIECES).is_file():
        raise FileNotFoundError(
            f"EmissionOptions.tokens must name a bpe.model, for there is none beside {str(path)!r}"
        )
    with loading(folder / _PIECES, "a vocabulary"):
        return AcousticTokens.from_pieces(**json.loads((folder / _PIECES).read_text(encoding="utf-8")))
