"""Knows: features of whole and chunked audio, of cuts, of torchaudio, and of shards that machines share.
Must not know: models.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from icefall_fusion.data import cut_audio, fbank, feature_shards
from icefall_fusion.data.audio import AudioError, load_audio
from icefall_fusion.data.cut_audio import cut_samples
from icefall_fusion.data.fbank import FbankOptions, extract, num_frames, run
from icefall_fusion.data.features import DIM
from icefall_fusion.data.manifests import cuts_path, write_cuts


def _noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, count).astype(np.float32)


@pytest.mark.parametrize(
    "count", [16_000 * 3, 16_000 * 3 + 79, 16_000 * 3 + 81, 16_000 * 2 + 700, 16_000 + 1, 47_999]
)
def test_chunked_is_whole(count: int) -> None:
    samples = _noise(count)
    whole = extract(samples)
    assert whole.shape == (num_frames(count), DIM)
    torch.testing.assert_close(extract(samples, chunk_seconds=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 79, 80, 159, 399, 400, 401, 1000])
def test_short_audio(count: int) -> None:
    features = extract(_noise(count))
    assert features.shape == (num_frames(count), DIM)
    assert torch.isfinite(features).all()


def test_silence_is_finite() -> None:
    assert torch.isfinite(extract(np.zeros(16_000, np.float32))).all()


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        extract(np.full(1600, np.nan, np.float32))


def test_resampling_keeps_the_frame_rate() -> None:
    time = np.arange(44_100) / 44_100
    high = extract(np.sin(2 * np.pi * 1000 * time).astype(np.float32), 44_100)
    low = extract(np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32))
    assert high.shape == low.shape
    assert high.argmax(dim=1).float().median() == low.argmax(dim=1).float().median()


def torchaudios(samples: np.ndarray) -> torch.Tensor:
    """Features [T, 80] by torchaudio, with our options; without it the test is skipped."""
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    return kaldi.fbank(
        torch.from_numpy(samples)[None],
        num_mel_bins=DIM,
        sample_frequency=16_000,
        high_freq=-400.0,
        dither=0.0,
        snip_edges=False,
        energy_floor=1e-10,
    )


def test_agrees_with_torchaudio() -> None:
    samples = _noise(16_000)
    torch.testing.assert_close(extract(samples), torchaudios(samples), atol=2e-3, rtol=1e-3)


def _recording(path: Path, rate: int, seconds: float) -> Recording:
    soundfile.write(path, _noise(round(rate * seconds), rate), rate)
    return Recording.from_file(path)


def _cut(id: str, place: tuple[float, float], recording: Recording) -> MonoCut:
    start, seconds = place
    said = SupervisionSegment(id, recording.id, 0.0, seconds, text="x", speaker="noise")
    return MonoCut(id, start, seconds, 0, recording=recording, supervisions=[said])


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050])
def test_cuts_of_any_sampling_rate_have_their_features(tmp_path: Path, rate: int) -> None:
    recording = _recording(tmp_path / "long.flac", rate, 6.0)
    places = [(0.0, 6.0), (0.0, 1.5), (2.25, 1.503), (4.497, 1.503)]
    cuts = [_cut(f"c{number}", place, recording) for number, place in enumerate(places)]
    whole = load_audio(tmp_path / "long.flac")
    assert len(whole) == 96_000
    for cut in cuts:
        first, count = round(cut.start * 16_000), round(cut.duration * 16_000)
        np.testing.assert_allclose(cut_samples(cut), whole[first : first + count], atol=1e-6)
    write_cuts(cuts, cuts_path(tmp_path / "manifests", "dev"))
    assert run(FbankOptions(tmp_path, ("dev",), workers=1)) == 0
    for cut in CutSet.from_jsonl_lazy(cuts_path(tmp_path / "fbank", "dev")):
        stored, samples = cut.load_features(), cut_samples(cut)
        assert stored.shape == (cut.num_frames, DIM) == (num_frames(round(cut.duration * 16_000)), DIM)
        assert np.abs(stored - extract(samples).numpy()).max() < 0.05  # lilcom's step is 1/32


def test_changed_speed_is_resampled_too(tmp_path: Path) -> None:
    cut = _cut("c", (0.0, 2.0), _recording(tmp_path / "a.flac", 8_000, 2.0)).perturb_speed(1.1)
    assert len(cut_samples(cut)) == pytest.approx(16_000 * cut.duration, abs=2)


def test_cuts_of_a_truncated_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    recording = _recording(path, 8_000, 6.0)
    early, late = _cut("early", (0.5, 1.0), recording), _cut("late", (5.0, 1.0), recording)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match="a.flac"):
        cut_samples(late)
    soundfile.write(path, _noise(8_000 * 5), 8_000)  # whole, but shorter than the manifest says
    assert len(cut_samples(early)) == 16_000
    with pytest.raises(AudioError, match="a.flac is truncated: .* the manifest needs 96000"):
        cut_samples(late)
    soundfile.write(path, _noise(8_000 * 6 - 20), 8_000)
    samples = cut_samples(late)
    assert len(samples) == 16_000 and not samples[-40:].any() and samples[-50:].any()


# --- shards ---------------------------------------------------------------------------------------------


@pytest.fixture()
def corpus(tmp_path: Path) -> FbankOptions:
    """Ten cuts of one recording in four shards."""
    _write_corpus(tmp_path, 0.0)
    return FbankOptions(tmp_path, ("train",), workers=1, shard_size=3)


def _write_corpus(folder: Path, offset: float, text: str = "x") -> None:
    path = folder / "long.flac"
    if not path.exists():
        soundfile.write(path, _noise(16_000 * 8), 16_000)
    recording = Recording.from_file(path)
    cuts = [_cut(f"c{number}", (offset + 0.6 * number, 0.5), recording) for number in range(10)]
    for cut in cuts:
        cut.supervisions[0].text = text
    write_cuts(cuts, cuts_path(folder / "manifests", "train"))


def _features(options: FbankOptions, split: str = "train") -> dict[str, np.ndarray]:
    cuts = CutSet.from_jsonl_lazy(cuts_path(options.data_dir / "fbank", split))
    return {cut.id: cut.load_features() for cut in cuts}


def _archives(options: FbankOptions) -> set[str]:
    return {path.name for path in (options.data_dir / "fbank" / "train").iterdir()}


def _assert_whole(options: FbankOptions) -> None:
    """All ten cuts are there in their order, and no file that is not used."""
    found = _features(options)
    assert list(found) == [f"c{number}" for number in range(10)]
    samples = load_audio(options.data_dir / "long.flac")
    for number, features in enumerate(found.values()):
        expected = extract(samples[round(9600 * number) :][:8000]).numpy()
        assert np.abs(features - expected).max() < 0.05
    cuts = CutSet.from_jsonl_lazy(cuts_path(options.data_dir / "fbank", "train"))
    assert {Path(cut.features.storage_path).name for cut in cuts} == _archives(options)


def test_machines_share_the_shards_of_one_folder(
    corpus: FbankOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    target = cuts_path(corpus.data_dir / "fbank", "train")
    assert run(dataclasses.replace(corpus, start=1, stop=3)) == 4 and not target.exists()
    assert "2 of 4 shards are missing: 0, 3 (--start" in capsys.readouterr().out
    assert run(dataclasses.replace(corpus, start=3, stop=1000)) == 4
    assert run(dataclasses.replace(corpus, stop=1)) == 0
    _assert_whole(corpus)
    report = json.loads((target.parent / "compute-fbank-train.json").read_text())
    assert report["utterances"] == 10 and report["skipped"] == [] and report["skipped_count"] == 0
    before = gzip.decompress(target.read_bytes())
    assert run(corpus) == 0 and len(_archives(corpus)) == 4
    assert gzip.decompress(target.read_bytes()) == before


@pytest.mark.parametrize("late", [False, True])
def test_two_machines_at_the_same_shard(
    corpus: FbankOptions, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    publish, others = feature_shards.Shard.publish, []

    def while_another_publishes(shard: feature_shards.Shard, made: list, archive: Path, again: bool) -> None:
        if not others:
            others.append(archive.name)
            assert run(corpus) == 0  # the other machine does all of it in the meantime
            _assert_others(corpus, archive)
        publish(shard, made, archive, again or late)  # late: it looked before the other one wrote

    def _assert_others(options: FbankOptions, archive: Path) -> None:
        cuts = CutSet.from_jsonl_lazy(cuts_path(options.data_dir / "fbank", "train"))
        assert archive.exists() and archive.name not in {Path(c.features.storage_path).name for c in cuts}

    monkeypatch.setattr(feature_shards.Shard, "publish", while_another_publishes)
    assert run(corpus) == 0
    assert len(_features(corpus)) == 10
    if late:
        assert len(_archives(corpus)) == 5  # what the other joined stays good
    else:
        _assert_whole(corpus)


def test_names_of_features_depend_on_all_that_matters(corpus: FbankOptions) -> None:
    assert run(corpus) == 0
    first, archives = _features(corpus), _archives(corpus)
    _write_corpus(corpus.data_dir, 0.0, "another text")
    assert run(corpus) == 0 and _archives(corpus) == archives  # the features are those of before
    cuts = list(CutSet.from_jsonl_lazy(cuts_path(corpus.data_dir / "fbank", "train")))
    assert {cut.supervisions[0].text for cut in cuts} == {"another text"}
    _write_corpus(corpus.data_dir, 0.25)
    assert run(corpus) == 0 and len(_archives(corpus) - archives) == 4
    second = _features(corpus)
    assert all(np.abs(first[id] - second[id]).max() > 0.5 for id in first)


def test_a_killed_job_goes_on(corpus: FbankOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(samples: np.ndarray, **options: str) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return extract(samples, **options)

    monkeypatch.setattr(fbank, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(corpus)
    assert run(corpus) == 0 and len(calls) == 5 + 7  # the first shard was done
    _assert_whole(corpus)
    archives = corpus.data_dir / "fbank" / "train"
    for name, age in ((".old.lca", 30), (".new.lca", 1)):
        (archives / name).write_text("half")
        os.utime(archives / name, (time.time() - age * 3600,) * 2)
    assert run(corpus) == 0
    assert not (archives / ".old.lca").exists() and (archives / ".new.lca").exists()


def test_audio_that_comes_later(corpus: FbankOptions) -> None:
    audio = corpus.data_dir / "long.flac"
    audio.rename(corpus.data_dir / "away.flac")
    assert run(corpus) == 3
    report = json.loads((corpus.data_dir / "fbank" / "compute-fbank-train.json").read_text())
    assert report["skipped_count"] == 10 and report["utterances"] == 0
    assert "long.flac" in report["skipped"][0]["error"] and report["skipped"][0]["id"] == "c0"
    (corpus.data_dir / "away.flac").rename(audio)
    assert run(corpus) == 3  # shards are not computed again unless asked
    assert run(dataclasses.replace(corpus, retry=True)) == 0
    assert len(_features(corpus)) == 10


def test_workers_do_not_change_features(corpus: FbankOptions) -> None:
    assert run(dataclasses.replace(corpus, workers=2)) == 0
    _assert_whole(corpus)


def test_on_a_gpu_workers_are_threads_that_read(
    corpus: FbankOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)

    def read(cut: MonoCut) -> np.ndarray:
        if cut.id in ("c0", "c1"):
            both.wait(60)  # passed only while two threads read
        return cut_samples(cut)

    monkeypatch.setattr(cut_audio, "cut_samples", read)
    assert run(dataclasses.replace(corpus, workers=2, device="cpu:0")) == 0  # any device but "cpu" is one GPU
    _assert_whole(corpus)


def test_changed_speeds_and_shuffled_shards(corpus: FbankOptions) -> None:
    assert run(dataclasses.replace(corpus, speed_perturb=True, shuffle=True)) == 0
    cuts = list(CutSet.from_jsonl_lazy(cuts_path(corpus.data_dir / "fbank", "train")))
    ids = [cut.id for cut in cuts]
    assert len(ids) == 30 and {"c0", "c0_sp0.9", "c0_sp1.1"} <= set(ids) and ids[0] != "c0"
    for cut in cuts:
        assert cut.load_features().shape == (cut.num_frames, DIM)
    assert len(_archives(corpus)) == 4


def test_broken_manifests_are_named(corpus: FbankOptions) -> None:
    manifest = cuts_path(corpus.data_dir / "manifests", "train")
    data = manifest.read_bytes()
    manifest.write_bytes(data[:-30])
    with pytest.raises(ValueError, match="minibooks_cuts_train.jsonl.gz is truncated or damaged after line"):
        run(corpus)
    plain = _cut("c", (0.0, 1.0), Recording.from_file(corpus.data_dir / "long.flac"))
    write_cuts([plain, dataclasses.replace(plain, recording=None)], manifest)
    with pytest.raises(ValueError, match="cuts_train.jsonl.gz, line 2 is no cut of one recording"):
        run(corpus)
    for wrong in ({"start": -1}, {"start": 3, "stop": 3}):
        with pytest.raises(ValueError, match="FbankOptions.st(art|op) must be"):
            dataclasses.replace(corpus, **wrong)


def test_ranges() -> None:
    assert feature_shards.ranges([]) == "" and feature_shards.ranges([3, 4, 5, 7, 9, 10]) == "3-5, 7, 9-10"
