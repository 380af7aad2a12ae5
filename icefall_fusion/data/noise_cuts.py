"""Job ``noise-cuts``: a folder of noise recordings (MUSAN's, say) as a manifest of short cuts.
Knows: audio files, manifests. Must not know: features, how noise is mixed.
"""
from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import soundfile
from lhotse import AudioSource, MonoCut, Recording, SupervisionSegment
from tqdm import tqdm

from icefall_fusion.common.checks import check
from icefall_fusion.common.command_line import SKIPPED_SOME
from icefall_fusion.data.audio import UNKNOWN_LENGTH
from icefall_fusion.data.manifests import check_corpus, cuts_path, write_cuts

AUDIO = (".wav", ".flac", ".ogg", ".mp3")


@dataclass(frozen=True)
class NoiseCutsOptions:
    """Write the manifest of noise that training mixes in (``train --data.noise``), after compute-fbank.

    Args:
        folder: of recordings, searched at any depth (.wav, .flac, .ogg, .mp3).
        data_dir: ``manifests/CORPUS_cuts_SPLIT.jsonl.gz`` is written there.
        corpus: name that the manifest begins with.
        split: name that it ends with.
        leave_out: folders of this name are not entered; MUSAN's speech would be a second talker.
        window: seconds of a cut at most; recordings are cut evenly.
        shortest: seconds; shorter recordings are left out.
    """

    folder: str = ""
    data_dir: str = "data"
    corpus: str = "noise"
    split: str = "noise"
    leave_out: tuple[str, ...] = ("speech",)
    window: float = 10.0
    shortest: float = 0.5

    def __post_init__(self) -> None:
        there = self.folder != "" and Path(self.folder).is_dir()
        check(there, "NoiseCutsOptions.folder", "be a folder", self.folder)
        check_corpus(self.corpus, "NoiseCutsOptions.corpus")
        check_corpus(self.split, "NoiseCutsOptions.split")
        check(self.window >= 1, "NoiseCutsOptions.window", "be at least 1 s", self.window)
        check(self.shortest > 0, "NoiseCutsOptions.shortest", "be above 0 s", self.shortest)


def run(options: NoiseCutsOptions) -> int:
    """Write the manifest; return 0, or 3 when files were skipped that cannot be read (they are named).

    Raises:
        ValueError: there is no recording that can be used.
    """
    skipped: list[str] = []
    files = tqdm(_files(options), unit="file", desc="noise")
    cuts = [cut for path in files for cut in _cuts(options, path, skipped)]
    check(len(cuts) > 0, f"{options.folder}", f"hold a recording of {options.shortest} s at least", len(cuts))
    target = cuts_path(Path(options.data_dir) / "manifests", options.split, options.corpus)
    write_cuts(cuts, target)
    hours = sum(cut.duration for cut in cuts) / 3600
    print(f"{options.split}: {hours:.2f} h, {len(cuts)} cuts, {len(skipped)} files skipped -> {target}")
    return SKIPPED_SOME if skipped else 0


def _files(options: NoiseCutsOptions) -> list[Path]:
    folder = Path(options.folder)
    audio = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO and path.is_file())
    left_out = set(options.leave_out)
    return sorted(path for path in audio if not left_out & set(path.relative_to(folder).parts[:-1]))


def _cuts(options: NoiseCutsOptions, path: Path, skipped: list[str]) -> Iterator[MonoCut]:
    """Yield the windows of a recording, all of one length."""
    try:
        about = soundfile.info(str(path))
        if about.frames >= UNKNOWN_LENGTH:
            raise RuntimeError("its header does not tell its length")
    except (OSError, RuntimeError) as error:
        logging.warning("skipped %s: it cannot be read: %s", path, error)
        skipped.append(str(path))
        return
    if about.duration < options.shortest:
        return
    name = path.relative_to(options.folder).as_posix()  # with its suffix: rain.wav may lie beside rain.flac
    source = AudioSource(type="file", channels=[0], source=str(path.resolve()))
    recording = Recording(name, [source], about.samplerate, about.frames, about.duration)
    count = math.ceil(about.duration / options.window)
    seconds = math.floor(1000 * about.duration / count) / 1000
    for number in range(count):
        id = f"{name}-{number:04d}"
        supervision = SupervisionSegment(id, name, 0.0, seconds, text="")
        yield MonoCut(id, number * seconds, seconds, 0, recording=recording, supervisions=[supervision])
