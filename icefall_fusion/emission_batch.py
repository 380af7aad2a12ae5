"""A batch of CTC log-probs, and log-probs kept in files.
Knows: tensors, a vocabulary, .npz files. Must not know: acoustic models, search, fusion, manifests.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.checks import check
from icefall_fusion.files import PathLike, atomic_path
from icefall_fusion.tokens import AcousticTokens

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


class SavedSource:
    """Log-probs from ``.npz`` files: an array [T,V] (float16 or float32) for each utterance id.

    What was decoded in parts was saved in parts (``id``, ``id#1``, ``id#2``, ...), which are joined again.

    Args:
        path: a file, or a folder of them.
        tokens: the vocabulary that they were made with.
        device: where to put them.
        frame_shift: seconds a frame; 0 takes what the files say, else 0.04.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: they were made with another vocabulary.
    """

    wants = "nothing"
    sample_rate = 16000
    model = None

    def __init__(
        self, path: PathLike, tokens: AcousticTokens, device: str = "cpu", frame_shift: float = 0.0
    ) -> None:
        path = Path(path)
        files = sorted(path.glob("[!.]*.npz")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileNotFoundError(f"there are no saved log-probs (.npz) at {str(path)!r}")
        self.tokens = tokens
        self._archives = [np.load(file) for file in files]  # members are read when asked for
        self._where = {name: archive for archive in self._archives for name in archive.files}
        meta = json.loads(str(self._archives[0][_META])) if _META in self._where else {}
        wanted = meta.get("fingerprint", self.tokens.fingerprint())
        if wanted != self.tokens.fingerprint():
            raise ValueError(f"the log-probs in {str(path)!r} were made with another vocabulary than given")
        self.frame_shift = frame_shift or meta.get("frame_shift", 0.04)
        self.device = torch.device(device)

    @property
    def ids(self) -> list[str]:
        """All utterances, in the order of the files."""
        return [name for name in self._where if name != _META]

    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor] = ()) -> Emissions:
        missing = [name for name in ids if name not in self._where]
        if missing:
            raise ValueError(f"the saved log-probs must hold every utterance, but lack {missing[:3]}")
        arrays = [self._whole(name) for name in ids]
        for name, array in zip(ids, arrays):
            check(array.ndim == 2, f"saved log-probs of {name}", "be [T,V]", array.shape)
            if array.shape[1] != self.tokens.size:
                raise ValueError(f"the vocabulary has {self.tokens.size} pieces, but the log-probs of {name} "
                                 f"have {array.shape[1]}")  # fmt: skip
        padded, lens = pad_rows([torch.from_numpy(array) for array in arrays])
        return Emissions(list(ids), padded.to(self.device), lens, self.tokens, self.frame_shift)


    def _whole(self, name: str) -> np.ndarray:
        """Return the log-probs of an utterance, its parts ``name#1``, ``name#2``, ... joined to it."""
        parts = [name]
        while f"{name}#{len(parts)}" in self._where:
            parts.append(f"{name}#{len(parts)}")
        return np.concatenate([np.asarray(self._where[part][part], dtype=np.float32) for part in parts])


def save_emissions(path: PathLike, emissions: Emissions, half: bool = False) -> None:
    """Write one ``.npz`` of log-probs that ``SavedSource`` reads back; whole or not at all.

    Args:
        path: ends with ``.npz``.
        emissions: what to write.
        half: as float16 (half the size; log-probs below -65504 become -inf, others keep three digits).
    """
    check(str(path).endswith(".npz"), "path", "end with .npz", str(path))
    kind = np.float16 if half else np.float32
    rows = zip(emissions.ids, emissions.log_probs.cpu(), emissions.lens.tolist())
    arrays = {name: row[:frames].numpy().astype(kind) for name, row, frames in rows}
    meta = {"fingerprint": emissions.tokens.fingerprint(), "frame_shift": emissions.frame_shift}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{_META: np.array(json.dumps(meta))}, **arrays)
