"""Knows: a small corpus of noise with features, for tests of batches. Must not know: models."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from icefall_fusion.data.fbank import FbankOptions, run
from icefall_fusion.data.manifests import cut_of, cuts_path, write_cuts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 utterances of noise, 0.5-2.8 s; the manifest of audio, and that of features."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    cuts = []
    for index in range(24):
        samples = rng.uniform(-0.2, 0.2, int(16_000 * (0.5 + 0.1 * index)))
        path = folder / f"{index}.flac"
        soundfile.write(path, samples, 16_000)
        utterance = {"id": f"u{index}", "text": f"word {index}"}
        cuts.append(cut_of(utterance, path, len(samples), {"voice": "noise"}))
    write_cuts(cuts, cuts_path(folder / "manifests", "train"))
    assert run(FbankOptions(folder, ("train",), workers=1, shard_size=10)) == 0
    return folder
