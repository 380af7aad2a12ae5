"""The method hotwords-shallow and prompts from hot words in the job decode, beside an LLM and an n-gram.
Knows: the job and its files. Must not know: how a search works.
"""
from __future__ import annotations

import json

import pytest
from job_tools import arguments, assert_same, lists

from icefall_fusion.__main__ import main
from icefall_fusion.decode.hotwords import HotWords
from icefall_fusion.decode.language_models import LanguageModels, LmOptions
from icefall_fusion.decode.method_names import parse_method
from icefall_fusion.decode.weights import weights_of

METHODS = ("hotwords-shallow", "hotwords-shallow+ngram-shallow+llm-delayed-shortest", "llm-delayed-shortest")


def count(words, phrase) -> int:
    return sum(words[at : at + len(phrase)] == phrase for at in range(len(words) - len(phrase) + 1))


def test_hot_words_stand_beside_an_ngram_and_an_llm(made, tmp_path) -> None:
    (tmp_path / "names.txt").write_text("the sea\t30\ncat\t20\n")
    out, hot = tmp_path / "out", ["--hotwords", str(tmp_path / "names.txt")]
    assert main(arguments(made, out, *hot, "--methods", ",".join(METHODS))) == 0
    found = 0
    for method in METHODS[:2]:
        for nbest in lists(out, method).values():
            assert nbest.weights["hotwords"] == 1.0
            for h in nbest:
                wanted = 30 * count(h.words(), ["the", "sea"]) + 20 * count(h.words(), ["cat"])
                # other spellings of a word are possible, and are not paid
                assert h.scores["hotwords"] in range(0, wanted + 1, 10)
                found += h.scores["hotwords"] > 0
        first = (out / f"nbest-noise-{method}.jsonl").read_text().splitlines()[0]
        assert json.loads(first)["options"]["hotwords"]["fingerprint"]
    assert found
    plain = (out / f"nbest-noise-{METHODS[2]}.jsonl").read_text().splitlines()[0]
    assert "hotwords" not in json.loads(plain)["options"]


def test_a_prompt_from_hot_words_is_that_prompt(made, tmp_path) -> None:
    (tmp_path / "names.txt").write_text("the sea\t1\ncat\t2\nthe dog\t3\nmat\t-1\n")
    hot = ["--hotwords", str(tmp_path / "names.txt"), "--llm.prompt_from_hotwords", "true"]
    both = (["--llm.context_words=3", *hot], ["--llm.prompt", "cat the dog"])
    outs = tmp_path / "one", tmp_path / "other"
    for out, more in zip(outs, both):
        assert main(arguments(made, out, *more, "--methods", METHODS[2])) == 0
    assert_same(*(lists(out, METHODS[2]) for out in outs))
    first = (outs[0] / f"nbest-noise-{METHODS[2]}.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["options"]["hotwords"]["fingerprint"]


def test_a_prompt_has_the_largest_boosts_last_and_no_broken_phrase(tmp_path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("the sea\t1\ncat\t2\nthe dog\t3\nmat\t-1\n")
    hot = HotWords(path)
    assert hot.prompt("as-is", 200) == "the sea cat the dog"
    assert hot.prompt("sentence", 200) == "The sea, Cat, The dog"
    assert hot.prompt("lower", 4) == "cat the dog" and hot.prompt("lower", 1) == ""
    with pytest.raises(ValueError, match="hotwords must name a file of phrases"):
        LanguageModels({"llm": LmOptions(path="x", prompt_from_hotwords=True)})
    for more in ({"prompt": "a"}, {"context": "pre_text"}, {"carry": True}):
        with pytest.raises(ValueError, match="prompt_from_hotwords must be left out with prompt"):
            LmOptions(prompt_from_hotwords=True, **more)


def test_names_weights_and_what_is_missing(made, tmp_path, capsys) -> None:
    assert parse_method(METHODS[1]).sources == ["hotwords", "ngram", "llm"]
    assert weights_of(METHODS[0], {}) == {"ctc": 1.0, "hotwords": 1.0, "words": 0.0}
    assert weights_of(METHODS[1], {})["words"] > 0
    assert main(arguments(made, tmp_path / "a", "--methods", METHODS[0])) != 0
    assert "hotwords must name a file of phrases for the method" in capsys.readouterr().err
    (tmp_path / "bad.txt").write_text("the sea\nXQZ\t3\n")
    bad = ["--hotwords", str(tmp_path / "bad.txt"), "--methods", METHODS[0]]
    assert main(arguments(made, tmp_path / "b", *bad)) != 0
    assert "must be spelled by the acoustic pieces" in capsys.readouterr().err
