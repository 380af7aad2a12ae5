"""Features of a whole manifest in a device's memory, and batches gathered from them there.
Knows: cuts, features, a device. Must not know: the order of batches, models.

For a GPU whose memory holds the corpus (100 h are 5.8 GB): no worker processes, nothing copied at a step but
a few numbers of each utterance, no wait for the device. It has never run on a GPU; tests run it on a CPU.

Legend: B utterances, T frames (10 ms), U tokens.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Optional, Union

import numpy as np
import torch
from lhotse import MonoCut
from lhotse.utils import compute_num_samples
from torch import Tensor
from tqdm import tqdm

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.common.processes import to_device
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.data.cut_audio import Samples, read_recordings
from icefall_fusion.data.cut_lines import CutLine, read_cut_lines
from icefall_fusion.data.device_augment import DeviceAugment
from icefall_fusion.data.device_fbank import extract_together
from icefall_fusion.data.fbank import num_frames
from icefall_fusion.data.features import DIM, PADDING
from icefall_fusion.data.loading import Batch, Encode, cut_text, existing_manifest, load_features
from icefall_fusion.data.options import DataOptions

AT_ONCE = 100  # cuts that are read, and whose features are computed, at once


class FeatureStore:
    """The features of a manifest, float16, one utterance after another: stored ones or those of the audio.

    Float16 changes a feature by 0.004 at most (lilcom's steps of 1/32 by 0.016).

    Args:
        manifest: a lhotse manifest of cuts with features or with audio.
        device: holds the features, and computes those of audio.
        shortest: seconds; shorter cuts are left out.
        longest: seconds; longer cuts are left out.
        threads: read files ahead.
        noise: the features of noise that batches of these features may be mixed with.

    Attributes:
        features: float16 [N,80] on the device.
        starts, frames: int64 arrays, of each utterance: its first row in ``features``, and how many.
        ids, texts, seconds: of each utterance.
        skipped: {line of the manifest: {"id", "error"}} of what could not be read.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the device has too little memory.
    """

    def __init__(
        self,
        manifest: PathLike,
        device: Union[str, torch.device] = "cpu",
        shortest: float = 0.0,
        longest: float = float("inf"),
        threads: int = 1,
        noise: Optional[FeatureStore] = None,
    ) -> None:
        self.device, self.shortest, self.longest = torch.device(device), shortest, longest
        self.noise = noise
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.seconds: list[float] = []
        self.skipped: dict[int, dict[str, str]] = {}
        self._row_of: dict[Union[int, str], int] = {}  # by line of the manifest, and by id
        self._tokens: dict[Encode, tuple[Tensor, np.ndarray, list[list[int]]]] = {}
        lines = read_cut_lines(existing_manifest(manifest))
        cuts = [(line.number, line.cut()) for line in lines if shortest <= line.duration <= longest]
        sizes = np.array([_frames_of(cut) for _, cut in cuts], np.int64)
        self.features = self._room_for(int(sizes.sum()), manifest)
        self._read(cuts, sizes, threads, str(manifest))

    @classmethod
    def of(cls, manifest: PathLike, options: DataOptions, device: Union[str, torch.device]) -> FeatureStore:
        """Return what training with these options needs: the utterances it takes, and its noise."""
        threads = max(1, options.workers)
        noise = cls(options.noise, device, threads=threads) if options.noise else None
        return cls(manifest, device, options.min_seconds, options.max_seconds, threads, noise)

    def _room_for(self, frames: int, manifest: PathLike) -> Tensor:
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            rule = f"fit into the free memory of {self.device}, {free / 1e9:.1f} GB"
            needed = frames * DIM * 2
            check(needed < free, f"the features of {manifest}", rule, f"{needed / 1e9:.1f} GB")
        return torch.empty(frames, DIM, dtype=torch.float16, device=self.device)

    def _read(self, cuts: list[tuple[int, MonoCut]], sizes: np.ndarray, threads: int, name: str) -> None:
        """Fill `features`; what cannot be read leaves its rows unused and unnamed."""
        starts = np.cumsum(sizes) - sizes
        kept: list[int] = []
        found = enumerate(read_recordings((cut for _, cut in cuts), threads, AT_ONCE, load_features))
        with tqdm(total=len(cuts), unit="cut", desc=f"to {self.device}", smoothing=0.05) as bar:
            while group := list(itertools.islice(found, AT_ONCE)):
                for at, (cut, one) in group:
                    if isinstance(one, Exception):
                        self.skipped[cuts[at][0]] = {"id": cut.id, "error": str(one)}
                        continue
                    kept.append(at)
                    self._row_of[cuts[at][0]] = self._row_of[cut.id] = len(self.ids)
                    self.ids.append(cut.id)
                    self.texts.append(cut_text(cut))
                    self.seconds.append(cut.duration)
                good = [(at, _fitted(cut, one)) for at, (cut, one) in group if not isinstance(one, Exception)]
                self._store(good, starts, sizes)
                bar.update(len(group))
        self.starts, self.frames = starts[kept], sizes[kept]

    def _store(self, good: list[tuple[int, Samples]], starts: np.ndarray, sizes: np.ndarray) -> None:
        audio = [(at, one) for at, one in good if isinstance(one, np.ndarray)]
        made = extract_together([one for _, one in audio], self.device).half()
        begin = 0
        for run in _runs([at for at, _ in audio]):  # rows that lie together are written at once
            first, count = starts[run[0]], int(sizes[run[0] : run[-1] + 1].sum())
            self.features[first : first + count] = made[begin : begin + count]
            begin += count
        for at, one in good:
            if isinstance(one, Tensor):
                self.features[starts[at] : starts[at] + sizes[at]] = one.half().to(self.device)

    def row(self, cut: Union[CutLine, MonoCut]) -> Optional[int]:
        """Return the number of an utterance; None where it could not be read."""
        return self._row_of.get(cut.number if isinstance(cut, CutLine) else cut.id)

    def tokens(self, encode: Encode) -> tuple[Tensor, np.ndarray, list[list[int]]]:
        """Return token ids of all utterances: int64 [N] on the device, the first of each, and as lists."""
        if encode not in self._tokens:
            lists = [encode(text) for text in self.texts]
            counts = np.array([len(one) for one in lists], np.int64)
            flat = torch.tensor([*itertools.chain.from_iterable(lists), 0], dtype=torch.long)
            self._tokens[encode] = flat.to(self.device), np.cumsum(counts) - counts, lists
        return self._tokens[encode]

    def recordings(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return features, and first row and number of rows of all utterances with a frame, on the device."""
        some = self.frames > 0
        check(bool(some.any()), "noise", "have a cut that can be read", 0)
        firsts, sizes = (torch.from_numpy(one[some]).to(self.device) for one in (self.starts, self.frames))
        return self.features, firsts, sizes


def _frames_of(cut: MonoCut) -> int:
    return cut.num_frames if cut.has_features else num_frames(_samples_of(cut))


def _samples_of(cut: MonoCut) -> int:
    return compute_num_samples(cut.duration, SAMPLE_RATE)


def _fitted(cut: MonoCut, one: Samples) -> Samples:
    """Return features, or audio of the cut's length: a change of speed may leave a sample more or less."""
    if isinstance(one, Tensor) or len(one) == _samples_of(cut):
        return one
    return np.pad(one, (0, max(0, _samples_of(cut) - len(one))))[: _samples_of(cut)]


def _runs(places: Sequence[int]) -> Iterator[list[int]]:
    """Yield runs of ascending numbers without gaps."""
    for _, run in itertools.groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        yield [place for _, place in run]


class ResidentBatches:
    """What a DataLoader over `loading.Loading` is, for features in a device's memory.

    A batch is that of `TrainBatches`, with tensors on the store's device, and more:

        "features"     float32 [B, T, 80]
        "lens"         int64 [B] in frames
        "frames"       the same as a list of ints: on the host, nothing waits for the device
        "tokens"       list of B id lists
        "targets"      int64 [B, U], the same ids, padded with 0
        "target_lens"  int64 [B]

    Args:
        store: the features.
        order: (seed, cuts or their lines) of each batch, as a sampler of `Loading` yields them.
        encode: text to token ids; None gives empty lists.
        options: of augmentation; None: no augmentation.
    """

    def __init__(
        self,
        store: FeatureStore,
        order: Iterable[tuple[int, Sequence[Union[CutLine, MonoCut]]]],
        encode: Optional[Encode] = None,
        options: Optional[DataOptions] = None,
    ) -> None:
        self._store, self._order, self._encode = store, order, encode
        self._augment = None
        self._unheard: list[dict[str, str]] = []  # noise that could not be read
        if options is not None:
            rule = f"lie in the {store.shortest:g}-{store.longest:g} s that the FeatureStore was made for"
            inside = store.shortest <= options.min_seconds and options.max_seconds <= store.longest
            check(inside, "min_seconds..max_seconds", rule, (options.min_seconds, options.max_seconds))
            mixed = store.noise.recordings() if options.noise and store.noise else None
            check(mixed is not None or not options.noise, "FeatureStore.noise", "be there", options.noise)
            if options.noise and store.noise:
                self._unheard = [{**entry, "kind": "noise"} for entry in store.noise.skipped.values()]
            self._augment = DeviceAugment(options, store.device, mixed)

    def __iter__(self) -> Iterator[Batch]:
        for seed, cuts in self._order:
            yield self._batch(seed, cuts)

    def _batch(self, seed: int, cuts: Sequence[Union[CutLine, MonoCut]]) -> Batch:
        store = self._store
        rows, skipped = [], list(self._unheard)
        for cut in cuts:
            row = store.row(cut)
            if row is None:
                skipped.append(self._missing(cut))
            else:
                rows.append(row)
        flat, firsts, lists = store.tokens(self._encode or _no_tokens)
        tokens = [lists[row] for row in rows]
        counts = [len(one) for one in tokens]
        frames = store.frames[rows]
        numbers = [store.starts[rows], frames, firsts[rows], np.array(counts, np.int64)]
        if self._augment is not None:
            numbers += self._augment.frame_masks(frames)
        numbers = to_device(torch.from_numpy(np.stack(numbers)), store.device)  # int64 [4 or 6, B]
        starts, lens, token_starts, target_lens = numbers[:4]
        targets, real = _gathered(flat, token_starts, target_lens, max(counts, default=0))
        return {
            "features": self._features(starts, lens, frames, numbers[4:], seed),
            "lens": lens,
            "frames": frames.tolist(),
            "tokens": tokens,
            "targets": targets * real,
            "target_lens": target_lens,
            "texts": [store.texts[row] for row in rows],
            "ids": [store.ids[row] for row in rows],
            "seconds": [store.seconds[row] for row in rows],
            "skipped": skipped,
        }

    def _features(
        self, starts: Tensor, lens: Tensor, frames: np.ndarray, masks: Tensor, seed: int
    ) -> Tensor:
        found, real = _gathered(self._store.features, starts, lens, int(frames.max(initial=0)))
        found = found.float()
        if self._augment is not None and len(frames) > 0:
            found = self._augment(found, lens, masks, seed)
        return found.masked_fill_(~real[:, :, None], PADDING)

    def _missing(self, cut: Union[CutLine, MonoCut]) -> dict[str, str]:
        if isinstance(cut, CutLine):
            return self._store.skipped[cut.number]
        return next(entry for entry in self._store.skipped.values() if entry["id"] == cut.id)


def _no_tokens(text: str) -> list[int]:
    return []


def _gathered(flat: Tensor, starts: Tensor, lens: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return ``lens`` [B] rows from ``starts`` [B] on, [B,width,...], and which are real, bool [B,width]."""
    place = torch.arange(width, device=flat.device)
    index = starts[:, None] + place.minimum((lens[:, None] - 1).clamp(min=0))
    return flat[index], place < lens[:, None]
