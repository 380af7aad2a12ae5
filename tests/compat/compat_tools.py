"""Labels, an n-gram over words and noise for the tests of pyctcdecode's calls.
Knows: small alphabets. Must not know: decoders.
"""
from __future__ import annotations

import numpy as np

from tests.tiny import arpa_text

LABELS = ["", " ", "a", "b", "c"]
ARPA = arpa_text("""
-2.0\t<unk>\t0
-99\t<s>\t-0.5
-1.0\t</s>
-0.9\tab\t-0.25
-1.5\tabba\t-0.125
-1.1\tcab\t-0.2
-0.7\ta\t-0.3
""", """
-0.3\t<s> cab
-0.2\tab a
-0.4\ta cab
-0.1\tcab abba
-0.6\tabba </s>
""")
KNOWN = ["ab", "abba", "cab", "a"]



def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (frames, len(LABELS))).astype(np.float32)
