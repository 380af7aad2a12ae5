"""The job decode end to end on tiny random models: files, resume after a kill, bad input, long input.
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
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet, LilcomChunkyWriter, Recording

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.saved import SavedSource
from icefall_fusion.common.command_line import parse_options
from icefall_fusion.data.fbank import extractor
from icefall_fusion.data.manifests import cut_of, write_cuts
from icefall_fusion.decode.job import DecodeOptions, DecodeRun
from icefall_fusion.decode.method_names import (
    METHODS,
    choose_methods,
    parse_method,
    parse_methods,
    weights_of,
)
from icefall_fusion.decode.recognizer import Recognizer
from icefall_fusion.decode.segments import join_segments, rate_of, segments_of, split_long
from icefall_fusion.decode.utterances import (
    InputError,
    Utterance,
    batches,
    read_audio_files,
    read_cuts,
)
from icefall_fusion.fusion import DelayedFusion
from icefall_fusion.lm import CausalLm
from icefall_fusion.nbest import Hypothesis, NBest, WordTime, read_nbests
from icefall_fusion.scoring.table import ROW_KEYS
from icefall_fusion.search import ctc_prefix_search
from icefall_fusion.text.styles import adapt


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    return tiny.everything(tmp_path_factory.mktemp("tiny"))


def arguments(made: dict[str, str], out: Path, *more: str) -> list[str]:
    models = ["--emissions.model", made["model"]]
    for name in ("nlm", "llm", "matched_llm"):
        models += [f"--{name}.path", made[name]]
    models += ["--ngram.path", made["ngram"]]
    return ["decode", *models, "--test_sets.noise", made["cuts"], "--search.beam=4", "--out", str(out), *more]


def lists(out: Path, method: str) -> dict[str, NBest]:
    return {nbest.utterance: nbest for nbest in read_nbests(out / f"nbest-noise-{method}.jsonl")}


def assert_same(one: dict[str, NBest], other: dict[str, NBest]) -> None:
    assert one.keys() == other.keys()
    for name, nbest in one.items():
        assert [h.text for h in nbest] == [h.text for h in other[name]]
        for mine, theirs in zip(nbest, other[name]):
            assert mine.scores.keys() == theirs.scores.keys()
            for source, score in mine.scores.items():
                assert score == pytest.approx(theirs.scores[source], abs=2e-3)


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
        needs_lm = bool(set(parse_method(row["method"]).sources) - {"attention", "ngram"})
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


def test_earlier_text_of_each_utterance_is_the_llm_s_prompt(made, tmp_path, capsys) -> None:
    """Scores are those of a plain forward after the last words of the field; with and without a fusion."""
    cuts = []
    for cut in CutSet.from_file(made["cuts"]):
        cut.supervisions[0].custom["pre_text"] = f"he spoke of the sea and {cut.id.replace('-', ' ')}"
        cuts.append(cut)
    write_cuts(cuts, tmp_path / "cuts.jsonl.gz")
    named = {**made, "cuts": str(tmp_path / "cuts.jsonl.gz")}
    methods = "llm-delayed-shortest,llm-nbest-rescoring"
    command = arguments(named, tmp_path / "out", "--methods", methods, "--llm.context", "pre_text")
    assert main([*command, "--llm.context_words", "3"]) == 0
    lm = CausalLm.from_pretrained(made["llm"])
    for method in methods.split(","):
        for name, nbest in lists(tmp_path / "out", method).items():
            for h in nbest:
                prompt = "and " + name.replace("-", " ")
                text = f" {h.text}" if h.text else ""  # it goes on after the prompt
                assert h.scores["llm"] == pytest.approx(lm.log_prob(text, prompt, eos=True), abs=2e-3)
    assert main(arguments(made, tmp_path / "none", "--llm.context", "pre_text")) == 2
    assert "llm.context must name a custom field of every cut that has text" in capsys.readouterr().err


def test_a_limit_is_spread_over_the_manifest(made, tmp_path) -> None:
    assert main(arguments(made, tmp_path, "--methods", "ctc-greedy", "--limit", "3")) == 0
    names = [cut.id for cut in CutSet.from_file(made["cuts"])]
    assert set(lists(tmp_path, "ctc-greedy")) == {names[i * len(names) // 3] for i in range(3)}


def test_missing_and_broken_audio_is_skipped_and_listed(made, tmp_path) -> None:
    cuts = []
    rng = np.random.default_rng(1)
    for name, count in (("good", 16000), ("gone", 16000), ("short", 16000), ("empty", 0), ("tiny", 60)):
        path = tmp_path / f"{name}.wav"
        soundfile.write(path, rng.normal(0, 0.1, count), 16000)
        cuts.append(cut_of({"id": name, "text": "the cat"}, path, max(count, 1), {"voice": "noise"}))
    (tmp_path / "gone.wav").unlink()
    (tmp_path / "short.wav").write_bytes((tmp_path / "short.wav").read_bytes()[:9000])
    write_cuts(cuts, tmp_path / "cuts.jsonl.gz")
    methods = "ctc-greedy,ctc-prefix,attention-rescoring,nlm-shallow+llm-delayed-shortest"
    made = {**made, "cuts": str(tmp_path / "cuts.jsonl.gz")}
    assert main(arguments(made, tmp_path / "out", "--methods", methods)) == 3
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert sorted(entry["id"] for entry in record["skipped"]) == ["empty", "gone", "short"]
    for method in methods.split(","):
        found = lists(tmp_path / "out", method)
        assert sorted(found) == ["good", "tiny"]
        assert found["tiny"][0].text == "" and len(found["tiny"][0].tokens) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(row["words"] == 4 for row in rows)


def test_printed_words_are_counted_beside_normalized_ones(made, tmp_path) -> None:
    cased = tmp_path / "cased.jsonl.gz"
    cuts = [json.loads(line) for line in gzip.open(made["cuts"], "rt")]
    for cut in cuts:
        cut["supervisions"][0]["text"] = cut["supervisions"][0]["text"].upper() + "!"
    with gzip.open(cased, "wt") as file:
        file.writelines(json.dumps(cut) + "\n" for cut in cuts)
    rows = []
    for manifest in (made["cuts"], str(cased)):
        out = tmp_path / str(len(rows))
        run = arguments(made, out, "--methods", "ctc-prefix", "--printed_wer", "true")
        assert main([*run, "--test_sets", json.dumps({"noise": manifest})]) == 0
        rows += json.loads((out / "results.json").read_text())
        assert (out / "recogs-noise-ctc-prefix-printed.txt").exists()
        assert (out / "recogs-noise-ctc-prefix-libriheavy.txt").exists()
    assert rows[0]["wer"] == rows[0]["wer_printed"] == rows[1]["wer"]  # the tiny corpus is normalized
    assert rows[0]["wer"] == rows[0]["wer_libriheavy"] == rows[1]["wer_libriheavy"]
    assert rows[1]["wer_printed"] >= 100.0  # no word of the references is ever heard in capitals


def test_long_audio_is_decoded_in_parts(made, tmp_path) -> None:
    more = ["--methods", "ctc-greedy,nlm-shallow+llm-delayed-interval-16", "--longest", "1"]
    assert main(arguments(made, tmp_path, *more)) == 0
    for method in ("ctc-greedy", "nlm-shallow+llm-delayed-interval-16"):
        found = lists(tmp_path, method)
        assert sorted(found) == [f"noise-{i}" for i in range(7)]
        last = found["noise-6"]
        assert all(t.end <= 1.6 for t in last[0].times) and last[0].times[-1].start >= 0.5
        assert [t.start for t in last[0].times] == sorted(t.start for t in last[0].times)


def test_parts_carry_what_was_recognized_to_the_llm(made, tmp_path, capsys) -> None:
    """Against the parts of each utterance decoded one by one, the text so far given as a prompt."""
    methods = ["llm-delayed-shortest", "ctc-greedy", "llm-delayed-interval-4"]
    named = {**made, "cuts": str(tiny.manifest(tmp_path / "audio", 14))}
    options = arguments(named, tmp_path / "out", "--methods", ",".join(methods), "--longest", "1")[1:]
    options += ["--llm.carry", "true", "--llm.context_words", "5", "--llm.text", "sentence"]
    assert main(["decode", *options]) == 0
    parsed = parse_options(DecodeOptions, options, "decode")
    recognizer = Recognizer(parsed, parsed.methods)
    lm, thirds = recognizer.models.get("llm"), 0
    for method in (methods[0], methods[2]):
        [fused] = parse_method(method).fusions
        found = lists(tmp_path / "out", method)
        for utterance in read_cuts(named["cuts"], recognizer.source.wants):
            words: list[str] = []
            score = 0.0
            for parts, emissions, _ in recognizer.emit([utterance]):
                [part] = parts
                prompt = " ".join(adapt(words, "sentence").split()[-5:])
                thirds += part.number == 2 and bool(prompt)
                fusion = DelayedFusion(lm, 0.4, 0.5, fused.trigger, "sentence", prompt or None)
                search = (emissions.log_probs, emissions.lens, parsed.search, emissions.tokens)
                [nbest] = ctc_prefix_search(*search, [fusion], emissions.ids)
                words += nbest[0].words()
                score += nbest[0].scores["llm"]
            assert found[utterance.id][0].words() == words
            assert found[utterance.id][0].scores["llm"] == pytest.approx(score, abs=2e-3)
    assert thirds >= 4
    shallow = arguments(named, tmp_path / "no", "--methods", "nlm-shallow", "--nlm.carry", "true")
    assert main(shallow) == 2 and "nlm.carry must be left alone" in capsys.readouterr().err


def test_saved_emissions_can_be_decoded(made, tmp_path) -> None:
    kept = tmp_path / "kept"
    more = ["--methods", "ctc-prefix", "--save_emissions", str(kept)]
    assert main(arguments(made, tmp_path / "one", *more)) == 0
    again = arguments({**made, "model": str(kept / "noise")}, tmp_path / "two", "--methods", "ctc-prefix")
    again += ["--emissions.tokens", made["model"]]
    assert main(again) == 0
    one, two = lists(tmp_path / "one", "ctc-prefix"), lists(tmp_path / "two", "ctc-prefix")
    assert one.keys() == two.keys()
    assert [n[0].scores["ctc"] for n in one.values()] == pytest.approx(
        [two[u][0].scores["ctc"] for u in one], abs=0.1
    )
    assert main([*again[:-2], "--out", str(tmp_path / "three")]) == 2  # no vocabulary
    needs = [*again, "--out", str(tmp_path / "four"), "--methods", "attention-rescoring"]
    assert main(needs) == 2  # no attention decoder


def test_wrong_models_are_refused_with_names(made, tmp_path, capsys) -> None:
    assert main(arguments({**made, "model": str(tmp_path)}, tmp_path / "a")) == 2
    assert "must be a model folder" in capsys.readouterr().err
    assert main(arguments({**made, "llm": ""}, tmp_path / "b", "--methods", "llm-delayed-shortest")) == 2
    assert "llm.path must name a model for the method 'llm-delayed-shortest'" in capsys.readouterr().err
    assert main(arguments({**made, "nlm": made["llm"]}, tmp_path / "c", "--methods", "nlm-shallow")) == 2
    capsys.readouterr()
    assert main(arguments(made, tmp_path / "d", "--methods", "llm-delayd-shortest")) == 2
    assert "did you mean 'llm-delayed-shortest'" in capsys.readouterr().err
    weights = "{nlm-shallow: {nlm: -0.1}}"
    assert main(arguments(made, tmp_path / "e", "--methods", "nlm-shallow", "--weights", weights)) == 2
    assert "weights.nlm-shallow.nlm must be at least 0" in capsys.readouterr().err


def test_transcribe_prints_text_and_json(made, tmp_path, capsys) -> None:
    rng = np.random.default_rng(2)
    kinds = (("a.wav", 44100, (44100, 2)), ("b.ogg", 8000, (12000,)), ("c.flac", 16000, (0,)))
    for name, rate, shape in kinds:
        soundfile.write(tmp_path / name, rng.normal(0, 0.1, shape), rate)
    files = [str(tmp_path / name) for name in ("a.wav", "b.ogg", "c.flac", "none.mp3")]
    models = ["--emissions.model", made["model"], "--llm.path", made["llm"]]
    code = main(["transcribe", *models, "--json", str(tmp_path / "out.jsonl"), *files])
    printed = capsys.readouterr()
    assert code == 3 and "skipped" in printed.err and "none.mp3" in printed.err
    lines = printed.out.splitlines()
    assert [line.split("\t")[0] for line in lines[::2]] == files[:2]
    value = json.loads(lines[1])
    assert value["text"] == lines[0].split("\t")[1]
    assert len(value["words"]) == len(value["text"].split())
    assert {"ctc", "llm", "total"} <= value["scores"].keys()
    assert [json.loads(line)["file"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_a_hugging_face_model_decodes_with_an_llm(made, tmp_path) -> None:
    tiny.hugging_face_ctc(tmp_path / "hf")
    methods = "ctc-prefix,llm-delayed-shortest,llm-delayed-at-end,llm-nbest-rescoring"
    command = arguments({**made, "model": str(tmp_path / "hf")}, tmp_path / "out", "--methods", methods)
    assert main([*command, "--llm.text", "lower"]) == 0
    found = {method: lists(tmp_path / "out", method) for method in methods.split(",")}
    text = " ".join(nbest[0].text for nbest in found["llm-delayed-shortest"].values())
    assert text and text == text.upper() and "|" not in text
    assert_same(found["llm-delayed-at-end"], found["llm-nbest-rescoring"])


# --- pieces -------------------------------------------------------------------------------------------


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


def test_names_of_methods() -> None:
    assert parse_methods("all") == list(METHODS) and len(METHODS) == 17
    assert parse_method("ctc-prefix").sources == [] and parse_method("ctc-greedy").search == "greedy"
    assert parse_method("llm-delayed-interval-7").fusions[0].trigger.frames == 7
    assert parse_method("nlm-shallow+llm-delayed-every-frame").sources == ["nlm", "llm"]
    both = parse_method("attention-rescoring+llm-delayed-shortest")
    assert [spec.source for spec in both.fusions] == ["llm"] and both.needs == {"llm", "attention"}
    ahead = parse_method("ngram-shallow+llm-delayed-interval-7-ahead").fusions
    assert [(spec.source, spec.look_ahead) for spec in ahead] == [("ngram", False), ("llm", True)]
    [late] = parse_method("llm-delayed-shortest-late-8-ahead").fusions
    assert late == replace(parse_method("llm-delayed-shortest").fusions[0], late=8, look_ahead=True)
    given = {"llm-delayed-shortest-ahead": {"llm": 0.7, "words": 0.2}}
    assert weights_of("llm-delayed-shortest-late-8-ahead", given) == {"ctc": 1.0, "llm": 0.7, "words": 0.2}
    wrong_names = ["nlm-shallow-ahead", "llm-delayed-ahead", "llm-delayed-shortest-ahead-ahead"]
    wrong_names += ["llm-delayed-late-3", "nlm-shallow-late-3", "llm-delayed-shortest-ahead-late-3"]
    for wrong in wrong_names:
        with pytest.raises(ValueError, match="method must be built of known components"):
            parse_method(wrong)
    with pytest.raises(ValueError, match="use each source of scores once"):
        parse_method("llm-delayed-shortest+llm-nbest-rescoring")
    with pytest.raises(ValueError, match="FixedInterval.frames must be an integer, at least 1"):
        parse_method("llm-delayed-interval-0")
    assert weights_of("ctc-prefix", {"ctc-prefix": {}}) == {"ctc": 1.0}
    with pytest.raises(ValueError, match="did you mean 'llm'"):
        weights_of("llm-delayed-shortest", {"llm-delayed-shortest": {"lm": 0.5}})
    for wrong in (math.nan, math.inf, "1", None):
        with pytest.raises(ValueError, match="attention-rescoring.attention must be a number"):
            weights_of("attention-rescoring", {"attention-rescoring": {"attention": wrong}})


def test_all_is_what_the_models_allow(caplog) -> None:
    assert choose_methods("all", {"attention", "nlm", "llm", "matched_llm", "ngram"}) == list(METHODS)
    found = choose_methods("all", {"llm"})
    assert "llm-delayed-shortest" in found and "ctc-greedy" in found and len(found) == 7
    assert "llm-delayed-shortest-ahead is skipped: there is no ngram" in caplog.text
    with pytest.raises(ValueError, match="ngram.path must name a model for the method 'llm-.*-ahead'"):
        choose_methods("all,llm-delayed-shortest-ahead", {"llm"})


def test_batches_hold_like_lengths_and_every_utterance_once() -> None:
    seconds = [1.0, 50.0, 2.0, 90.0, 3.0, 2.5]
    utterances = [Utterance(f"u{i}", s, "", torch.zeros) for i, s in enumerate(seconds)]
    found = list(batches(utterances, size=3, seconds=100.0, longest=60.0))
    assert sorted(u.id for batch in found for u in batch) == [u.id for u in utterances]
    assert [len(batch) for batch in found] == [1, 2, 3] and found[0][0].id == "u3"
    assert all(batch[0].seconds * len(batch) <= 100 for batch in found)


def split_of(values: torch.Tensor, longest: float) -> list[tuple[int, int]]:
    return list(split_long(lambda first, last: values[first:last], rate_of(values), longest))


def test_long_input_is_cut_at_quiet_places() -> None:
    features = torch.zeros(1000, 80)
    features[[*range(380, 420)]] = -10.0
    assert split_of(features, 20.0) == [(0, 1000)]
    ranges = split_of(features, 6.0)
    assert ranges[0][0] == 0 and 380 <= ranges[0][1] <= 420 and ranges[-1][1] == 1000
    samples = torch.randn(160000)
    parts = split_of(samples, 3.0)
    assert all(a < b and b - a <= 48000 for a, b in parts)
    assert [a for a, _ in parts[1:]] == [b for _, b in parts[:-1]]


@given(st.integers(1, 700), st.floats(1.0, 3.0), st.booleans(), st.integers(0, 100))
def test_cuts_found_in_windows_are_those_of_the_whole(frames, longest, audio, seed) -> None:
    """Against the loudness of all, smoothed at once."""
    noise = torch.randint(-8, 9, (frames, 4), generator=torch.Generator().manual_seed(seed)).float()
    values = noise if not audio else noise[:, 0].repeat_interleave(160)[: frames * 160 - seed]
    hop = 160 if audio else 1
    power = values[: len(values) // hop * hop].view(-1, hop).square()
    loudness = (power if audio else values).mean(1)
    padded = torch.nn.functional.pad(loudness, (10, 10), value=torch.nan)
    expected, start, limit = [], 0, int(longest * 100 * hop)
    while len(values) - start > limit:
        hops = range((start + limit // 2) // hop, (start + limit) // hop)
        quietest = min(hops, key=lambda i: round(float(padded[i : i + 20].nanmean()), 4))
        expected.append((start, quietest * hop))
        start = quietest * hop
    assert split_of(values, longest) == [*expected, (start, len(values))]


def noise_file(path: Path, seconds: float, rate: int = 16000, channels: int = 1) -> None:
    count = round(seconds * rate)
    noise = np.random.default_rng(3).normal(0, 0.1, (count, channels))
    soundfile.write(path, noise * np.sin(np.arange(count) / rate)[:, None], rate)


def long_cut(folder: Path, kind: str):
    """Return a cut of some 9 s."""
    noise_file(folder / "long.flac", 9.0077)
    recording = Recording.from_file(folder / "long.flac")
    if kind == "declared too short":
        recording = replace(recording, duration=7.0, num_samples=112000)
    cut = recording.to_cut()
    if kind == "segment":
        return cut.truncate(offset=0.7, duration=8.0)
    if kind == "ends a little late":
        return replace(cut.truncate(offset=0.7, duration=6.0), duration=6.000000001)
    if kind == "padded":
        return cut.pad(duration=10.0)
    if kind == "mixed":
        noise_file(folder / "other.flac", 9.5)
        return cut.mix(Recording.from_file(folder / "other.flac").to_cut(), snr=10)
    if kind == "transformed":
        return cut.perturb_speed(0.9)
    if kind == "stored features":
        with LilcomChunkyWriter(folder / "features") as storage:
            cut = cut.compute_and_store_features(extractor(), storage)
        return cut.truncate(offset=0.5, duration=8.0)
    return cut


KINDS = ("whole file", "declared too short", "segment", "ends a little late", "padded", "mixed",
         "transformed", "stored features")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wants", ["features", "audio"])
def test_parts_of_long_cuts_are_those_of_the_whole(tmp_path, wants, kind) -> None:
    write_cuts([long_cut(tmp_path, kind)], tmp_path / "cuts.jsonl.gz")
    [utterance] = read_cuts(tmp_path / "cuts.jsonl.gz", wants)
    whole = utterance.load()
    values = [part.load() for part in segments_of(utterance, 2.0)]
    assert len(values) >= 4 and all(0 < len(part) <= 2 * rate_of(whole) for part in values)
    assert torch.cat(values).shape == whole.shape and (torch.cat(values) - whole).abs().max() < 1e-3


@pytest.mark.parametrize("wants", ["features", "audio"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_long_files_are_read_part_by_part(tmp_path, wants, rate) -> None:
    """The parts are those of the whole; no more than a part and its neighbourhood is read at once."""
    noise_file(tmp_path / "long.flac", 9.0077, rate, channels=2)
    [utterance] = read_audio_files([tmp_path / "long.flac"], wants)
    whole, most = utterance.load(), 0.0

    def load(start: float, seconds: float) -> torch.Tensor:
        nonlocal most
        most = max(most, seconds)
        return utterance.load(start, seconds)

    parts = segments_of(replace(utterance, load=load), 2.0)
    values = [part.load() for part in parts]
    assert len(parts) >= 5 and most <= 2.4
    assert [(part.start, part.number, part.count) for part in parts] == [
        (sum(len(v) for v in values[:i]) / rate_of(whole), i, len(parts)) for i in range(len(parts))
    ]
    assert torch.cat(values).shape == whole.shape and (torch.cat(values) - whole).abs().max() < 1e-3


@pytest.mark.parametrize("carry", [False, True])
def test_a_part_that_cannot_be_read_takes_its_utterance_along(made, tmp_path, monkeypatch, carry) -> None:
    """Nothing is left of it: no list, no cost, no saved emissions."""
    cuts = tiny.manifest(tmp_path / "audio", 14)
    options = ["--methods", "llm-delayed-shortest", "--longest", "1", "--batch_seconds", "2"]
    options += ["--save_emissions", str(tmp_path / "kept"), "--llm.carry", str(carry).lower()]
    options = arguments({**made, "cuts": str(cuts)}, tmp_path / "out", *options)[1:]
    decode = DecodeRun(parse_options(DecodeOptions, options, "decode"))
    *good, bad = read_cuts(cuts, decode.recognizer.source.wants)
    starts = [part.start for part in segments_of(bad, 1.0)]
    seen: list[float] = []

    def load(start: float, seconds: float) -> torch.Tensor:
        if start == starts[2] and start in seen:  # the cuts were found: now the third part is read
            raise InputError("the disk is gone")
        seen.append(start)
        return bad.load(start, seconds)

    seen += starts[2:3]
    monkeypatch.setattr("icefall_fusion.decode.job.read_cuts", lambda *_: [*good, replace(bad, load=load)])
    [row] = decode.decode_set("noise", str(cuts))
    assert [(entry["id"], entry["error"]) for entry in decode.skipped] == [(bad.id, "the disk is gone")]
    assert sorted(lists(tmp_path / "out", "llm-delayed-shortest")) == sorted(u.id for u in good)
    [file] = (tmp_path / "out").glob("nbest-*")
    assert all(json.loads(line)["lists"] for line in file.read_text().splitlines()[1:])
    saved = SavedSource(tmp_path / "kept" / "noise", decode.recognizer.source.tokens)
    assert sorted(saved.ids) == sorted(u.id for u in good)
    assert row["audio_seconds"] == pytest.approx(sum(u.seconds for u in good))


def test_parts_are_joined() -> None:
    def hypothesis(text: str, score: float) -> Hypothesis:
        times = [WordTime(text, 0.1, 0.2)] if text else []
        return Hypothesis([1], text, {"ctc": score, "total": score}, times)

    one = NBest("u", [hypothesis("a", -1.0), hypothesis("b", -2.0)])
    two = NBest("u#1", [hypothesis("c", -4.0)])
    joined = join_segments("u", [one, two, NBest("u#2", [hypothesis("", 0.0)])], [0.0, 10.0, 20.0])
    assert [h.text for h in joined] == ["a c", "b c"] and [h.total for h in joined] == [-5.0, -6.0]
    assert joined[0].times[1] == WordTime("c", 10.1, 10.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_what_a_cpu_decodes(tmp_path):
    made = tiny.everything(tmp_path / "models")
    models = ["--emissions.model", made["model"], "--llm.path", made["llm"], "--nlm.path", made["nlm"]]
    methods = "ctc-prefix,nlm-shallow,llm-delayed-shortest,llm-nbest-rescoring,attention-rescoring"
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        what = ["--test_sets.noise", made["cuts"], "--methods", methods, "--out", str(out)]
        assert main(["decode", *models, *what, "--emissions.device", device]) == 0
        found.append([row["wer"] for row in json.loads((out / "results.json").read_text())])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
