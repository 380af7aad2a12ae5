"""The job decode end to end on tiny random models: files and rows, resume after a kill, other options.
Knows: jobs and their files. Must not know: how a search works.
"""
from __future__ import annotations

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from job_tools import arguments, assert_same, lists

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.sources import EmissionOptions, open_source
from icefall_fusion.decode.method_names import METHODS, parse_method
from icefall_fusion.decode.recognizer import RecognizerOptions
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.scoring.table import ROW_KEYS


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    """A run of all methods that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(made, out, "--batch_size", "3")) == 0
    return out



def test_every_method_leaves_its_files_and_a_row(whole) -> None:
    rows = json.loads((whole / "results.json").read_text())
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert set(ROW_KEYS) <= set(row) and row["test_set"] == "noise" and row["words"] > 0
        assert math.isfinite(row["wer"]) and row["search_seconds"] > 0 and row["peak_memory_bytes"] > 0
        for kind in ("recogs", "errs", "wer-summary"):
            assert (whole / f"{kind}-noise-{row['method']}.txt").exists()
        needs_lm = bool(set(parse_method(row["method"]).sources) - {"attention", "ngram", "lodr"})
        assert (row["lm_forwards"] > 0) == needs_lm and (row["lm_tokens_scored"] > 0) == needs_lm
    record = json.loads((whole / "run.json").read_text())
    assert record["status"] == "done" and record["skipped"] == [] and "torch" in record["versions"]
    stages = record["test_sets"]["noise"]["llm-delayed-shortest"]["stages"]
    assert {"features", "encoder", "search", "lm"} <= stages.keys()



def test_totals_are_made_of_scores_and_weights(whole) -> None:
    for method in METHODS[1:]:
        for nbest in lists(whole, method).values():
            weights = {source: weight for source, weight in nbest.weights.items() if source != "words"}
            for h in nbest:
                total = sum(weight * h.scores[source] for source, weight in weights.items())
                total += nbest.weights.get("words", 0.0) * h.scores.get("words", 0.0)
                assert h.total == pytest.approx(total, abs=1e-3), method
            assert [h.total for h in nbest] == sorted((h.total for h in nbest), reverse=True)
            assert all(len(h.times) == len(h.words()) for h in nbest)



def test_results_do_not_depend_on_the_batch(whole, made, tmp_path) -> None:
    methods = "attention-rescoring,nlm-shallow+llm-delayed-shortest,llm-nbest-rescoring"
    assert main(arguments(made, tmp_path, "--batch_size", "1", "--methods", methods)) == 0
    for method in methods.split(","):
        assert_same(lists(tmp_path, method), lists(whole, method))



def test_a_killed_run_goes_on(whole, made, tmp_path) -> None:
    methods = "ctc-prefix,nlm-shallow+llm-delayed-shortest"
    command = arguments(made, tmp_path, "--batch_size", "1", "--methods", methods)
    second = tmp_path / "nbest-noise-nlm-shallow+llm-delayed-shortest.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "icefall_fusion", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if second.exists() and second.read_text().count("\n") >= 3:  # options and two batches
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    nbest = tmp_path / "nbest-noise-ctc-prefix.jsonl"
    before = nbest.read_text()
    nbest.write_text(before + before.splitlines()[0][:50])  # as if killed within a line
    assert main(command) == 0
    assert nbest.read_text().startswith(before.splitlines()[0])
    for method in methods.split(","):
        assert_same(lists(tmp_path, method), lists(whole, method))
        lines = (tmp_path / f"nbest-noise-{method}.jsonl").read_text().splitlines()[1:]
        names = [entry["utterance"] for line in lines for entry in json.loads(line)["lists"]]
        assert sorted(names) == sorted(lists(whole, method))
    stamp = nbest.stat().st_mtime_ns
    assert main(command) == 0 and nbest.stat().st_mtime_ns == stamp  # nothing was left to do



def test_other_options_never_mix_with_an_old_run(made, tmp_path, capsys) -> None:
    assert main(arguments(made, tmp_path, "--methods", "ctc-prefix")) == 0
    other = arguments(made, tmp_path, "--methods", "ctc-prefix", "--search.beam", "3")
    assert main(other) == 2
    assert "run of ctc-prefix with search" in capsys.readouterr().err
    assert main([*other, "--restart", "true"]) == 0
    assert all(len(nbest) <= 3 for nbest in lists(tmp_path, "ctc-prefix").values())



def test_retrained_models_and_changed_manifests_never_mix_with_an_old_run(made, tmp_path, capsys) -> None:
    """The same paths with other content: weights of the acoustic model, of an LM, a shorter manifest."""
    mine = tiny.everything(tmp_path / "models")
    command = arguments(mine, tmp_path / "out", "--methods", "ctc-prefix,llm-delayed-shortest")
    assert main(command) == 0
    capsys.readouterr()
    for path, changed in (("llm/model.safetensors", "llm"), ("ctc_aed/model.safetensors", "fingerprint")):
        file = tmp_path / "models" / path
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert main(command) == 2
        assert f"with {changed} = " in capsys.readouterr().err
        file.write_bytes(before)
    with gzip.open(mine["cuts"], "rt") as file:
        lines = file.readlines()
    with gzip.open(mine["cuts"], "wt") as file:
        file.writelines(lines[:-1])
    assert main(command) == 2 and "with cuts_fingerprint = " in capsys.readouterr().err



def test_run_json_tells_what_the_search_received(whole, made, tmp_path, capsys) -> None:
    rows = {row["method"]: row["options"] for row in json.loads((whole / "results.json").read_text())}
    (part,) = rows["llm-delayed-shortest"]["parts"]
    assert part["trigger"] == "ShortestHypothesis(unit='words', every=4)" and part["word_bonus"] == 0.5
    shallow, delayed = rows["nlm-shallow+llm-delayed-interval-16"]["parts"]
    assert delayed["trigger"] == "FixedInterval(frames=16)" and "trigger" not in shallow
    assert shallow["word_bonus"] + delayed["word_bonus"] == pytest.approx(0.5)
    assert main(arguments(made, tmp_path, "--search.frame_shift", "0.5")) == 2
    assert "search.frame_shift must be left alone" in capsys.readouterr().err
    assert main(arguments(made, tmp_path, "--methods", "nlm-shallow", "--nlm.text", "lower")) == 2
    assert "nlm.text must be left alone" in capsys.readouterr().err



def test_a_second_call_keeps_the_rows_of_the_first(made, tmp_path, capsys) -> None:
    out = tmp_path / "out"

    def methods() -> list[str]:
        return [row["method"] for row in json.loads((out / "results.json").read_text())]

    assert main(arguments(made, out, "--methods", "ctc-greedy,ctc-prefix")) == 0
    assert main(arguments(made, out, "--methods", "ngram-shallow,ctc-greedy")) == 0
    assert methods() == ["ctc-prefix", "ngram-shallow", "ctc-greedy"]
    assert main(arguments(made, out, "--methods", "ctc-greedy", "--restart", "true")) == 0
    assert methods() == ["ctc-greedy"]
    (out / "results.json").write_text('{"no": "rows"}')
    assert main(arguments(made, out, "--methods", "ctc-greedy")) == 2
    assert "results.json must hold rows of methods and test sets" in capsys.readouterr().err



_GPU = pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
])


@pytest.mark.parametrize("device", ["cpu", _GPU])
def test_a_gpu_decodes_what_a_cpu_decodes(made, tmp_path, device) -> None:
    """The same log-probs on both: those of a random model differ by more than rounding should decide.

    With "cpu" the test tries itself. It has never run on a GPU.
    """
    methods = "ctc-prefix,nlm-shallow,llm-delayed-shortest,llm-delayed-interval-4-ahead,"
    methods += "llm-delayed-interval-4-late-2,llm-nbest-rescoring"
    kept = tmp_path / "kept"
    assert main(arguments(made, tmp_path / "0", "--methods=ctc-greedy", f"--save_emissions={kept}")) == 0
    saved = {**made, "model": str(kept / "noise")}
    for name, engine in (("cpu", "torch" if device == "cpu" else "auto"), (device, "auto")):
        out = tmp_path / f"{name}-{engine}"
        more = ["--methods", methods, "--emissions.device", name, "--search.engine", engine]
        assert main(arguments(saved, out, *more)) == 0
    here, there = tmp_path / f"cpu-{'torch' if device == 'cpu' else 'auto'}", tmp_path / f"{device}-auto"
    for method in methods.split(","):
        one, other = lists(here, method), lists(there, method)
        assert one.keys() == other.keys()
        for name, nbest in one.items():
            assert [h.total for h in nbest][:2] == pytest.approx([h.total for h in other[name]][:2], abs=1e-2)
            clear = len(nbest) < 2 or nbest[0].total - nbest[1].total > 0.02
            assert not clear or nbest[0].text == other[name][0].text, (method, name)


@pytest.mark.parametrize("device", ["cpu", _GPU])
def test_a_gpu_hears_what_a_cpu_hears(made, tmp_path, monkeypatch, device) -> None:
    """Log-probs of the acoustic model and scores of its attention decoder; never run on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    utterances = read_cuts(made["cuts"], "features")
    found = []
    for name in ("cpu", device):
        source = open_source(EmissionOptions(made["model"], device=name))
        emitted = source.emit([u.id for u in utterances], [u.load() for u in utterances])
        some = [[[5, 6, 7], [8]] for _ in utterances]
        scores = source.model.score_tokens(emitted.encoder_out, emitted.lens.to(name), some)
        found.append((emitted, torch.stack(scores)))
    (one, scores), (other, their_scores) = found
    assert one.lens.tolist() == other.lens.tolist() and other.log_probs.device.type == device
    for row, frames in enumerate(one.lens.tolist()):
        theirs = other.log_probs[row, :frames].cpu()
        torch.testing.assert_close(theirs, one.log_probs[row, :frames], atol=5e-3, rtol=1e-3)
    torch.testing.assert_close(their_scores, scores, atol=5e-3, rtol=1e-3)
    out, methods = tmp_path / "out", "ctc-greedy,attention-rescoring"
    assert main(arguments(made, out, "--methods", methods, "--emissions.device", device)) == 0
    assert all(lists(out, method).keys() == {u.id for u in utterances} for method in methods.split(","))



def test_a_gpu_takes_larger_batches_by_itself() -> None:
    assert RecognizerOptions().batch_limits("cpu") == (32, 480.0)
    assert RecognizerOptions().batch_limits("cuda:1") == (64, 960.0)
    assert RecognizerOptions(batch_size=5).batch_limits("cuda") == (5, 960.0)
    assert RecognizerOptions(batch_seconds=30.0).batch_limits("cpu") == (32, 30.0)
    for wrong in ({"batch_size": 0}, {"batch_seconds": 0.0}):
        with pytest.raises(ValueError, match=rf"RecognizerOptions.{next(iter(wrong))} must be"):
            RecognizerOptions(**wrong)


def test_groups_change_no_file_but_the_counters(made, tmp_path) -> None:
    found = []
    for groups in (1, 2):
        out = tmp_path / str(groups)
        given = arguments(made, out, "--search.groups", str(groups), "--methods", "llm-delayed-interval-4")
        assert main(given) == 0
        assert ('"groups_peak": 2' in (out / "run.json").read_text(encoding="utf-8")) == (groups == 2)
        found.append([path.read_bytes() for path in sorted(out.rglob("recogs-*"))])
    assert found[0] and found[0] == found[1]
