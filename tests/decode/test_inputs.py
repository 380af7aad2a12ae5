"""What is decoded, and what is refused: manifests, broken audio, saved log-probs, files, models of others.
Knows: jobs and their files. Must not know: how a search works.
"""
from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import soundfile
import tiny
from job_tools import arguments, assert_same, lists
from lhotse import CutSet, SupervisionSet

from icefall_fusion.__main__ import main
from icefall_fusion.data.manifests import cut_of, write_cuts
from icefall_fusion.lm import CausalLm


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
        decoded = lists(tmp_path / "out", method)
        assert sorted(decoded) == ["good", "tiny"]
        assert decoded["tiny"][0].text == "" and len(decoded["tiny"][0].tokens) == 0
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



def test_saved_emissions_can_be_decoded_where_nothing_else_is(made, tmp_path, capsys) -> None:
    """In a folder of its own: no acoustic model, no audio, no features."""
    kept, fresh = tmp_path / "kept", tmp_path / "fresh"
    methods = ["--methods", "ctc-prefix,llm-delayed-shortest"]
    assert main(arguments(made, tmp_path / "one", *methods, "--save_emissions", str(kept))) == 0
    (kept / "noise").rename(fresh)
    cuts = fresh / "cuts.jsonl"
    with gzip.open(made["cuts"], "rt") as file:
        cuts.write_text(file.read().replace('"source": "', '"source": "/gone').replace('"features"', '"no"'))
    again = arguments({**made, "model": str(fresh), "cuts": str(cuts)}, tmp_path / "two", *methods)
    assert main(again) == 0
    for method in ("ctc-prefix", "llm-delayed-shortest"):
        one, two = lists(tmp_path / "one", method), lists(tmp_path / "two", method)
        assert one.keys() == two.keys()
        for source in one[next(iter(one))][0].scores:
            assert [n[0].scores[source] for n in one.values()] == pytest.approx(
                [two[u][0].scores[source] for u in one], abs=0.1
            )
    assert main([*again, "--out", str(tmp_path / "four"), "--methods", "attention-rescoring"]) == 2
    capsys.readouterr()
    (fresh / "bpe.model").unlink()
    assert main([*again, "--out", str(tmp_path / "three")]) == 2
    assert "EmissionOptions.tokens must name a bpe.model" in capsys.readouterr().err



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



def test_transcribe_writes_every_format(made, tmp_path, capsys) -> None:
    """Files of all formats tell the same words and times; the marks of the search are moved to the sounds."""
    rng, files = np.random.default_rng(3), []
    for name in ("one talk.wav", "two.flac"):
        files.append(str(tmp_path / name))
        soundfile.write(files[-1], rng.normal(0, 0.1, 40_000), 16_000)
    command = ["transcribe", "--emissions.model", made["model"], "--method", "ctc-prefix"]
    out = tmp_path / "out"
    assert main([*command, "--format", "text,json,ctm,srt,vtt,lhotse", "--out", str(out), *files]) == 0
    assert {path.name for path in out.iterdir()} == {
        "text.txt", "words.jsonl", "words.ctm", "supervisions.jsonl.gz", "one_talk.srt", "two.srt",
        "one_talk.vtt", "two.vtt"}
    values = [json.loads(line) for line in (out / "words.jsonl").read_text().splitlines()]
    assert (out / "text.txt").read_text() == "".join(f"{v['file']}\t{v['text']}\n" for v in values)
    rows = [line.split() for line in (out / "words.ctm").read_text().splitlines()]
    words = [word for value in values for word in value["words"]]
    assert [row[4] for row in rows] == [word["word"] for word in words] and words
    assert [float(row[2]) for row in rows] == pytest.approx([word["start"] for word in words], abs=6e-4)
    made_again = list(SupervisionSet.from_file(out / "supervisions.jsonl.gz"))
    assert [s.id for s in made_again] == ["one_talk", "two"] and made_again[0].duration == 2.5
    items = [item for s in made_again for item in s.alignment["word"]]
    assert [(item.symbol, item.start) for item in items] == [(w["word"], w["start"]) for w in words]
    assert all(0 < item.duration and item.end <= 2.5 for item in items)
    capsys.readouterr()
    assert main([*command, "--format", "srt", files[0]]) == 0
    assert capsys.readouterr().out == (out / "one_talk.srt").read_text()
    for more, message in ((["--format", "srt"], "name a folder for lhotse, and for subtitles of several"),
                          (["--format", "lhotse"], "name a folder"), (["--format", "cmt"], "mean 'ctm'")):
        assert main([*command, *more, *files]) == 2
        assert message in capsys.readouterr().err



def test_a_hugging_face_model_decodes_with_an_llm(made, tmp_path) -> None:
    tiny.hugging_face_ctc(tmp_path / "hf")
    methods = "ctc-prefix,llm-delayed-shortest,llm-delayed-at-end,llm-nbest-rescoring"
    command = arguments({**made, "model": str(tmp_path / "hf")}, tmp_path / "out", "--methods", methods)
    assert main([*command, "--llm.text", "lower"]) == 0
    decoded = {method: lists(tmp_path / "out", method) for method in methods.split(",")}
    text = " ".join(nbest[0].text for nbest in decoded["llm-delayed-shortest"].values())
    assert text and text == text.upper() and "|" not in text
    assert_same(decoded["llm-delayed-at-end"], decoded["llm-nbest-rescoring"])



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

