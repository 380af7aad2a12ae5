"""Job `synthesize`: utterances in, noisy synthetic speech (16 kHz FLAC or WAV) and lhotse cuts out.
Knows: the speech of an utterance, shards of work, manifests.
Must not know: features, models, how utterances were selected.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import numpy as np
import soundfile
from lhotse import MonoCut
from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.command_line import UNFINISHED
from icefall_fusion.common.files import atomic_path, write_json
from icefall_fusion.common.workers import in_workers
from icefall_fusion.data.espeak import ACCENTS, SAMPLE_RATE
from icefall_fusion.data.manifests import (
    check_corpus,
    cut_of,
    cuts_path,
    join_shards,
    read_utterances,
    span_of,
    write_cuts,
)
from icefall_fusion.data.noise import CLEAN, OTHER, TRAIN, Conditions
from icefall_fusion.data.reading import ENGLISH, MANDARIN, SPANISH, Reading, reading_of
from icefall_fusion.data.spoken_words import SpokenWord
from icefall_fusion.data.synthesizer import BABBLE_VOICES, Synthesizer
from icefall_fusion.data.voices import SPEAKERS, Speakers
from icefall_fusion.text.language import Language

SPLITS = ("train", "dev", "test-clean", "test-other")
#: Conditions of each split; where there are several, utterances take one of them by lot.
CONDITIONS: dict[str, tuple[Conditions, ...]] = {
    "train": (TRAIN,),
    "dev": (CLEAN, OTHER),
    "test-clean": (CLEAN,),
    "test-other": (OTHER,),
}
FORMAT = 1  # part of every shard's fingerprint: raise it when the audio of the same options changes


@dataclass(frozen=True)
class SynthesizeOptions:
    """Make the speech of one split.

    Args:
        split: train, dev, test-clean or test-other; it chooses speakers and conditions.
        data_dir: where ``text/selected_SPLIT.jsonl`` is and ``audio/``, ``manifests/`` go.
        input: JSON lines (gzipped where the name ends in .gz) with id, book, index, cased, text; default as
            above.
        seed: of speakers, noise and rooms.
        workers: processes. The result does not depend on it.
        shard_size: utterances in one resumable piece of work.
        min_seconds: shorter utterances are dropped and counted.
        max_seconds: longer ones too.
        prosody: let the punctuation of the cased text shape the melody.
        speakers: another population than the split's own.
        conditions: other conditions than the split's own.
        corpus: names the manifest: ``CORPUS_cuts_SPLIT.jsonl.gz``.
        word_times: write when each word is spoken into the manifest: the alignment ``word`` of supervisions.
            The samples are the same.
        joined: write the utterances of a shard one after another into one WAV file, instead of a FLAC file
            each: the same samples, quicker to write and to read, and nearly twice as large.
        max_minutes: begin no shard after that many minutes, and list the utterances that were spoken until
            then; shards begin in a random order, so that all books have their share. 0: no limit. A run
            without it goes on.
        language: ISO 639 code of the text: en, es or zh; it chooses the accents of the split's speakers.
    """

    split: str
    data_dir: Path = Path("data")
    input: Optional[Path] = None
    seed: int = 20250411
    workers: int = 2
    shard_size: int = 500
    min_seconds: float = 2.0
    max_seconds: float = 20.0
    prosody: bool = True
    speakers: Optional[Speakers] = None
    conditions: Optional[Conditions] = None
    corpus: str = "minibooks"
    word_times: bool = False
    joined: bool = False
    max_minutes: float = 0.0
    language: str = "en"

    def __post_init__(self) -> None:
        check_choice(self.split, SPLITS, "SynthesizeOptions.split")
        check_at_least(0, self, "max_minutes")
        known = bool(self.speakers) or self.reading in (ENGLISH, SPANISH, MANDARIN)
        rule = "be en, es or zh, or speakers must be given"
        check(known, "SynthesizeOptions.language", rule, self.language)
        check_corpus(self.corpus, "SynthesizeOptions.corpus")
        check_at_least(1, self, "workers", "shard_size")
        check(
            0 < self.min_seconds < self.max_seconds,
            "SynthesizeOptions.min_seconds",
            "be positive and below max_seconds",
            self.min_seconds,
        )


    @property
    def reading(self) -> Reading:
        """How the language is read aloud."""
        return reading_of(Language(self.language))


def run(options: SynthesizeOptions) -> int:
    """Make the audio and ``manifests/CORPUS_cuts_SPLIT.jsonl.gz``.

    Returns:
        0; 4 when ``max_minutes`` left shards out of the manifest.

    Raises:
        ValueError: ``max_minutes`` were too few for one shard.
    """
    deadline = time.monotonic() + options.max_minutes * 60 if options.max_minutes else float("inf")
    source = options.input or options.data_dir / "text" / f"selected_{options.split}.jsonl"
    utterances = read_utterances(source, ("id", "text"))
    parts = options.data_dir / "manifests" / ".parts" / options.split
    shards = _plan(options, utterances, parts)
    todo = [shard for shard in shards if not shard.manifest.exists()]
    if options.max_minutes:
        random.Random(options.seed).shuffle(todo)
    print(
        f"synthesize {options.split}: {len(utterances)} utterances in {len(shards)} shards, "
        f"{len(shards) - len(todo)} already done"
    )
    with tqdm(total=len(utterances), unit="utt", desc=options.split, smoothing=0.05) as bar:
        bar.update(len(utterances) - sum(len(shard.utterances) for shard in todo))
        speakers, conditions = _population(options)
        babble = _babble_texts(options, utterances)
        maker = Synthesizer(speakers, conditions, options.seed, babble, options.prosody)
        make = functools.partial(_make_shard, maker, options, deadline)
        # a process has one maker for all its shards: it speaks what babbles in the background once
        for done in in_workers(make, todo, options.workers, in_order=False):
            bar.update(done)
    made = [shard for shard in shards if shard.manifest.exists()]
    check(len(made) > 0, "SynthesizeOptions.max_minutes", "be enough for a shard", options.max_minutes)
    _finish(options, made)
    if len(made) < len(shards):
        print(f"{options.split}: max_minutes are over; {len(shards) - len(made)} shards were not spoken")
        return UNFINISHED
    return 0


@dataclass(frozen=True)
class _Shard:
    manifest: Path
    audio: Path
    utterances: list[dict[str, Any]]


def _plan(options: SynthesizeOptions, utterances: list[dict[str, Any]], parts: Path) -> list[_Shard]:
    """Cut the work into shards, each named by a digest of its input, so that changed options never mix.

    What other talkers say in the background and the names of the voices go into all of them.
    """
    shards = []
    speakers, _ = _population(options)
    shared = [_babble_texts(options, utterances), speakers.names(), ACCENTS]
    background = _hash(shared)
    settings = {key: str(getattr(options, key)) for key in ("seed", "min_seconds", "max_seconds", "prosody")}
    for number, start in enumerate(range(0, len(utterances), options.shard_size)):
        chunk = utterances[start : start + options.shard_size]
        content: list[Any] = [FORMAT, settings, repr(_population(options)), background, chunk]
        content += ["joined"] if options.joined else []
        content += ["word_times"] if options.word_times else []
        name = f"{number:05d}-{_hash(content)[:8]}"
        audio = options.data_dir / "audio" / options.split / name
        shards.append(_Shard(parts / f"{name}.jsonl.gz", audio, chunk))
    return shards


def _population(options: SynthesizeOptions) -> tuple[Speakers, tuple[Conditions, ...]]:
    conditions = (options.conditions,) if options.conditions else CONDITIONS[options.split]
    speakers, accents = SPEAKERS[options.split], options.reading.accents
    return options.speakers or (replace(speakers, accents=accents) if accents else speakers), conditions


def _hash(content: Any) -> str:
    return hashlib.sha1(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _babble_texts(options: SynthesizeOptions, utterances: list[dict[str, Any]]) -> list[str]:
    chosen = np.random.default_rng(options.seed).permutation(len(utterances))[:BABBLE_VOICES]
    return [utterances[index]["text"] for index in chosen]


def _make_shard(maker: Synthesizer, options: SynthesizeOptions, deadline: float, shard: _Shard) -> int:
    """Speak a shard if it is not too late (CLOCK_MONOTONIC is the same in all processes)."""
    if time.monotonic() > deadline:
        return 0
    spoken, dropped = [], []
    for utterance in shard.utterances:
        words: Optional[list[SpokenWord]] = [] if options.word_times else None
        samples, record = maker.say(utterance["id"], utterance["text"], utterance.get("cased"), words)
        record.update({} if words is None else {"words": words})
        record.update({} if options.reading == ENGLISH else {"language": options.reading.name})
        seconds = len(samples) / SAMPLE_RATE
        if options.min_seconds <= seconds <= options.max_seconds:
            spoken.append((utterance, samples, record))
        else:
            dropped.append({"id": utterance["id"], "seconds": round(seconds, 2)})
    cuts = _joined(shard, spoken) if options.joined else [_file_of_its_own(shard, *one) for one in spoken]
    write_json(shard.manifest.with_suffix(".dropped"), dropped)
    write_cuts(cuts, shard.manifest)  # last: its presence says that the shard is whole
    return len(shard.utterances)


def _file_of_its_own(
    shard: _Shard, utterance: dict[str, Any], samples: np.ndarray, record: dict[str, Any]
) -> MonoCut:
    path = shard.audio / f"{utterance['id']}.flac"
    _write_audio(path, samples, "FLAC")
    return cut_of(utterance, path.absolute(), len(samples), record)


def _joined(
    shard: _Shard, spoken: Sequence[tuple[dict[str, Any], np.ndarray, dict[str, Any]]]
) -> list[MonoCut]:
    path = shard.audio.with_suffix(".wav")
    samples = np.concatenate([np.zeros(0, np.float32), *(one for _, one, _ in spoken)])
    rounded = np.clip(np.rint(samples * 32768), -32768, 32767)  # as in FLAC; libsndfile's WAV would differ
    _write_audio(path, rounded.astype(np.int16), "WAV")
    cuts, place = [], 0
    for utterance, one, record in spoken:
        cut = cut_of(utterance, path.absolute(), len(one), record)
        cuts.append(span_of(cut, shard.audio.name, place, len(samples)))
        place += len(one)
    return cuts


def _write_audio(path: Path, samples: np.ndarray, kind: str) -> None:
    with atomic_path(path) as temporary:
        soundfile.write(temporary, samples, SAMPLE_RATE, format=kind, subtype="PCM_16")


def _finish(options: SynthesizeOptions, shards: list[_Shard]) -> None:
    target = cuts_path(options.data_dir / "manifests", options.split, options.corpus)
    totals = join_shards([shard.manifest for shard in shards], target)
    dropped: list[Mapping[str, Any]] = []
    for shard in shards:
        dropped += json.loads(shard.manifest.with_suffix(".dropped").read_text())
    summary = {**totals, "dropped": len(dropped), "dropped_utterances": dropped, "options": _plain(options)}
    write_json(target.parent / f"synthesize-{options.split}.json", summary)
    print(
        f"{options.split}: {totals['hours']:.2f} h, {totals['utterances']} utterances, "
        f"{totals['words']} words, {totals['speakers']} speakers; {len(dropped)} dropped as shorter "
        f"than {options.min_seconds} s or longer than {options.max_seconds} s -> {target}"
    )


def _plain(options: SynthesizeOptions) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options), default=str))
