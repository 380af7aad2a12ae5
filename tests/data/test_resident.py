"""Knows: features in a device's memory, their batches against those of the loader. Must not know: models."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from lhotse import AudioSource, CutSet, MonoCut, Recording

from icefall_fusion.data.audio import load_audio
from icefall_fusion.data.datamodule import DataOptions, EvalBatches, TrainBatches
from icefall_fusion.data.device_fbank import extract_together
from icefall_fusion.data.fbank import extract
from icefall_fusion.data.features import PADDING
from icefall_fusion.data.manifests import cuts_path, write_cuts
from icefall_fusion.data.resident import FeatureStore

OPTIONS = DataOptions(
    max_duration=6, eval_duration=6, num_buckets=2, min_seconds=0.1, max_seconds=3, workers=0,
    spec_augment=False,
)
HALF = 0.004  # float16 changes a log energy below 16 by no more


def _encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def assert_same(one: dict, two: dict, tolerance: float = HALF) -> None:
    for name in ("ids", "texts", "tokens", "seconds"):
        assert one[name] == two[name]
    assert torch.equal(one["lens"], two["lens"])
    assert one["features"].dtype == two["features"].dtype == torch.float32
    torch.testing.assert_close(one["features"], two["features"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["manifests", "fbank"])
def test_batches_without_augmentation_are_those_of_the_loader(data: Path, kind: str) -> None:
    manifest = cuts_path(data / kind, "train")
    store = FeatureStore.of(manifest, OPTIONS, "cpu")
    assert store.features.dtype == torch.float16 and len(store.ids) == 24 and not store.skipped
    plain, resident = (TrainBatches(manifest, OPTIONS, _encode, store=one) for one in (None, store))
    assert plain.batches_in(2) == resident.batches_in(2)
    pairs = [pair for _ in range(3) for pair in zip(list(plain), list(resident))]
    assert len(pairs) > 20 and plain.epoch == resident.epoch == 3
    for one, two in pairs:
        assert_same(one, two)
        assert two["frames"] == two["lens"].tolist()
        for ids, row, count in zip(two["tokens"], two["targets"], two["target_lens"]):
            assert row[:count].tolist() == ids and not row[count:].any()
        for row, length in zip(two["features"], two["frames"]):
            assert (row[length:] == np.float32(PADDING)).all()
    shares = [EvalBatches(manifest, OPTIONS, _encode, store=one) for one in (None, store)]
    for one, two in zip(*shares):
        assert_same(one, two)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_run_goes_on_from_any_batch_of_either_kind(data: Path, stop: int) -> None:
    manifest = cuts_path(data / "fbank", "train")
    options = dataclasses.replace(OPTIONS, spec_augment=True, frequency_warp=0.1, time_warp=10)
    store = FeatureStore.of(manifest, options, "cpu")
    whole = TrainBatches(manifest, options, _encode, store)
    expected = [batch for _ in range(2) for batch in whole]
    for kind in (None, store):  # the state of one leads the other on
        killed = TrainBatches(manifest, options, _encode, kind)
        source = iter(killed)
        for _ in range(stop):
            next(source)
        resumed = TrainBatches(manifest, options, _encode, store)
        resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
        rest = [batch for _ in range(2) for batch in resumed]
        assert len(rest) == len(expected) - stop
        for one, two in zip(expected[stop:], rest):
            assert_same(one, two, 0)


def test_cuts_of_one_recording_are_read_together(data: Path, tmp_path: Path, monkeypatch) -> None:
    cuts = list(CutSet.from_jsonl_lazy(cuts_path(data / "manifests", "train")))
    samples = [soundfile.read(cut.recording.sources[0].source, dtype="int16")[0] for cut in cuts]
    whole, path = np.concatenate(samples), tmp_path / "all.wav"
    soundfile.write(path, whole, 16_000)
    source = AudioSource("file", [0], str(path))
    recording = Recording("all", [source], 16_000, len(whole), len(whole) / 16_000)
    places = np.cumsum([0, *map(len, samples)]) / 16_000
    spans = [
        MonoCut(cut.id, float(place), cut.duration, 0, recording=recording, supervisions=cut.supervisions)
        for cut, place in zip(cuts, places)
    ]
    write_cuts(spans, tmp_path / "cuts.jsonl.gz")
    opened = []
    real = soundfile.SoundFile.__init__
    monkeypatch.setattr(
        soundfile.SoundFile, "__init__", lambda file, *args: opened.append(1) or real(file, *args)
    )
    joined = FeatureStore(tmp_path / "cuts.jsonl.gz")
    assert len(opened) == 1
    apart = FeatureStore(cuts_path(data / "manifests", "train"))
    assert torch.equal(joined.features, apart.features) and joined.ids == apart.ids
    long = dataclasses.replace(spans[-1], duration=5.0)  # longer than the recording; the others are good
    write_cuts([*spans[:-1], long], tmp_path / "cuts.jsonl.gz")
    damaged = FeatureStore(tmp_path / "cuts.jsonl.gz")
    assert damaged.ids == apart.ids[:-1] and "truncated" in damaged.skipped[24]["error"]
    kept = int(apart.frames[:-1].sum())
    assert torch.equal(damaged.features[:kept], apart.features[:kept])


def test_what_cannot_be_read_is_told_once(data: Path, tmp_path: Path, caplog) -> None:
    cuts = list(CutSet.from_jsonl_lazy(cuts_path(data / "manifests", "train")))
    gone = dataclasses.replace(cuts[3].recording.sources[0], source=str(tmp_path / "gone.flac"))
    cuts[3] = dataclasses.replace(cuts[3], recording=dataclasses.replace(cuts[3].recording, sources=[gone]))
    manifest = tmp_path / "cuts.jsonl.gz"
    write_cuts(cuts, manifest)
    batches = TrainBatches(manifest, OPTIONS, store=FeatureStore.of(manifest, OPTIONS, "cpu"))
    ids = [id for _ in range(2) for batch in batches for id in batch["ids"]]
    assert sorted(ids) == sorted(2 * [f"u{index}" for index in range(24) if index != 3])
    assert [entry["id"] for entry in batches.skipped] == ["u3"] and "gone.flac" in batches.skipped[0]["error"]
    evaluation = EvalBatches(manifest, OPTIONS, store=FeatureStore(manifest))
    assert sum(len(batch["ids"]) for batch in evaluation) == 23 and evaluation.skipped[0]["id"] == "u3"


def test_speed_perturbation_and_unreadable_noise(data: Path, tmp_path: Path) -> None:
    cuts = list(CutSet.from_jsonl_lazy(cuts_path(data / "manifests", "train")))
    faster = [cut.perturb_speed(speed) for cut in cuts[:6] for speed in (0.9, 1.1)]
    write_cuts(faster, tmp_path / "cuts.jsonl.gz")
    heard = list(CutSet.from_jsonl_lazy(cuts_path(data / "fbank", "train")))[:3]
    gone = dataclasses.replace(heard[1].features, storage_path=str(tmp_path / "gone.lca"))
    heard[1] = dataclasses.replace(heard[1], features=gone)
    write_cuts(heard, tmp_path / "noise.jsonl.gz")
    options = dataclasses.replace(OPTIONS, noise=str(tmp_path / "noise.jsonl.gz"), noise_share=0.0)
    store = FeatureStore.of(tmp_path / "cuts.jsonl.gz", options, "cpu")
    plain, resident = (TrainBatches(tmp_path / "cuts.jsonl.gz", options, store=one) for one in (None, store))
    for one, two in zip(list(plain), list(resident)):
        assert_same(one, two)
    assert [(entry["id"], entry["kind"]) for entry in resident.skipped] == [("u1", "noise")]


SHAPES = st.lists(st.one_of(st.integers(1, 900), st.integers(20_000, 60_000)), min_size=1, max_size=4)


@given(SHAPES, st.sampled_from(["float32", "int16", "both"]))
def test_features_together_are_those_of_each_alone(sizes: list[int], kind: str) -> None:
    rng = np.random.default_rng(len(sizes))
    pcm = [rng.integers(-9000, 9000, size).astype(np.int16) for size in sizes]
    samples = [one.astype(np.float32) / 32768 for one in pcm]
    expected = torch.cat([extract(one) for one in samples])
    whole = {"float32": [True], "int16": [False], "both": [True, False]}[kind]
    chosen = [one if whole[at % len(whole)] else raw for at, (one, raw) in enumerate(zip(samples, pcm))]
    made = extract_together(chosen)
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)
    if len(made):
        error = (made.half().float() - made).abs()
        assert error.max() < HALF and error.mean() < 0.001  # lilcom's are up to 0.016


def test_samples_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be finite numbers"):
        extract_together([np.array([0.0, np.nan] * 500, np.float32)])
    assert extract_together([]).shape == (0, 80)


@pytest.mark.parametrize(("form", "kind"), [("wav", "PCM_16"), ("flac", "PCM_16"), ("wav", "FLOAT")])
def test_audio_as_it_is_stored_is_the_same(tmp_path: Path, form: str, kind: str) -> None:
    path = tmp_path / f"a.{form}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 5000), 16_000, subtype=kind)
    expected, stored = (load_audio(path, offset=0.1, duration=0.2, as_stored=one) for one in (False, True))
    assert stored.dtype == (np.int16 if kind == "PCM_16" else np.float32)
    assert np.array_equal(expected, stored / np.float32(32768 if kind == "PCM_16" else 1))


def test_a_store_serves_what_it_was_made_for(data: Path) -> None:
    manifest = cuts_path(data / "fbank", "train")
    store = FeatureStore(manifest, "cpu", 0.5, 2.0)
    assert max(store.seconds) <= 2.0 and store.features.shape == (int(store.frames.sum()), 80)
    with pytest.raises(ValueError, match=r"min_seconds..max_seconds must lie in the 0.5-2 s .*, but is"):
        TrainBatches(manifest, OPTIONS, store=store)
    with pytest.raises(ValueError, match="FeatureStore.noise must be there, but is 'x'"):
        TrainBatches(manifest, dataclasses.replace(OPTIONS, noise="x", min_seconds=0.5, max_seconds=2.0),
                     store=store)
