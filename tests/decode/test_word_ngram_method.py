"""The method wordngram-delayed in the job decode, beside an LLM: rows, scores, what the run has received.
Knows: the job and its files. Must not know: how a search works.
"""
from __future__ import annotations

import json

import pytest
from job_tools import arguments, lists
from tiny import arpa_text

from icefall_fusion.__main__ import main
from icefall_fusion.decode.method_names import parse_method
from icefall_fusion.ngram.word_ngram import WordNgram

ARPA = arpa_text("""
-2.0\t<unk>
-99\t<s>\t-0.5
-1.0\t</s>
-0.5\tthe\t-0.25
-1.5\tsea\t-0.125
""", """
-0.3\t<s> the
-0.2\tthe sea
""")


def test_a_word_ngram_stands_beside_an_llm(made, tmp_path) -> None:
    (tmp_path / "words.arpa").write_text(ARPA)
    methods = ("wordngram-delayed", "wordngram-delayed+llm-delayed-shortest")
    more = ["--wordngram.path", str(tmp_path / "words.arpa"), "--wordngram.oov_score=-1.5"]
    out = tmp_path / "out"
    assert main(arguments(made, out, *more, "--methods", ",".join(methods))) == 0
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())}
    assert set(rows) == set(methods) and rows[methods[0]]["lm_forwards"] == 0
    assert rows[methods[1]]["lm_forwards"] > 0
    ngram = WordNgram(tmp_path / "words.arpa", oov_score=-1.5)
    for method in methods:
        for nbest in lists(out, method).values():
            for h in nbest:
                assert h.scores["wordngram"] == pytest.approx(ngram.log_prob(h.words()), abs=1e-3)
        first = (out / f"nbest-noise-{method}.jsonl").read_text().splitlines()[0]
        received = json.loads(first)["options"]["wordngram"]
        assert received["oov_score"] == -1.5 and received["fingerprint"]


def test_known_words_guide_the_search(made, tmp_path) -> None:
    (tmp_path / "words.arpa").write_text(ARPA)
    strange = {}
    for oov_score in ("0", "-30"):
        more = ["--wordngram.path", str(tmp_path / "words.arpa"), f"--wordngram.oov_score={oov_score}"]
        weights = ["--weights", '{wordngram-delayed: {wordngram: 1.0, words: 0.0}}']
        out = tmp_path / f"out{oov_score}"
        assert main(arguments(made, out, *more, *weights, "--methods", "wordngram-delayed")) == 0
        found = lists(out, "wordngram-delayed").values()
        assert all(nbest.weights.keys() == {"ctc", "wordngram", "words"} for nbest in found)
        assert all(set(h.scores) == {"ctc", "wordngram", "words", "total"} for nbest in found for h in nbest)
        strange[oov_score] = sum(word not in ("the", "sea") for nbest in found for word in nbest[0].words())
    assert strange["-30"] < strange["0"]


def test_names_and_missing_models() -> None:
    spec = parse_method("wordngram-delayed+llm-delayed-shortest")
    assert spec.sources == ["wordngram", "llm"] == sorted(spec.needs, reverse=True)
    assert spec.fusions[0].trigger == spec.fusions[1].trigger


def test_a_method_without_its_ngram_names_the_option(made, tmp_path, capsys) -> None:
    assert main(arguments(made, tmp_path, "--methods", "wordngram-delayed")) != 0
    assert "wordngram.path must name a model" in capsys.readouterr().err
