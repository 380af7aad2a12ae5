"""Frames of a frozen encoder, made once and kept on disk: a head that is trained on them pays for no encoder.
Knows: acoustic models, manifests, batches. Must not know: the training loop, losses.

A folder holds ``encoder.json``, which tells whose frames they are, and any number of pairs NAME.f16 (float16
[T,D] of one utterance after another) and NAME.json (ids, and frames of each). A pair counts when its second
file is there, so a killed job goes on where it was. 100 hours of D = 256 are 4.6 GB.
"""
from __future__ import annotations

import hashlib
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Optional, Sequence, Union

import numpy as np
import torch
from lhotse import MonoCut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from icefall_fusion.acoustic.models import CtcAed, load
from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path, fingerprint, write_json
from icefall_fusion.common.precision import in_bf16
from icefall_fusion.common.processes import gather_over_processes, to_device
from icefall_fusion.data.cut_lines import CutLine
from icefall_fusion.data.datamodule import EvalBatches
from icefall_fusion.data.loading import Batch, Encode, cut_text
from icefall_fusion.train.checkpoints import load_checkpoint, newest_checkpoint

if TYPE_CHECKING:
    from icefall_fusion.train.acoustic_model import TrainOptions

GROUP = 40  # batches of a file


def check_cache(options: TrainOptions) -> None:
    """Refuse options under which kept frames would not be those of training.

    Raises:
        ValueError: with the option.
    """
    frozen, data, model = options.freeze.split(","), options.data, options.model
    rule = "name the encoder for TrainOptions.encoder_cache"
    check("encoder" in [part.strip() for part in frozen], "TrainOptions.freeze", rule, options.freeze)
    middle = "ctc" in model.heads and "ctc" not in [part.strip() for part in frozen] and model.middle_weight
    rule = "be 0 for TrainOptions.encoder_cache, which keeps the last frames alone (or freeze ctc)"
    check(not middle, "ModelOptions.middle_weight", rule, model.middle_weight)
    rule = "be {} for TrainOptions.encoder_cache: an utterance has the same frames each time"
    for name, usual in (("spec_augment", False), ("noise", ""), ("frequency_warp", 0.0), ("resident", False)):
        value = getattr(data, name)
        check(value == usual, f"DataOptions.{name}", rule.format(repr(usual)), value)
    chunks = model.chunk_probability
    check(chunks == 0, "ModelOptions.chunk_probability", rule.format("0"), chunks)


class EncoderCache:
    """Kept frames by utterance.

    Args:
        folder: of the files.
        size: D.
    """

    def __init__(self, folder: PathLike, size: int) -> None:
        self.folder, self.size = Path(folder), size
        self._places: dict[str, tuple[str, int, int]] = {}  # file, first frame, frames
        for path in sorted(self.folder.glob("*.json")):
            if path.with_suffix(".f16").is_file():
                self._enter(path.stem, json.loads(path.read_text(encoding="utf-8")))

    def _enter(self, name: str, listed: dict[str, Any]) -> None:
        counts = listed["frames"]
        starts = np.cumsum(counts) - counts
        self._places.update({id: (name, int(start), count)
                             for id, start, count in zip(listed["ids"], starts, counts)})

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, id: object) -> bool:
        return id in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def add(self, ids: Sequence[str], frames: Sequence[Tensor]) -> None:
        """Keep the frames [T,D] of some utterances, in files of their own."""
        name = secrets.token_hex(8)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / f"{name}.f16") as temporary:
            torch.cat([one.half() for one in frames]).numpy().tofile(temporary)
        listed = {"ids": list(ids), "frames": [len(one) for one in frames]}
        write_json(self.folder / f"{name}.json", listed)
        self._enter(name, listed)

    def read(self, id: str) -> Tensor:
        """Return the frames of an utterance, float32 [T,D].

        Raises:
            ValueError: they are not kept, or their file was cut short.
        """
        check(id in self._places, f"the frames of {id}", f"be kept in {self.folder}", None)
        name, start, count = self._places[id]
        path, width = self.folder / f"{name}.f16", 2 * self.size
        values = np.fromfile(path, np.float16, count * self.size, offset=start * width)
        found = len(values) // self.size
        check(found == count, str(path), f"hold {count} frames of {id}", found)
        return torch.from_numpy(values.astype(np.float32).reshape(count, self.size))


class KeptFrames(Dataset):
    """What `loading.Loading` is, for kept frames: batches of [B,T,D] in place of features, ``encoded``."""

    def __init__(self, cache: EncoderCache, encode: Optional[Encode], errors: Mapping[str, str]) -> None:
        self._cache, self._encode, self._errors = cache, encode, errors  # by id: why there are no frames

    def __getitem__(self, item: tuple[int, list[Union[CutLine, MonoCut]]]) -> Batch:
        frames, kept, skipped = [], [], []
        for cut in item[1]:
            cut = cut.cut() if isinstance(cut, CutLine) else cut
            try:
                frames.append(self._cache.read(cut.id))
            except (OSError, ValueError) as error:
                skipped.append({"id": cut.id, "error": self._errors.get(cut.id, str(error))})
                continue
            kept.append(cut)
        texts, counts = [cut_text(cut) for cut in kept], [len(one) for one in frames]
        padded = pad_sequence(frames, batch_first=True) if frames else torch.zeros(0, 0, self._cache.size)
        return {
            "features": padded, "lens": torch.tensor(counts, dtype=torch.int64), "frames": counts,
            "encoded": True, "tokens": [self._encode(text) if self._encode else [] for text in texts],
            "texts": texts, "ids": [cut.id for cut in kept], "seconds": [cut.duration for cut in kept],
            "skipped": skipped,
        }


def keep_frames(options: TrainOptions, manifest: Path, encode: Optional[Encode], device: torch.device,
                rank: int = 0, world: int = 1) -> KeptFrames:
    """Encode what is not kept yet of a manifest by the encoder of ``options.init``; each process a share.

    Raises:
        ValueError: the folder holds frames of another encoder or manifest, or the training that goes on has
            another encoder.
    """
    model = load(options.init, str(device))
    newest, digest = newest_checkpoint(options.exp), _digest(model.encoder.state_dict())
    if newest is not None:
        state, start = load_checkpoint(newest, mmap=True)["model"], "encoder."
        kept = {name[len(start):]: value for name, value in state.items() if name.startswith(start)}
        rule = f"have the encoder of {newest}, from which training goes on with TrainOptions.encoder_cache"
        check(_digest(kept) == digest, "TrainOptions.init", rule, options.init)
    cache = EncoderCache(options.encoder_cache, model.options.encoder.size)
    about = {"encoder": digest, "manifest": fingerprint(manifest)}
    path = cache.folder / "encoder.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else about
    rule = f"be empty or of the encoder of {options.init} and of {manifest}"
    check(known == about, f"TrainOptions.encoder_cache {cache.folder}", rule, known)
    gather_over_processes(None)  # all have seen what is there before one adds to it
    if rank == 0:
        write_json(path, about)
    batches = EvalBatches(manifest, options.data, None, None, list(cache), rank, world)
    half = in_bf16(options.trainer.precision, device)
    ids: list[str] = []
    frames: list[Tensor] = []
    bar = tqdm(batches, desc="frames of the encoder", unit="batch", disable=rank > 0 or not len(batches))
    for number, batch in enumerate(bar, 1):
        ids += batch["ids"]
        frames += _encoded(model, batch, device, half)
        if number % GROUP == 0 or number == len(batches):
            cache.add(ids, frames)
            ids, frames = [], []
    if ids:  # the last batches could not be read
        cache.add(ids, frames)
    shares = gather_over_processes(batches.skipped)  # all have written their frames too
    errors = {entry["id"]: entry["error"] for share in shares for entry in share}
    return KeptFrames(EncoderCache(options.encoder_cache, cache.size), encode, errors)


@torch.inference_mode()
def _encoded(model: CtcAed, batch: Batch, device: torch.device, half: bool) -> list[Tensor]:
    batch = to_device(batch, device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        frames, lens = model.encoder(batch["features"], batch["lens"])
    return [one[:count].float().cpu() for one, count in zip(frames, lens.tolist())]


def _digest(encoder: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha1()
    for name, value in sorted(encoder.items()):
        digest.update(name.encode())
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()
