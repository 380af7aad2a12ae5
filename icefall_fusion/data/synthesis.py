"""Knows: utterances in, noisy synthetic speech (16 kHz FLAC) and lhotse cuts out; the job `synthesize`.
Must not know: features, models, how utterances were selected.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import re
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional, Sequence

import numpy as np
import soundfile
from tqdm import tqdm

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.files import atomic_path, write_json
from icefall_fusion.data.espeak import ACCENTS, SAMPLE_RATE, speak
from icefall_fusion.data.manifests import (
    check_corpus,
    cut_of,
    cuts_path,
    join_shards,
    read_utterances,
    write_cuts,
)
from icefall_fusion.data.noise import CLEAN, OTHER, TRAIN, Conditions, distort
from icefall_fusion.data.voices import SPEAKERS, Speakers

SPLITS = ("train", "dev", "test-clean", "test-other")
#: Conditions of each split; where there are several, utterances take one of them by lot.
CONDITIONS: dict[str, tuple[Conditions, ...]] = {
    "train": (TRAIN,),
    "dev": (CLEAN, OTHER),
    "test-clean": (CLEAN,),
    "test-other": (OTHER,),
}
FORMAT = 1  # part of every shard's fingerprint: raise it when the audio of the same options changes
_BABBLE_VOICES = 48


@dataclass(frozen=True)
class SynthesizeOptions:
    """Make the speech of one split.

    Args:
        split: train, dev, test-clean or test-other; it chooses speakers and conditions.
        data_dir: where ``text/selected_SPLIT.jsonl`` is and ``audio/``, ``manifests/`` go.
        input: JSON lines with id, book, index, cased, text; default as above.
        seed: of speakers, noise and rooms.
        workers: processes. The result does not depend on it.
        shard_size: utterances in one resumable piece of work.
        min_seconds: shorter utterances are dropped and counted.
        max_seconds: longer ones too.
        prosody: let the punctuation of the cased text shape the melody.
        speakers: another population than the split's own.
        conditions: other conditions than the split's own.
        corpus: names the manifest: ``CORPUS_cuts_SPLIT.jsonl.gz``.
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

    def __post_init__(self) -> None:
        check_choice(self.split, SPLITS, "SynthesizeOptions.split")
        check_corpus(self.corpus, "SynthesizeOptions.corpus")
        check_at_least(1, self, "workers", "shard_size")
        check(
            0 < self.min_seconds < self.max_seconds,
            "SynthesizeOptions.min_seconds",
            "be positive and below max_seconds",
            self.min_seconds,
        )


@dataclass
class Synthesizer:
    """Speaks utterances of one population; chance depends on seed and id alone.

    Args:
        speakers: who may speak.
        conditions: one is taken by lot for every utterance.
        seed: any non-negative int.
        babble_texts: of the talkers in the background; without any there is no babble.
        prosody: see SynthesizeOptions.
    """

    speakers: Speakers
    conditions: Sequence[Conditions]
    seed: int = 0
    babble_texts: Sequence[str] = ()
    prosody: bool = True
    _voices: Optional[list[np.ndarray]] = field(default=None, repr=False)

    def say(self, id: str, text: str, cased: Optional[str] = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Return an utterance and how it was made.

        Args:
            id: the utterance's name, the only source of chance beside the seed.
            text: normalized text: exactly these words are spoken.
            cased: the same with case and punctuation, for the melody.

        Returns:
            (float32 [samples] at 16 kHz, {"voice", "speed", "pitch", "snr", "noise", "rt60", "band"}).
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(id.encode("utf-8"))])
        voice = self.speakers.draw(rng)
        spoken = punctuated(text, cased) if self.prosody and cased else text
        samples = speak(spoken, voice, seed=int(rng.integers(2**31)))
        conditions = self.conditions[rng.integers(len(self.conditions))]
        samples, record = distort(samples, conditions, rng, self._background())
        return samples, {"voice": voice.name, "speed": voice.speed, "pitch": voice.pitch, **record}

    def _background(self) -> list[np.ndarray]:
        if self._voices is None:
            rng = np.random.default_rng([self.seed, 1])
            texts = [self.babble_texts[i] for i in rng.permutation(len(self.babble_texts))[:_BABBLE_VOICES]]
            spoken = (speak(text, self.speakers.draw(rng), seed=0) for text in texts)
            self._voices = [samples for samples in spoken if len(samples) > 0]
        return self._voices


def punctuated(text: str, cased: str) -> str:
    """Return ``text`` with the punctuation of ``cased`` if their words have the same letters, else ``text``.

    Nothing but , ; : ! ? after a word and the last full stop is taken over: the words spoken stay those of
    ``text``.
    """
    words = text.split()
    tokens = [token for token in re.split(r"[\s\-–—]+", cased) if re.search(r"\w", token)]
    if len(words) != len(tokens):
        return text
    spoken = []
    for word, token in zip(words, tokens):
        if re.sub(r"\W", "", word).lower() != re.sub(r"[\W_]", "", token).lower():
            return text
        mark = re.search(r"[,;:!?]", re.sub(r"^\W+", "", token))
        spoken.append(word + (mark.group() if mark else ""))
    return " ".join(spoken) + ("." if spoken[-1][-1] not in ",;:!?" else "")


def run(options: SynthesizeOptions) -> int:
    """Make the audio and ``manifests/CORPUS_cuts_SPLIT.jsonl.gz``; return 0."""
    source = options.input or options.data_dir / "text" / f"selected_{options.split}.jsonl"
    utterances = read_utterances(source, ("id", "text"))
    parts = options.data_dir / "manifests" / ".parts" / options.split
    shards = _plan(options, utterances, parts)
    todo = [shard for shard in shards if not shard.manifest.exists()]
    print(
        f"synthesize {options.split}: {len(utterances)} utterances in {len(shards)} shards, "
        f"{len(shards) - len(todo)} already done"
    )
    with tqdm(total=len(utterances), unit="utt", desc=options.split, smoothing=0.05) as bar:
        bar.update(len(utterances) - sum(len(shard.utterances) for shard in todo))
        for done in _each(options, utterances, todo):
            bar.update(done)
    return _finish(options, shards)


@dataclass(frozen=True)
class _Shard:
    manifest: Path
    audio_dir: Path
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
        content = [FORMAT, settings, repr(_population(options)), background, chunk]
        name = f"{number:05d}-{_hash(content)[:8]}"
        audio = options.data_dir / "audio" / options.split / name
        shards.append(_Shard(parts / f"{name}.jsonl.gz", audio, chunk))
    return shards


def _population(options: SynthesizeOptions) -> tuple[Speakers, tuple[Conditions, ...]]:
    conditions = (options.conditions,) if options.conditions else CONDITIONS[options.split]
    return options.speakers or SPEAKERS[options.split], conditions


def _hash(content: Any) -> str:
    return hashlib.sha1(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _babble_texts(options: SynthesizeOptions, utterances: list[dict[str, Any]]) -> list[str]:
    chosen = np.random.default_rng(options.seed).permutation(len(utterances))[:_BABBLE_VOICES]
    return [utterances[index]["text"] for index in chosen]


def _each(options: SynthesizeOptions, utterances: list[dict[str, Any]], todo: list[_Shard]) -> Iterator[int]:
    speakers, conditions = _population(options)
    babble = _babble_texts(options, utterances)
    maker = Synthesizer(speakers, conditions, options.seed, babble, options.prosody)
    make = functools.partial(_make_shard, maker, options)
    if options.workers == 1 or len(todo) < 2:
        yield from map(make, todo)
        return
    with multiprocessing.get_context("spawn").Pool(min(options.workers, len(todo))) as pool:
        yield from pool.imap_unordered(make, todo)


def _make_shard(maker: Synthesizer, options: SynthesizeOptions, shard: _Shard) -> int:
    shard.audio_dir.mkdir(parents=True, exist_ok=True)
    cuts, dropped = [], []
    for utterance in shard.utterances:
        samples, record = maker.say(utterance["id"], utterance["text"], utterance.get("cased"))
        seconds = len(samples) / SAMPLE_RATE
        if not options.min_seconds <= seconds <= options.max_seconds:
            dropped.append({"id": utterance["id"], "seconds": round(seconds, 2)})
            continue
        path = shard.audio_dir / f"{utterance['id']}.flac"
        with atomic_path(path) as temporary:
            soundfile.write(temporary, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        cuts.append(cut_of(utterance, path.absolute(), len(samples), record))
    write_json(shard.manifest.with_suffix(".dropped"), dropped)
    write_cuts(cuts, shard.manifest)  # last: its presence says that the shard is whole
    return len(shard.utterances)


def _finish(options: SynthesizeOptions, shards: list[_Shard]) -> int:
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
    return 0


def _plain(options: SynthesizeOptions) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(options), default=str))
