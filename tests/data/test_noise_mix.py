"""Noise in training: manifests of noise, mixing of features, batches. Must not know: models."""
from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet

from icefall_fusion.__main__ import main
from icefall_fusion.data.datamodule import DataOptions, EvalBatches, TrainBatches
from icefall_fusion.data.fbank import FbankOptions, extract, run
from icefall_fusion.data.manifests import cut_of, cuts_path, write_cuts
from icefall_fusion.data.noise_mix import mix

OPTIONS = DataOptions(
    max_duration=6, eval_duration=6, num_buckets=2, min_seconds=0.1, max_seconds=3, workers=0,
    spec_augment=False, noise_share=1.0,
)


def energy(features: torch.Tensor) -> float:
    return float(features.double().exp().sum(1).mean())


def noise(samples: int, seed: int, level: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, level, samples).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve utterances (tones), a folder of noise beside them, and the features of both."""
    folder = tmp_path_factory.mktemp("data")
    cuts = []
    for index in range(12):
        time = np.arange(int(16_000 * (0.6 + 0.2 * index))) / 16_000
        samples = 0.3 * np.sin(2 * np.pi * (300 + 40 * index) * time)
        path = folder / f"{index}.flac"
        soundfile.write(path, samples, 16_000)
        cuts.append(cut_of({"id": f"u{index}", "text": "tone"}, path, len(samples), {"voice": "sine"}))
    write_cuts(cuts, cuts_path(folder / "manifests", "train"))
    assert run(FbankOptions(folder, ("train",), workers=1)) == 0
    recordings = {"noise/a": (16_000, 25.0), "music/b": (44_100, 3.0), "speech/c": (16_000, 5.0)}
    for name, (rate, seconds) in {**recordings, "noise/short": (16_000, 0.2)}.items():
        path = folder / "musan" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, noise(int(rate * seconds), len(name)), rate)
    soundfile.write(folder / "musan" / "music" / "b.flac", noise(48_000, 9), 16_000)  # beside b.wav
    (folder / "musan" / "noise" / "broken.wav").write_bytes(b"no audio")
    endless = bytearray((folder / "musan" / "music" / "b.flac").read_bytes())
    endless[21] &= 0xF0  # STREAMINFO without a number of samples, as encoders that write into pipes leave it
    endless[22:26] = bytes(4)
    (folder / "musan" / "noise" / "endless.flac").write_bytes(endless)
    arguments = ["noise-cuts", "--folder", str(folder / "musan"), "--data_dir", str(folder)]
    assert main(arguments) == 3  # two were skipped
    assert run(FbankOptions(folder, ("noise",), workers=1, corpus="noise")) == 0
    return folder


def options(data: Path, **changes: object) -> DataOptions:
    manifest = str(cuts_path(data / "fbank", "noise", "noise"))
    return dataclasses.replace(OPTIONS, **{"noise": manifest, **changes})


def batches(data: Path, given: DataOptions) -> dict[str, torch.Tensor]:
    found = {}
    for batch in TrainBatches(cuts_path(data / "fbank", "train"), given):
        for id, features, length in zip(batch["ids"], batch["features"], batch["lens"]):
            found[id] = features[:length]
    return found


def test_a_folder_of_noise_becomes_even_windows_without_speech(data: Path, capsys) -> None:
    cuts = list(CutSet.from_file(cuts_path(data / "manifests", "noise", "noise")))
    names = ["music/b.flac-0000", "music/b.wav-0000", *(f"noise/a.wav-000{number}" for number in range(3))]
    assert [cut.id for cut in cuts] == names
    assert [cut.duration for cut in cuts] == [3.0, 3.0, 8.333, 8.333, 8.333]
    assert main(["noise-cuts", "--folder", str(data / "nowhere"), "--data_dir", str(data)]) == 2
    assert "NoiseCutsOptions.folder must be a folder" in capsys.readouterr().err
    arguments = ["noise-cuts", "--folder", str(data / "musan"), "--data_dir", str(data), "--split", "none"]
    assert main([*arguments, "--leave_out", "[speech,noise,music]"]) == 2
    assert "musan must hold a recording of 0.5 s at least, but is 0" in capsys.readouterr().err


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_energies_add_at_the_ratio_that_was_asked_for(snr: float) -> None:
    rng = torch.Generator().manual_seed(1)
    speech, sound = torch.randn(90, 80, generator=rng) * 3, torch.randn(40, 80, generator=rng)
    mixed = mix(speech, sound, 0.3, snr)
    frames = (12 + torch.arange(90)) % 40
    added = mixed.double().exp() - speech.double().exp()
    assert 10 * math.log10(energy(speech) / float(added.sum(1).mean())) == pytest.approx(snr, abs=1e-3)
    shape = added.log() - sound.double()[frames]  # the noise from frame 12 on, again and again, at one level
    loud = added > 1e-3 * speech.double().exp()  # where float32 has kept it
    assert float(shape[loud].std()) < 0.02
    assert mix(speech[:0], sound, 0.0, snr).shape == (0, 80)
    assert torch.equal(mix(speech, sound[:0], 0.0, snr), speech)


def test_mixed_features_are_those_of_mixed_audio() -> None:
    """But for phases: where two sounds meet, energies fluctuate more than their sum does."""
    voice, sound = noise(32_000, 1, 0.1), noise(32_000, 2, 0.1)
    heard = extract(voice + sound * 10 ** (-6 / 20))
    mixed = mix(extract(voice), extract(sound), 0.0, 6.0)
    assert -0.15 < float((heard - mixed).mean()) < 0.0 and float((heard - mixed).abs().mean()) < 0.4


def test_training_hears_noise_and_evaluation_does_not(data: Path) -> None:
    plain, given = batches(data, OPTIONS), options(data)
    noisy = batches(data, given)
    assert noisy.keys() == plain.keys() and len(plain) == 12
    for id, features in noisy.items():
        clean = plain[id]
        assert bool((features >= clean - 1e-4).all())
        ratio = 10 * math.log10(energy(clean) / (energy(features) - energy(clean)))
        assert 9.9 < ratio < 20.1  # noise_lowest, noise_highest
    again = batches(data, given)
    assert all(torch.equal(features, again[id]) for id, features in noisy.items())
    none = batches(data, options(data, noise_share=0.0))
    assert all(torch.equal(features, plain[id]) for id, features in none.items())
    some = batches(data, options(data, noise_share=0.5))
    assert 0 < sum(torch.equal(features, plain[id]) for id, features in some.items()) < 12
    manifest = cuts_path(data / "fbank", "train")
    for one, two in zip(EvalBatches(manifest, OPTIONS), EvalBatches(manifest, given)):
        assert torch.equal(one["features"], two["features"])


def test_noise_that_cannot_be_read_is_listed_and_speech_kept(data: Path, tmp_path: Path) -> None:
    cuts = list(CutSet.from_file(cuts_path(data / "fbank", "noise", "noise")))
    features = dataclasses.replace(cuts[0].features, storage_path="gone.lca")
    gone = dataclasses.replace(cuts[0], features=features)
    manifest = tmp_path / "noise.jsonl.gz"
    write_cuts([gone], manifest)
    source = TrainBatches(cuts_path(data / "fbank", "train"), options(data, noise=str(manifest)))
    assert sum(len(batch["ids"]) for batch in source) == 12
    said = {"id": "music/b.flac-0000", "error": "no feature archive at gone.lca", "kind": "noise"}
    assert source.skipped == [said]
    resumed = TrainBatches(cuts_path(data / "fbank", "train"), options(data, noise=str(manifest)))
    resumed.load_state_dict(source.state_dict())
    assert sum(len(batch["ids"]) for batch in resumed) == 12 and resumed.skipped == [said]


def test_wrong_noise_is_refused(data: Path, tmp_path: Path) -> None:
    manifest = cuts_path(data / "fbank", "train")
    with pytest.raises(FileNotFoundError, match="no manifest at gone"):
        TrainBatches(manifest, options(data, noise="gone"))
    with pytest.raises(ValueError, match="cut music/b.flac-0000 .* have features of 80 filters, but is None"):
        TrainBatches(manifest, options(data, noise=str(cuts_path(data / "manifests", "noise", "noise"))))
    with pytest.raises(ValueError, match="DataOptions.noise_highest must be at least noise_lowest"):
        dataclasses.replace(OPTIONS, noise_highest=3.0)
