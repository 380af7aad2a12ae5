"""Knows: batches, their order at scale, resuming, broken files. Must not know: models."""
from __future__ import annotations

import dataclasses
import itertools
import json
import runpy
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet
from lhotse.dataset import DynamicBucketingSampler

from icefall_fusion.data import bucketing, espeak
from icefall_fusion.data.audio import AudioError, load_audio
from icefall_fusion.data.bucketing import Epoch, Rules, epoch_lines
from icefall_fusion.data.cut_lines import CutLine, TruncatedError, cut_line, read_cut_lines
from icefall_fusion.data.datamodule import DataOptions, EvalBatches, TrainBatches
from icefall_fusion.data.fbank import FbankOptions, extract, run
from icefall_fusion.data.frequency_warp import warp_frequencies
from icefall_fusion.data.manifests import cut_of, cuts_path, spread, write_cuts

OPTIONS = DataOptions(
    max_duration=6, eval_duration=6, num_buckets=2, min_seconds=0.1, max_seconds=3, workers=0
)


LONG = {"max_duration": 60, "max_seconds": 25, "num_buckets": 5}


def _manifest(data: Path) -> Path:
    return cuts_path(data / "fbank", "train")


def _encode(text: str) -> list:
    return [ord(letter) for letter in text]


def test_stored_features_are_those_of_the_audio(data: Path) -> None:
    for cut in CutSet.from_jsonl_lazy(_manifest(data)):
        fresh = extract(load_audio(cut.recording.sources[0].source))
        assert np.abs(cut.load_features() - fresh.numpy()).max() < 0.05  # lilcom's step is 1/32


def test_eval_batches_are_complete_and_fixed(data: Path) -> None:
    batches = EvalBatches(_manifest(data), OPTIONS, _encode)
    first, second = list(batches), list(batches)
    ids = [id for batch in first for id in batch["ids"]]
    assert sorted(ids) == sorted(f"u{index}" for index in range(24)) and len(first) == len(batches)
    for one, two in zip(first, second):
        assert one["ids"] == two["ids"] and torch.equal(one["features"], two["features"])
        assert one["features"].shape == (len(one["ids"]), int(one["lens"].max()), 80)
        assert one["tokens"] == [_encode(text) for text in one["texts"]]
        assert one["features"].shape[1] * len(one["ids"]) <= 600
    fewer = EvalBatches(_manifest(data), OPTIONS, limit=5, done=["u4"])
    assert sum(len(batch["ids"]) for batch in fewer) == fewer.utterances == 4


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_processes_share_eval_batches(data: Path, world: int) -> None:
    whole = [batch["ids"] for batch in EvalBatches(_manifest(data), OPTIONS)]
    shares = [EvalBatches(_manifest(data), OPTIONS, rank=rank, world=world) for rank in range(world)]
    batches = [[batch["ids"] for batch in share] for share in shares]
    assert sorted(ids for share in batches for ids in share) == sorted(whole)
    assert sum(share.utterances for share in shares) == 24
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    with pytest.raises(ValueError, match="EvalBatches.rank must lie in .*, but is"):
        EvalBatches(_manifest(data), OPTIONS, rank=world, world=world)


@given(st.integers(0, 40), st.integers(0, 50))
def test_spread_is_even(size: int, count: int) -> None:
    chosen = spread(list(range(size)), count)
    assert len(chosen) == min(size, count or size) and chosen == sorted(set(chosen))
    gaps = [after - before for before, after in zip(chosen, [*chosen, size][1:])]
    assert not gaps or (chosen[0] == 0 and max(gaps) - min(gaps) <= 1)


def test_corpus_names_the_manifests(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(16_000), 16_000)
    cut = cut_of({"id": "a", "text": "x"}, tmp_path / "a.flac", 16_000, {"voice": "none"})
    write_cuts([cut], tmp_path / "manifests" / "other_cuts_dev.jsonl.gz")
    assert run(FbankOptions(tmp_path, ("dev",), workers=1, corpus="other")) == 0
    assert (tmp_path / "fbank" / "other_cuts_dev.jsonl.gz").is_file()
    assert cuts_path("data", "dev") == Path("data/minibooks_cuts_dev.jsonl.gz")
    for wrong in ("", "a/b"):
        message = f"FbankOptions.corpus must be a name without a slash, but is '{wrong}'"
        with pytest.raises(ValueError, match=message):
            FbankOptions(corpus=wrong)


def test_bounds_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_seconds must be below max_seconds \(3\), but is 3"):
        dataclasses.replace(OPTIONS, min_seconds=3)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_resume_goes_on_with_the_same_batches(data: Path, stop: int) -> None:
    whole = TrainBatches(_manifest(data), OPTIONS, _encode)
    expected = [batch for _ in range(2) for batch in whole]
    killed = TrainBatches(_manifest(data), OPTIONS, _encode)
    source = iter(killed)
    for _ in range(stop):
        next(source)
    resumed = TrainBatches(_manifest(data), OPTIONS, _encode)
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    rest = [batch for _ in range(2) for batch in resumed]
    assert len(rest) == len(expected) - stop
    for one, two in zip(expected[stop:], rest):
        assert one["ids"] == two["ids"] and torch.equal(one["features"], two["features"])
    assert [batch["ids"] for batch in expected[: len(expected) // 2]] != [
        batch["ids"] for batch in expected[len(expected) // 2 :]
    ]


def test_position_at_the_end_leads_into_the_next_epoch(data: Path) -> None:
    batches = TrainBatches(_manifest(data), OPTIONS)
    source = iter(batches)
    for _ in range(sum(1 for _ in TrainBatches(_manifest(data), OPTIONS))):
        next(source)
    resumed = TrainBatches(_manifest(data), OPTIONS)
    resumed.load_state_dict(batches.state_dict())
    assert sum(len(batch["ids"]) for batch in resumed) == 24 and resumed.epoch == 2


# --- order at scale ------------------------------------------------------------------------------------


def _described(path: Path, count: int) -> Path:
    """Write cuts of 1-20 s, in no order, whose audio and features need not be there."""
    rng = np.random.default_rng(7)
    cuts = []
    for number in range(count):
        samples = int(rng.integers(16_000, 320_000))
        utterance = {"id": f'u"{number}", "duration": 1', "text": "a word", "cased": 'A "word": {1}'}
        cuts.append(cut_of(utterance, Path(f"{number}.flac"), samples, {"voice": "none"}))
    write_cuts(cuts, path)
    return path


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("max_duration", [25.0, 200.0])
def test_order_is_that_of_lhotse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, max_duration: float
) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 500)
    monkeypatch.setattr(bucketing, "_BUCKET_SEED", 1234 - 3 - 2)  # lhotse's is the same in all epochs
    rules = Rules(2.0, 18.0, max_duration, 5, seed=3, buffer=60, world=world)
    groups = list(Epoch(manifest, rules, epoch=2))
    read = [cut_line(*line, manifest).cut() for line in epoch_lines(manifest, 3, 2)]
    for rank in range(world):
        kept = CutSet.from_cuts(read).filter(lambda cut: 2 <= cut.duration <= 18)
        theirs = DynamicBucketingSampler(
            kept, max_duration=max_duration, num_buckets=5, shuffle=True, seed=3, buffer_size=60,
            world_size=world, rank=rank,
        )
        theirs.set_epoch(2)
        expected = [[cut.id.split("_dup")[0] for cut in batch] for batch in theirs]
        assert [[line.cut().id for line in group[rank]] for group in groups] == expected


def test_epochs_differ_in_what_is_read_together_and_in_buckets(tmp_path: Path) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 2000)
    rules = Rules(1.0, 25.0, 60.0, 5, seed=3, buffer=100)

    def neighbors(epoch: int) -> set[frozenset[int]]:
        """Return the pairs of blocks of the manifest that met in a batch."""
        groups = Epoch(manifest, rules, epoch)
        met = [{cut.number // bucketing.BLOCK for cut in batch} for group in groups for batch in group]
        return {frozenset(pair) for blocks in met for pair in itertools.combinations(blocks, 2)}

    orders = [[number for number, _ in epoch_lines(manifest, 3, epoch)] for epoch in range(4)]
    assert orders[0] == list(range(1, 2001)) and all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[1] == [number for number, _ in epoch_lines(manifest, 3, 1)]
    assert orders[1] != [number for number, _ in epoch_lines(manifest, 4, 1)]
    assert len(neighbors(1) - neighbors(0)) > 5 and len(neighbors(2) - neighbors(1)) > 5
    longest = [[max(cut.duration for cut in group[0]) for group in Epoch(manifest, rules, e)] for e in (1, 2)]
    buckets = [np.searchsorted(Epoch(manifest, rules, 0).bins, one[:100]).tolist() for one in longest]
    assert buckets[0] != buckets[1]


def test_buckets_are_parted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 300)
    found = []
    find = Epoch._find_bins
    monkeypatch.setattr(Epoch, "_find_bins", lambda epoch: found.append(1) or find(epoch))
    order = TrainBatches(manifest, dataclasses.replace(OPTIONS, **LONG)).order
    for number in range(3):
        order.go_to(number)
        expected = [group[0] for group in Epoch(manifest, order._rules, number)]
        found.clear()
        assert [lines for _, lines in order] == expected and len(found) == (number == 0)
    _described(manifest, 200)  # another manifest
    assert len(list(order)) < len(expected) and len(found) == 1


def test_a_larger_buffer_shuffles_farther(tmp_path: Path) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 2000)

    def farthest(buffer: int) -> int:
        batches = TrainBatches(manifest, dataclasses.replace(OPTIONS, **LONG, buffer=buffer))
        return max(cuts[-1].number - cuts[0].number for _, cuts in batches.order)

    assert DataOptions().buffer == 20_000 and farthest(2000) > 2 * farthest(100)
    with pytest.raises(ValueError, match="DataOptions.buffer must be at least 1, but is 0"):
        DataOptions(buffer=0)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("world", [1, 3])
def test_a_position_leads_to_the_same_batches(tmp_path: Path, world: int, number: int) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 300)
    rules = Rules(2.0, 18.0, 60.0, 5, seed=3, buffer=50, world=world)
    epoch = Epoch(manifest, rules, number)
    positions, groups = [epoch.position()], []
    for group in epoch:
        groups.append(group)
        positions.append(json.loads(json.dumps(epoch.position())))
    for place in (0, 1, len(groups) // 2, len(groups)):
        assert list(Epoch(manifest, rules, number, positions[place])) == groups[place:]


def test_resuming_does_not_make_all_batches_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 300)
    monkeypatch.setattr(bucketing, "SNAPSHOT_EVERY", 8)
    options = DataOptions(max_duration=60, num_buckets=5, workers=0, buffer=50)
    whole = list(TrainBatches(manifest, options).order)
    killed = TrainBatches(manifest, options)
    ahead = iter(killed.order)
    for _ in range(20):  # as workers fetch in advance
        next(ahead)
    killed.order.used = 13
    state = json.loads(json.dumps(killed.state_dict()))
    assert state["position"]["groups"] == 8 and state["used"] == 13
    made = []
    next_batch = Epoch._next_batch
    monkeypatch.setattr(Epoch, "_next_batch", lambda epoch: made.append(1) or next_batch(epoch))
    other = {"position": {**state["position"], "key": "of other data"}}
    for changed, count in (({}, 6), ({"position": None}, 14), (other, 14)):
        resumed = TrainBatches(manifest, options)
        resumed.load_state_dict({**state, **changed})
        made.clear()
        assert next(iter(resumed.order)) == whole[13] and len(made) == count
        assert [lines for _, lines in resumed.order] == [lines for _, lines in whole[13:]]
    old = {name: state[name] for name in ("epoch", "used", "seed")}  # of a checkpoint without positions
    resumed.load_state_dict(old)
    assert list(resumed.order) == whole[13:]


def test_a_position_of_other_processes_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 300)
    monkeypatch.setattr(bucketing, "SNAPSHOT_EVERY", 4)
    options = DataOptions(max_duration=60, num_buckets=5, workers=0)
    alone = TrainBatches(manifest, options)
    for _, _ in zip(range(6), alone.order):
        alone.order.used += 1
    state = alone.state_dict()
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        one = TrainBatches(manifest, options)
        one.load_state_dict(state)
        shares.append([lines for _, lines in one.order])
    groups = list(Epoch(manifest, Rules(1.0, 25.0, 60.0, 5, 0, world=2), 0))[6:]
    assert [list(pair) for pair in zip(*shares)] == groups


def test_lines_are_parsed_only_where_lhotse_did_not_write_them(tmp_path: Path) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 5)
    cuts = list(CutSet.from_jsonl_lazy(manifest))
    lines = list(read_cut_lines(manifest))
    assert [line.duration for line in lines] == [cut.duration for cut in cuts]
    assert [line.cut() for line in lines] == cuts
    for separators in ((",", ":"), (", ", ": ")):  # another order of keys
        texts = [json.dumps(dict(reversed(cut.to_dict().items())), separators=separators) for cut in cuts]
        other = tmp_path / "other.jsonl"
        other.write_text("\n".join(texts))
        assert [line.duration for line in read_cut_lines(other)] == [cut.duration for cut in cuts]
    mixed = cuts[0].append(cuts[1])
    CutSet([mixed]).to_file(tmp_path / "mixed.jsonl")
    assert [line.cut() for line in read_cut_lines(tmp_path / "mixed.jsonl")] == [mixed]
    with pytest.raises(ValueError, match="line 3 of the manifest is no cut of lhotse's"):
        CutLine(3, 1.0, b'{"id": "a", "start": 0, "duration": 1.0, ').cut()
    for broken in ("[]", "{", '{"id": "a", "recording_id": "a", "start": 0, "duration": 1}'):
        other.write_text("\n".join([*texts, broken]))
        with pytest.raises(ValueError, match="other.jsonl, line 6 is no cut of lhotse's"):
            list(read_cut_lines(other))


def test_a_manifest_that_was_cut_short_is_named(tmp_path: Path) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 2000)
    whole = list(read_cut_lines(manifest))
    manifest.write_bytes(manifest.read_bytes()[:-3000])
    found = []
    with pytest.raises(TruncatedError, match=r"cuts.jsonl.gz is truncated or damaged after line \d+"):
        for line in read_cut_lines(manifest):
            found.append(line)
    assert found == whole[: len(found)] and 1000 < len(found) < 2000
    with pytest.raises(TruncatedError):
        list(TrainBatches(manifest, DataOptions(max_duration=60, workers=0)).order)


def test_too_few_utterances_for_the_buckets_are_refused(tmp_path: Path) -> None:
    manifest = _described(tmp_path / "cuts.jsonl.gz", 4)
    message = r"hold at least 20 \(num_buckets\) cuts of 1.0-25.0 s, but is 4"
    with pytest.raises(ValueError, match=message):
        next(iter(TrainBatches(manifest, DataOptions(workers=0)).order))


def test_bench_of_the_data_pipeline(tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[2] / "tools" / "bench" / "data_pipeline.py"
    bench = runpy.run_path(str(tool))
    spoken = 12 if espeak.available() else 0
    options = bench["BenchOptions"](cuts=3000, points=3, lhotse_cuts=1000, spoken=spoken)
    figures = bench["measure"](options, tmp_path)
    assert not spoken or all(value > 0 for value in figures["resident"].values())
    assert figures["resume"]["same_next_batch"] and len(figures["points"]) == 3
    assert figures["points"][-1]["cuts"] == 3000 and figures["memory_growth_mb"] < 50


def test_workers_do_not_change_batches(data: Path) -> None:
    alone = list(TrainBatches(_manifest(data), OPTIONS))
    helped = list(TrainBatches(_manifest(data), dataclasses.replace(OPTIONS, workers=2)))
    assert [batch["ids"] for batch in alone] == [batch["ids"] for batch in helped]
    assert all(torch.equal(one["features"], two["features"]) for one, two in zip(alone, helped))


def test_spec_augment_changes_training_only(data: Path) -> None:
    plain = {}
    for batch in EvalBatches(_manifest(data), OPTIONS):
        plain.update(zip(batch["ids"], batch["features"]))
    changed = 0
    for batch in TrainBatches(_manifest(data), OPTIONS):
        for id, features, length in zip(batch["ids"], batch["features"], batch["lens"]):
            changed += not torch.equal(features[:length], plain[id][:length])
    assert changed > 12


@pytest.mark.parametrize("factor", [0.85, 0.95, 1.1])
@pytest.mark.parametrize("peak", [300.0, 1000.0, 3000.0])
def test_a_warped_resonance_lies_where_the_factor_says(factor: float, peak: float) -> None:
    mel = lambda hertz: 1127.0 * np.log1p(hertz / 700.0)  # noqa: E731
    centers = np.linspace(mel(20.0), mel(7600.0), 82)[1:-1]
    features = torch.from_numpy(np.exp(-0.5 * ((centers - mel(peak)) / 60.0) ** 2))[None]
    found = int(warp_frequencies(features, factor).argmax())
    assert found == np.abs(centers - mel(factor * peak)).argmin()


def test_warping_by_one_changes_nothing_and_nothing_leaves_the_range() -> None:
    features = torch.randn(7, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(warp_frequencies(features, 1.0), features, atol=1e-4, rtol=0)
    for factor in (0.8, 1.25):
        warped = warp_frequencies(features, factor)
        assert features.min() <= warped.min() and warped.max() <= features.max()
    assert warp_frequencies(features[:0], 0.9).shape == (0, 80)


def test_frequency_warp_is_drawn_for_each_utterance_and_resumes(data: Path) -> None:
    options = dataclasses.replace(OPTIONS, spec_augment=False, frequency_warp=0.2)
    plain = {}
    for batch in EvalBatches(_manifest(data), options):
        plain.update(zip(batch["ids"], batch["features"]))
    batches = [list(TrainBatches(_manifest(data), options)) for _ in range(2)]
    for one, two in zip(*batches):
        assert torch.equal(one["features"], two["features"])
    for batch in batches[0]:
        for id, features, length in zip(batch["ids"], batch["features"], batch["lens"]):
            assert not torch.equal(features[:length], plain[id][:length])
    with pytest.raises(ValueError, match="DataOptions.frequency_warp must lie in 0..0.5, but is 0.7"):
        dataclasses.replace(OPTIONS, frequency_warp=0.7)


def test_broken_files_are_skipped_and_listed(data: Path, tmp_path: Path) -> None:
    cuts = list(CutSet.from_jsonl_lazy(_manifest(data)))
    archive = Path(cuts[0].features.storage_path)
    short = tmp_path / archive.name
    short.write_bytes(archive.read_bytes()[:-2000])  # the last utterance of the archive loses its end
    damaged = [dataclasses.replace(cut, features=dataclasses.replace(cut.features, storage_path=str(short)))
               for cut in cuts[:10]]
    no_audio = [dataclasses.replace(cut, features=None) for cut in cuts[20:22]]
    gone = dataclasses.replace(no_audio[1].recording.sources[0], source=str(tmp_path / "gone.flac"))
    recording = dataclasses.replace(no_audio[1].recording, sources=[gone])
    no_audio[1] = dataclasses.replace(no_audio[1], recording=recording)
    manifest = tmp_path / "cuts.jsonl.gz"
    write_cuts([*damaged, *no_audio], manifest)
    batches = EvalBatches(manifest, OPTIONS)
    ids = {id for batch in batches for id in batch["ids"]}
    assert ids == {f"u{index}" for index in range(9)} | {"u20"}
    assert {entry["id"] for entry in batches.skipped} == {"u9", "u21"}
    assert any("gone.flac" in entry["error"] for entry in batches.skipped)


def test_fbank_job_lists_broken_audio(tmp_path: Path) -> None:
    samples = np.random.default_rng(1).uniform(-0.2, 0.2, 32_000)
    cuts = []
    for name in ("good", "short", "missing"):
        path = tmp_path / f"{name}.flac"
        if name != "missing":
            soundfile.write(path, samples, 16_000)
        cuts.append(cut_of({"id": name, "text": "x"}, path, len(samples), {"voice": "noise"}))
    data = (tmp_path / "short.flac").read_bytes()
    (tmp_path / "short.flac").write_bytes(data[: len(data) // 2])
    write_cuts(cuts, cuts_path(tmp_path / "manifests", "dev"))
    assert run(FbankOptions(tmp_path, ("dev",), workers=1)) == 3
    report = json.loads((tmp_path / "fbank" / "compute-fbank-dev.json").read_text())
    assert {entry["id"] for entry in report["skipped"]} == {"short", "missing"} and report["utterances"] == 1


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (16_000, 2), (44_100, 2), (48_000, 1)])
def test_load_audio_resamples_and_mixes(tmp_path: Path, rate: int, channels: int) -> None:
    time = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * time) * 0.5
    soundfile.write(tmp_path / "a.wav", np.stack([tone] * channels, axis=1), rate)
    samples = load_audio(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and samples.shape == (16_000,)
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) * 0.5
    assert np.abs(samples - expected)[1000:-1000].max() < 0.01


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(("offset", "duration"), [(0.0, 0.5), (0.7013, 1.1), (1.23456, None), (2.9, 5.0)])
def test_a_part_of_a_file_is_that_of_the_whole(
    tmp_path: Path, rate: int, offset: float, duration: Optional[float]
) -> None:
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(2).uniform(-0.3, 0.3, 3 * rate), rate)
    whole = load_audio(tmp_path / "a.flac")
    part = load_audio(tmp_path / "a.flac", offset=offset, duration=duration)
    first = round(offset * 16_000)
    expected = whole[first:] if duration is None else whole[first : first + round(duration * 16_000)]
    assert part.shape == expected.shape and np.abs(part - expected).max() < 1e-6


def test_a_part_reads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(60 * 8_000), 8_000)
    seen = []
    read = soundfile.SoundFile.read

    def counting(file: soundfile.SoundFile, frames: int, **kind: object) -> np.ndarray:
        seen.append(frames)
        return read(file, frames, **kind)

    monkeypatch.setattr(soundfile.SoundFile, "read", counting)
    assert len(load_audio(tmp_path / "a.wav", offset=50, duration=2.0)) == 32_000
    assert sum(seen) < 2.1 * 8_000


def test_a_part_behind_the_end_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(8_000), 8_000)
    with pytest.raises(AudioError, match="a.flac holds no samples after 2 s"):
        load_audio(tmp_path / "a.flac", offset=2, duration=1.0)
    assert len(load_audio(tmp_path / "a.flac", allow_empty=True, offset=2)) == 0
    with pytest.raises(ValueError, match="offset must be at least 0 seconds, but is -1"):
        load_audio(tmp_path / "a.flac", offset=-1)
    with pytest.raises(ValueError, match="duration must be more than 0 seconds, but is 0"):
        load_audio(tmp_path / "a.flac", duration=0)


def test_load_audio_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.wav"):
        load_audio(tmp_path / "nowhere.wav")
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    for name in ("zero.wav", "text.wav", "none.wav"):
        with pytest.raises(AudioError, match=name):
            load_audio(tmp_path / name)
    assert len(load_audio(tmp_path / "none.wav", allow_empty=True)) == 0


def test_missing_manifest_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="nothing.jsonl.gz"):
        TrainBatches("nothing.jsonl.gz", OPTIONS)
