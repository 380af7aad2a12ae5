"""Input that is long, silent, cut short or without references, through whole jobs on tiny random models.
Knows: jobs and their files. Must not know: how they work.
"""
from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.sources import CheckpointSource, EmissionOptions, open_source
from icefall_fusion.data.audio import AudioError, load_audio
from icefall_fusion.data.manifests import cut_of, write_cuts
from icefall_fusion.decode.utterances import InputError, read_cuts
from icefall_fusion.decode.weights import read_weights
from icefall_fusion.nbest import NBest, read_nbests


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.acoustic_model(tmp_path_factory.mktemp("model")))


def manifest(folder: Path, samples: dict[str, np.ndarray], rate: int = 16000) -> str:
    cuts = []
    for name, values in samples.items():
        path = folder / f"{name}.wav"
        soundfile.write(path, values, rate)
        cuts.append(cut_of({"id": name, "text": "the cat"}, path, len(values), {"voice": "v"}))
    write_cuts(cuts, folder / "cuts.jsonl.gz")
    return str(folder / "cuts.jsonl.gz")


def decode(model: str, cuts: str, out: Path, *more: str) -> int:
    command = ["--emissions.model", model, "--test_sets.noise", cuts, "--methods", "ctc-prefix"]
    return main(["decode", *command, "--search.beam", "2", "--out", str(out), *more])


def lists(out: Path, method: str = "ctc-prefix") -> dict[str, NBest]:
    return {nbest.utterance: nbest for nbest in read_nbests(out / f"nbest-noise-{method}.jsonl")}


def test_half_an_hour_in_one_cut_is_never_held_as_one_batch(model, tmp_path, monkeypatch) -> None:
    minutes = 31
    second = np.random.default_rng(3).normal(0, 0.1, 16000).astype(np.float32)
    cuts = manifest(tmp_path, {"long": np.tile(second, 60 * minutes)})
    seen = []

    real = CheckpointSource.emit

    def emit(source, ids, inputs):
        seen.append(sum(map(len, inputs)) / 100)  # seconds of a batch
        return real(source, ids, inputs)

    monkeypatch.setattr(CheckpointSource, "emit", emit)
    more = ["--batch_seconds", "240", "--methods", "ctc-greedy"]
    assert decode(model, cuts, tmp_path / "out", *more) == 0
    assert max(seen) <= 240 and sum(seen) == pytest.approx(60 * minutes, abs=1)
    times = lists(tmp_path / "out", "ctc-greedy")["long"][0].times
    assert 60 * minutes - 60 < times[-1].end <= 60 * minutes
    assert [time.start for time in times] == sorted(time.start for time in times)


def test_parts_of_a_long_cut_are_joined_when_saved_log_probs_are_decoded(model, tmp_path, capsys) -> None:
    noise = np.random.default_rng(4).normal(0, 0.1, 48000)
    cuts = manifest(tmp_path, {"long": noise, "short": noise[:16000]})
    kept = tmp_path / "kept"
    assert decode(model, cuts, tmp_path / "one", "--longest", "1", "--save_emissions", str(kept)) == 0
    source = open_source(EmissionOptions(str(kept / "noise"), tokens=model))
    saved_log_probs = source.emit(["long", "short"])
    assert saved_log_probs.lens[0] > 2.5 * saved_log_probs.lens[1]
    (kept / "noise" / ".emissions-0.npz.half.npz").write_bytes(b"PK")  # what a kill leaves
    saved = ["--emissions.tokens", model]
    assert decode(str(kept / "noise"), cuts, tmp_path / "two", *saved) == 0
    assert lists(tmp_path / "two")["long"][0].times[-1].end > 2.0
    assert decode(model, cuts, tmp_path / "three", "--longest", "60", "--save_emissions", str(kept)) == 0
    assert decode(str(kept / "noise"), cuts, tmp_path / "four", *saved) == 2  # whole and in parts
    assert "save each run into a folder of its own" in capsys.readouterr().err


def test_silence_is_decoded(model, tmp_path) -> None:
    cuts = manifest(tmp_path, {"silent": np.zeros(16000), "one": np.zeros(400)})
    assert decode(model, cuts, tmp_path / "out") == 0
    assert sorted(lists(tmp_path / "out")) == ["one", "silent"]


def test_the_record_of_a_run_is_whole(model, tmp_path) -> None:
    cuts = manifest(tmp_path, {"a": np.zeros(16000)})
    assert decode(model, cuts, tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "done" and record["device"] and record["git_commit"] and record["threads"] >= 1
    assert {"python", "torch", "transformers", "lhotse"} <= record["versions"].keys()
    assert record["options"]["search"]["beam"] == 2 and record["wall_seconds"] > 0
    row = record["test_sets"]["noise"]["ctc-prefix"]
    assert row["options"]["search"]["beam"] == 2 and row["peak_memory_bytes"] > 0
    assert {"features", "encoder", "search", "lm", "peak_memory_bytes"} <= row["stages"].keys()


def test_an_lm_over_other_pieces_is_refused_with_both_sizes(model, tmp_path, capsys) -> None:
    cuts = manifest(tmp_path, {"a": np.zeros(16000)})
    other = tiny.language_model(tmp_path / "llm", seed=1, pieces=False)
    more = ["--methods", "nlm-shallow", "--nlm.path", str(other)]
    assert decode(model, cuts, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert str(tiny.piece_count()) in error, error


def test_without_references_there_is_no_wer_but_valid_json(model, tmp_path, capsys) -> None:
    path = Path(manifest(tmp_path, {"a": np.random.default_rng(5).normal(0, 0.1, 16000)}))
    cut = json.loads(gzip.decompress(path.read_bytes()))
    cut["supervisions"] = []
    path.write_bytes(gzip.compress(json.dumps(cut).encode() + b"\n"))
    assert decode(model, str(path), tmp_path / "out") == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (row,) = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse)
    assert row["wer"] is None and row["words"] == 0 and row["rtf"] > 0
    json.loads((tmp_path / "out" / "run.json").read_text(), parse_constant=refuse)
    assert main(["report", "--runs", str(tmp_path / "out"), "--out", str(tmp_path / "report")]) == 0
    assert "ctc-prefix" in capsys.readouterr().out
    assert not (tmp_path / "report" / "wer-vs-speed.png").exists()


def test_cuts_of_all_kinds_are_read_or_named(tmp_path) -> None:
    """Padded, mixed, cut out, of one channel, of another rate; without a recording, with a broken one."""
    from lhotse import CutSet, MonoCut, Recording

    rng = np.random.default_rng(6)

    def cut(name: str, samples: np.ndarray, rate: int = 16000, seconds: float = 1.0) -> MonoCut:
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, samples, rate, "FLOAT")
        return MonoCut(name, 0.0, seconds, samples.ndim - 1, recording=Recording.from_file(path))

    a, low = cut("a", rng.normal(0, 0.1, 16000)), cut("low", rng.normal(0, 0.1, 8000), 8000)
    two = cut("two", rng.normal(0, 0.1, (16000, 2)))
    bad = cut("bad", np.full(16000, np.nan), seconds=0.5)
    gone = cut("gone", np.zeros(16000), seconds=0.5)
    (tmp_path / "gone.wav").unlink()
    cuts = [
        a, low, two, bad, gone, MonoCut("none", 0.0, 1.0, 0),
        a.pad(duration=1.5).with_id("padded"), low.pad(duration=1.5).with_id("low-padded"),
        a.mix(two.with_id("b"), snr=10).with_id("mixed"), a.truncate(offset=0.25).with_id("part"),
        a.append(gone.with_id("b")).with_id("half-gone"),
    ]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    seconds = {"a": 1, "low": 1, "two": 1, "padded": 1.5, "low-padded": 1.5, "mixed": 1, "part": 0.75}
    for wants, rate in (("audio", 16000), ("features", 100)):
        read = {u.id: u for u in read_cuts(tmp_path / "cuts.jsonl.gz", wants)}
        assert {name: len(read[name].load()) for name in seconds} == {n: s * rate for n, s in seconds.items()}
        for name in ("bad", "gone", "none", "half-gone"):
            with pytest.raises(InputError, match=f"audio of {name} cannot be read"):
                read[name].load()
    wave, _ = soundfile.read(tmp_path / "two.wav", dtype="float32")
    read = {u.id: u for u in read_cuts(tmp_path / "cuts.jsonl.gz", "audio")}
    assert np.abs(read["two"].load().numpy() - wave[:, 1]).max() < 1e-6  # not the mean of both channels


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1, 2]", b"{", b"\xff", gzip.compress(b"{}" * 99, mtime=0)[:-9]]
)
@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_a_broken_manifest_is_named(name, content, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    message = rf"{name} (cannot be loaded as a manifest of cuts: |must hold at least one cut)"
    with pytest.raises(ValueError, match=message):
        read_cuts(tmp_path / name, "features")


def test_a_manifest_of_recordings_is_no_manifest_of_cuts(tmp_path) -> None:
    from lhotse import Recording, RecordingSet

    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    recordings = RecordingSet.from_recordings([Recording.from_file(tmp_path / "a.wav")])
    recordings.to_file(tmp_path / "recordings.jsonl")
    with pytest.raises(ValueError, match="recordings.jsonl cannot be loaded as a manifest of cuts"):
        read_cuts(tmp_path / "recordings.jsonl", "features")


def test_when_nothing_can_be_read_the_run_says_so(model, tmp_path) -> None:
    cuts = manifest(tmp_path, {"gone": np.zeros(16000)})
    (tmp_path / "gone.wav").unlink()
    assert decode(model, cuts, tmp_path / "out") == 3
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["wer"] is None and row["words"] == 0


@pytest.mark.parametrize("stereo", [False, True])
def test_a_wav_file_that_was_cut_short_is_refused(stereo, tmp_path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros((8000, 2) if stereo else 8000), 44100)
    assert len(load_audio(path)) == pytest.approx(8000 * 16000 / 44100, abs=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:9000])
    with pytest.raises(AudioError, match=rf"a.wav is truncated: it has 9000 of {len(whole)} bytes"):
        load_audio(path)
    path.write_bytes(whole[:4] + b"\xff" * 4 + whole[8:])  # as recorders into pipes leave it
    assert len(load_audio(path)) > 0


@pytest.mark.parametrize(("device", "message"), [("gpu", "a device such as cpu"), ("cuda:99", "GPUs that")])
def test_devices_that_are_not_there_are_named(device, message, model) -> None:
    with pytest.raises(ValueError, match=f"EmissionOptions.device must be .*{message}.*but is '{device}'"):
        open_source(EmissionOptions(model, device=device))


def test_weights_that_are_no_yaml_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="weights at .*none.yaml"):
        read_weights(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="bad.yaml must be YAML"):
        read_weights(str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="numbers by method and source"):
        read_weights(str(tmp_path / "list.yaml"))
