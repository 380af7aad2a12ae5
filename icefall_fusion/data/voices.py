"""Knows: which synthetic speakers each split draws from, and the ranges of speed and pitch.
Must not know: how speech is made, files, models.

No voice variant is shared between splits, so every test speaker is unseen in training whatever its accent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icefall_fusion.common.checks import check
from icefall_fusion.data.espeak import ACCENTS, Voice, variants

#: Not intelligible (by ear-substitute: spectra unlike any other voice's), or the plain voice again.
DROPPED = ("AnxiousAndy", "Demonic", "Marco", "fast")
DEV = ("Gene", "Gene2", "belinda", "edward", "edward2", "m7", "pablo", "robosoft4", "shelby", "whisperf")
TEST_CLEAN = (
    "Alex",
    "Henrique",
    "Mike",
    "adam",
    "f1",
    "john",
    "m4",
    "steph",
    "steph2",
    "steph3",
    "victor",
    "grandpa",
)
#: Whispering, croaking, robot-like, very high or very old.
TEST_OTHER = (
    "Alicia", "Lee", "Storm", "Tweaky", "UniRobot", "anikaRobot", "croak", "f5", "grandma", "klatt4",
    "robosoft3", "whisper", "zac",
)


@dataclass(frozen=True)
class Speakers:
    """A population of speakers. Ranges are (low, high), drawn uniformly for each utterance.

    Args:
        variants: names of eSpeak NG voice variants; an empty name is the accent's plain voice. Empty: all
            that no other split owns.
        accents: accents to combine them with. Default: all eight.
        speed: words a minute by eSpeak NG's count.
        pitch: 0..100.
        pitch_range: 0..100.
    """

    variants: tuple[str, ...] = ()
    accents: tuple[str, ...] = tuple(ACCENTS)
    speed: tuple[int, int] = (95, 172)
    pitch: tuple[int, int] = (25, 75)
    pitch_range: tuple[int, int] = (25, 75)

    def __post_init__(self) -> None:
        for name in ("speed", "pitch", "pitch_range"):
            value = getattr(self, name)
            check(len(value) == 2 and value[0] <= value[1], f"Speakers.{name}", "be (low, high)", value)
        check(len(self.accents) > 0, "Speakers.accents", "name at least one accent", self.accents)

    def names(self) -> tuple[str, ...]:
        """Return the variants to draw from."""
        return self.variants or training_variants()

    def draw(self, rng: np.random.Generator) -> Voice:
        """Return a random speaker."""
        names = self.names()
        return Voice(
            accent=self.accents[rng.integers(len(self.accents))],
            variant=names[rng.integers(len(names))],
            speed=int(rng.integers(self.speed[0], self.speed[1] + 1)),
            pitch=int(rng.integers(self.pitch[0], self.pitch[1] + 1)),
            pitch_range=int(rng.integers(self.pitch_range[0], self.pitch_range[1] + 1)),
        )


def training_variants() -> tuple[str, ...]:
    """Return the plain voice and all variants that neither dev nor a test set owns."""
    owned = {*DROPPED, *DEV, *TEST_CLEAN, *TEST_OTHER}
    return ("", *(name for name in variants() if name not in owned))


SPEAKERS: dict[str, Speakers] = {
    "train": Speakers(),
    "dev": Speakers(DEV, speed=(115, 180)),
    "test-clean": Speakers(TEST_CLEAN, speed=(115, 180)),
    "test-other": Speakers(TEST_OTHER, speed=(105, 170)),
}
