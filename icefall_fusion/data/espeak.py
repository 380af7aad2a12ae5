"""Knows: eSpeak NG's C library through ctypes, its voices; the only importer of espeakng_loader.
Must not know: manifests, noise, models.

eSpeak NG is GPL-3. Only the making of synthetic speech needs it (``pip install espeakng-loader``: library and
voices inside, no system package); nothing else of this package imports it or this file.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, NamedTuple, Optional

import numpy as np
from scipy.signal import firwin, resample_poly

from icefall_fusion.common.checks import check, check_choice

SAMPLE_RATE = 16_000  # Hz, what `speak` returns
#: English accents: our name -> eSpeak NG's file. ("en-gb" by name would be ambiguous to the engine.)
ACCENTS: dict[str, str] = {
    "en-us": "gmw/en-US",
    "en-us-nyc": "gmw/en-US-nyc",
    "en-gb": "gmw/en",
    "en-gb-scotland": "gmw/en-GB-scotland",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-gb-x-gbclan": "gmw/en-GB-x-gbclan",
    "en-gb-x-gbcwmd": "gmw/en-GB-x-gbcwmd",
    "en-029": "gmw/en-029",
}
#: Of other languages; a voice that is drawn by lot is English unless its speakers say otherwise.
OTHER_ACCENTS: dict[str, str] = {"es": "roa/es", "es-419": "roa/es-419", "cmn": "sit/cmn"}
# speak_lib.h: enumerations by value.
_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_CHARS_UTF8 = 1
_PHONEME_EVENTS = 1
_EVENT_KINDS = {1: "word", 7: "phoneme"}


class _Event(ctypes.Structure):
    """espeak_EVENT; a list of them ends with type 0."""

    _fields_ = [
        ("type", ctypes.c_int), ("identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("name", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class SpeechEvent(NamedTuple):
    """What eSpeak NG reports while it speaks.

    kind: ``word`` or ``phoneme``; first: index of its first character in the text (of the word that a phoneme
    is in); seconds: when it begins; name: of the phoneme; that of a pause begins with ``_``.
    """

    kind: str
    first: int
    seconds: float
    name: str


@dataclass(frozen=True)
class Voice:
    """A synthetic speaker.

    Args:
        accent: a key of ``ACCENTS`` or ``OTHER_ACCENTS``.
        variant: a name of ``variants()``, or an empty string for the accent's plain voice.
        speed: words a minute, 80..450.
        pitch: base pitch, 0..100 (50 is the voice's own).
        pitch_range: liveliness of the melody, 0..100 (0 is monotonous).
        volume: 1..200 (100 is the engine's own).
    """

    accent: str = "en-us"
    variant: str = ""
    speed: int = 175
    pitch: int = 50
    pitch_range: int = 50
    volume: int = 60

    def __post_init__(self) -> None:
        check_choice(self.accent, [*ACCENTS, *OTHER_ACCENTS], "Voice.accent")
        check(80 <= self.speed <= 450, "Voice.speed", "lie in 80..450 words a minute", self.speed)
        for name in ("pitch", "pitch_range"):
            check(0 <= getattr(self, name) <= 100, f"Voice.{name}", "lie in 0..100", getattr(self, name))
        check(0 < self.volume <= 200, "Voice.volume", "lie in 1..200", self.volume)

    @classmethod
    def named(cls, name: str, **others: int) -> Voice:
        """Return the voice ``accent`` or ``accent+variant``, e.g. ``en-us+f3``."""
        accent, _, variant = name.partition("+")
        return cls(accent, variant, **others)

    @property
    def name(self) -> str:
        """Accent and variant, e.g. ``en-us+f3``."""
        return f"{self.accent}+{self.variant}" if self.variant else self.accent


class Engine:
    """eSpeak NG, started afresh for every utterance. Not thread-safe; take it from :func:`engine`.

    The library keeps flutter, echo and noise positions in static variables, so its speech depends on all that
    it spoke before. To make audio a function of text, voice and seed alone, the library is loaded anew for
    every utterance (about 3 ms), and the C library's random numbers are seeded.
    """

    def __init__(self) -> None:
        loader = _loader()
        self._library_path = loader.get_library_path()
        self._data = tempfile.TemporaryDirectory(prefix="espeak-")  # removed with the engine
        _link_in_lower_case(Path(loader.get_data_path()), Path(self._data.name))
        self._c = ctypes.CDLL(None)
        self._chunks: list[bytes] = []
        self._events: Optional[list[SpeechEvent]] = None  # None: nobody asks
        self._callback = _CALLBACK(self._receive)  # kept: ctypes does not hold a reference

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        number = 0
        while self._events is not None and events[number].type != 0:
            event, number = events[number], number + 1
            kind = _EVENT_KINDS.get(event.type)
            if kind is not None:
                name = event.name.decode("utf-8", "replace") if kind == "phoneme" else ""
                seconds = event.milliseconds / 1000
                self._events.append(SpeechEvent(kind, event.text_position - 1, seconds, name))
        return 0

    def speak_native(
        self, text: str, voice: Voice, seed: int = 0, events: Optional[list[SpeechEvent]] = None
    ) -> tuple[np.ndarray, int]:
        """Return (int16 samples at the engine's own rate, that rate in Hz).

        Args:
            events: receives what is spoken when. The samples are the same.
        """
        library = ctypes.CDLL(self._library_path)
        self._events, flags = events, _DONT_EXIT if events is None else _DONT_EXIT | _PHONEME_EVENTS
        try:
            rate = library.espeak_Initialize(_SYNCHRONOUS, 0, self._data.name.encode(), flags)
            if rate <= 0:
                raise RuntimeError(
                    f"eSpeak NG does not start with its data in {self._data.name} (code {rate})"
                )
            library.espeak_SetSynthCallback(self._callback)
            self._select(library, voice)
            if hasattr(library, "espeak_ng_SetRandSeed"):
                library.espeak_ng_SetRandSeed(ctypes.c_long(seed & 0x7FFFFFFF))
            self._c.srand(ctypes.c_uint(seed & 0x7FFFFFFF))
            self._chunks = []
            data = text.encode("utf-8") + b"\0"
            code = library.espeak_Synth(data, ctypes.c_size_t(len(data)), 0, 0, 0, _CHARS_UTF8, None, None)
            if code != 0:
                raise RuntimeError(f"eSpeak NG cannot speak {text[:60]!r} (code {code})")
            chunks, self._chunks = self._chunks, []
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)
        return np.frombuffer(b"".join(chunks), np.int16), rate

    def phonemes(self, words: Iterable[str], voice: Voice) -> dict[str, str]:
        """Return how words are pronounced, each by itself, in eSpeak NG's letters; stress is left out."""
        library = ctypes.CDLL(self._library_path)
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        found = {}
        try:
            library.espeak_Initialize(_SYNCHRONOUS, 0, self._data.name.encode(), _DONT_EXIT)
            self._select(library, voice)
            for word in words:
                text = ctypes.create_string_buffer(word.encode("utf-8"))
                place = ctypes.c_void_p(ctypes.addressof(text))
                spoken = library.espeak_TextToPhonemes(ctypes.byref(place), _CHARS_UTF8, 0) or b""
                found[word] = re.sub(r"[',_ %=|]", "", spoken.decode("utf-8", "replace"))
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)
        return found

    @staticmethod
    def _select(library: ctypes.CDLL, voice: Voice) -> None:
        check_choice(voice.variant, ["", *variants()], "Voice.variant")
        name = {**ACCENTS, **OTHER_ACCENTS}[voice.accent] + (f"+{voice.variant}" if voice.variant else "")
        if library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"Voice {voice.name!r} cannot be loaded by eSpeak NG as {name!r}")
        for parameter, value in (
            (_RATE, voice.speed),
            (_PITCH, voice.pitch),
            (_RANGE, voice.pitch_range),
            (_VOLUME, voice.volume),
        ):
            library.espeak_SetParameter(parameter, value, 0)


def _link_in_lower_case(data: Path, target: Path) -> None:
    """Link eSpeak NG's data into a folder, with the files of accents in lower case.

    The library looks for these names in lower case. Where a file has capitals it finds none and then reads
    all of its 130 voices, for every utterance: a third of the time that it speaks.
    """
    accents = Path(next(iter(ACCENTS.values()))).parent  # gmw, in lang/
    (target / "lang" / accents).mkdir(parents=True)
    for path in (*data.iterdir(), *(data / "lang").iterdir()):
        if path.name not in ("lang", accents.name):
            (target / path.relative_to(data)).symlink_to(path)
    for path in (data / "lang" / accents).iterdir():
        (target / "lang" / accents / path.name.lower()).symlink_to(path)


def _loader() -> Any:
    """Return the module espeakng_loader, or raise ModuleNotFoundError with the remedy."""
    try:
        import espeakng_loader
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "synthetic speech needs eSpeak NG (GPL-3): pip install espeakng-loader", name="espeakng_loader"
        ) from None
    return espeakng_loader


def available() -> bool:
    """Tell whether espeakng-loader is installed."""
    try:
        _loader()
    except ModuleNotFoundError:
        return False
    return True


@functools.lru_cache(maxsize=1)
def engine() -> Engine:
    """Return this process's engine."""
    return Engine()


@functools.lru_cache(maxsize=1)
def variants() -> tuple[str, ...]:
    """Return the names of all voice variants, sorted (about 104)."""
    folder = Path(_loader().get_data_path()) / "voices" / "!v"
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_file()))


def speak(
    text: str, voice: Voice, seed: int = 0, events: Optional[list[SpeechEvent]] = None
) -> np.ndarray:
    """Return ``text`` spoken by ``voice``: float32 [samples] at 16 kHz, in [-1, 1].

    The same text, voice and seed give the same samples, whatever was spoken before.

    Args:
        text: is spoken; punctuation shapes the melody.
        voice: who says it.
        seed: of the voice's breath and flutter, any int.
        events: receives what is spoken when; the samples are the same.

    Raises:
        ModuleNotFoundError: espeakng-loader is not installed.
        ValueError: a variant that eSpeak NG does not have.
    """
    samples, rate = engine().speak_native(text, voice, seed, events)
    speech = samples.astype(np.float32) / 32768.0
    divisor = int(np.gcd(SAMPLE_RATE, rate))
    up, down = SAMPLE_RATE // divisor, rate // divisor
    return resample_poly(speech, up, down, window=_low_pass(max(up, down))).astype(np.float32)


@functools.lru_cache(maxsize=2)
def _low_pass(factor: int) -> np.ndarray:
    """Return the filter that resample_poly would design for every utterance anew."""
    return firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0)).astype(np.float32)
