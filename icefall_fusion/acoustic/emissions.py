"""A batch of CTC log-probs, and log-probs kept in files.
Knows: tensors, a vocabulary, .npz files. Must not know: acoustic models, search, fusion, manifests.
"""
from __future__ import annotations

import contextlib
import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path
from icefall_fusion.text.tokens import AcousticTokens

_META = "__emissions__"


@dataclass
class Emissions:
    """CTC log-probs of a batch.

    Args:
        ids: utterance ids.
        log_probs: [B,T,V] natural-log; rows beyond ``lens`` mean nothing.
        lens: [B] frames of each utterance.
        tokens: the vocabulary, V pieces.
        frame_shift: seconds a frame.
        encoder_out: [B,T,D], for an attention decoder; None when there is none.

    Raises:
        ValueError: shapes or the vocabulary do not fit, or an utterance (named) has NaN or +inf.
    """

    ids: list[str]
    log_probs: Tensor
    lens: Tensor
    tokens: AcousticTokens
    frame_shift: float
    encoder_out: Optional[Tensor] = None

    def __post_init__(self) -> None:
        check(self.log_probs.dim() == 3, "log_probs", "be [B,T,V]", tuple(self.log_probs.shape))
        batch, frames, pieces = self.log_probs.shape
        check(len(self.ids) == batch == len(self.lens), "ids and lens", f"have {batch} rows",
              (len(self.ids), len(self.lens)))  # fmt: skip
        if pieces != self.tokens.size:
            raise ValueError(f"the vocabulary has {self.tokens.size} pieces, but the log-probs have {pieces}")
        check(bool((self.lens <= frames).all()), "lens", f"be at most T = {frames}", self.lens.tolist())
        inside = torch.arange(frames)[None] < self.lens.cpu()[:, None]
        highest = self.log_probs.amax(dim=2).cpu() if frames else torch.zeros(batch, 0)
        bad = (inside & ~(highest < math.inf)).any(dim=1)  # NaN wins amax and fails the comparison
        if bool(bad.any()):
            raise ValueError(f"log_probs must not hold NaN or +inf, but utterance "
                             f"{self.ids[int(bad.int().argmax())]} does")  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: Sequence[int]) -> Emissions:
        """Return some utterances, without frames that only others had."""
        index = torch.tensor(list(rows), dtype=torch.long)
        lens = self.lens[index.to(self.lens.device)]
        length = int(lens.max()) if len(rows) else 0
        at = index.to(self.log_probs.device)
        out = None if self.encoder_out is None else self.encoder_out[at, :length]
        ids = [self.ids[row] for row in rows]
        return Emissions(ids, self.log_probs[at, :length], lens, self.tokens, self.frame_shift, out)


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return rows [n,...] of different lengths as one float32 tensor [B,T,...] and their lengths."""
    lens = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return torch.nn.utils.rnn.pad_sequence([row.float() for row in rows], batch_first=True), lens


def scatter_rows(rows: Sequence[int], values: Tensor, batch: int) -> Tensor:
    """Put ``values`` [n,T,...] into rows of a zero tensor [batch,T,...]."""
    if len(rows) == batch:
        return values
    out = values.new_zeros((batch, *values.shape[1:]))
    out[torch.tensor(list(rows), device=values.device)] = values
    return out


def no_frames(ids: Sequence[str], tokens: AcousticTokens, frame_shift: float) -> Emissions:
    """Return emissions of utterances none of which has a frame."""
    lens = torch.zeros(len(ids), dtype=torch.long)
    return Emissions(list(ids), torch.zeros(len(ids), 0, tokens.size), lens, tokens, frame_shift)


# --- saved log-probs ----------------------------------------------------------------------------------


class _Part(NamedTuple):
    """Where the log-probs of one part of an utterance are; of how many parts it is one (mostly 1)."""

    archive: Any
    member: str
    count: int
    file: Path


class SavedSource:
    """Log-probs from ``.npz`` files: an array [T,V] (float16 or float32) for each utterance id.

    What was decoded in parts was saved in parts (``id``, ``id#1``, ``id#2``, ...), maybe in several files,
    each of which says whose parts it holds; they are joined again.

    Args:
        path: a file, or a folder of them.
        tokens: the vocabulary that they were made with.
        device: where to put them.
        frame_shift: seconds a frame; 0 takes what the files say, else 0.04.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: a file is broken or was made with another vocabulary, or two files have the same utterance
            (they are of several runs).
    """

    wants = "nothing"
    sample_rate = 16000
    model = network = None

    def __init__(
        self, path: PathLike, tokens: AcousticTokens, device: str = "cpu", frame_shift: float = 0.0
    ) -> None:
        path = Path(path)
        files = sorted(path.glob("[!.]*.npz")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"there are no saved log-probs (.npz) at {str(path)!r}")
        self.tokens = tokens
        self.frame_shift = frame_shift
        self._parts: dict[str, dict[int, _Part]] = {}  # by utterance and number of the part
        for file in files:
            self._add(file)
        self.frame_shift = self.frame_shift or 0.04
        self.device = torch.device(device)

    @property
    def ids(self) -> list[str]:
        """All utterances, in the order of the files."""
        return list(self._parts)

    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor] = ()) -> Emissions:
        missing = [name for name in ids if name not in self._parts]
        if missing:
            raise ValueError(f"the saved log-probs must hold every utterance, but lack {missing[:3]}")
        padded, lens = pad_rows([torch.from_numpy(self._whole(name)) for name in ids])
        return Emissions(list(ids), padded.to(self.device), lens, self.tokens, self.frame_shift)

    def _add(self, file: Path) -> None:
        """Note what a file holds; its arrays are read when asked for."""
        with _reading(file):
            archive = np.load(file)
            members = [member for member in archive.files if member != _META]
            meta = json.loads(str(archive[_META])) if _META in archive.files else {}
        if meta.get("fingerprint", self.tokens.fingerprint()) != self.tokens.fingerprint():
            raise ValueError(f"the log-probs in {str(file)!r} were made with another vocabulary than given")
        unclear = [member for member in members if "#" in member and meta and "parts" not in meta]
        rule = "say which are parts of an utterance (it is old: save it again)"
        check(not unclear, f"{file}", rule, unclear)
        self.frame_shift = self.frame_shift or meta.get("frame_shift", 0.0)
        for member in members:
            name, number, count = meta.get("parts", {}).get(member, (member, 0, 1))
            known = self._parts.setdefault(name, {})
            if number in known:
                raise ValueError(
                    f"saved log-probs must be of one run, but {member!r} is in {str(known[number].file)!r} "
                    f"and in {str(file)!r}; save each run into a folder of its own"
                )
            known[number] = _Part(archive, member, count, file)

    def _whole(self, name: str) -> np.ndarray:
        """Return the log-probs [T,V] float32 of an utterance, its parts joined."""
        parts = [part for _, part in sorted(self._parts[name].items())]
        counts = sorted({part.count for part in parts})
        if counts != [len(parts)]:
            raise ValueError(
                f"the saved log-probs of {name!r} must be all parts of one run, but parts "
                f"{sorted(self._parts[name])} of {' or '.join(map(str, counts))} are there"
            )
        arrays = []
        for part in parts:
            with _reading(part.file):
                arrays.append(np.asarray(part.archive[part.member], dtype=np.float32))
            check(arrays[-1].ndim == 2, f"saved log-probs of {name}", "be [T,V]", arrays[-1].shape)
            if arrays[-1].shape[1] != self.tokens.size:
                raise ValueError(f"the vocabulary has {self.tokens.size} pieces, but the log-probs of {name} "
                                 f"have {arrays[-1].shape[1]}")  # fmt: skip
        return np.concatenate(arrays)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what numpy says of a broken archive into one ValueError that names the file."""
    try:
        yield
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} cannot be loaded as saved log-probs: {error}") from error


def save_emissions(
    path: PathLike,
    emissions: Emissions,
    half: bool = False,
    parts: Sequence[tuple[str, int, int]] = (),
) -> None:
    """Write one ``.npz`` of log-probs that ``SavedSource`` reads back; whole or not at all.

    Args:
        path: ends with ``.npz``.
        emissions: what to write.
        half: as float16 (half the size; log-probs below -65504 become -inf, others keep three digits).
        parts: of each row: its utterance, which part of that it is (from 0), how many parts there are; none:
            each row is an utterance.
    """
    check(str(path).endswith(".npz"), "path", "end with .npz", str(path))
    check(len(set(emissions.ids)) == len(emissions), "ids", "differ in a file", emissions.ids)
    check(len(parts) in (0, len(emissions)), "parts", f"be as many as {len(emissions)} rows", len(parts))
    kind = np.float16 if half else np.float32
    rows = zip(emissions.ids, emissions.log_probs.cpu(), emissions.lens.tolist())
    arrays = {name: row[:frames].numpy().astype(kind) for name, row, frames in rows}
    meta = {
        "fingerprint": emissions.tokens.fingerprint(),
        "frame_shift": emissions.frame_shift,
        "parts": {name: part for name, part in zip(emissions.ids, parts) if part[2] > 1},
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{_META: np.array(json.dumps(meta))}, **arrays)
