"""Word error rates: counts, files, oracle, one normalizer for both sides, every input form.
Knows: icefall_fusion.scoring. Must not know: models and searches.
"""
from __future__ import annotations

import gzip
import json
import random

import pytest

from icefall_fusion.__main__ import main
from icefall_fusion.nbest import Hypothesis, NBest, write_nbests
from icefall_fusion.scoring.score import ScoreOptions, read_texts
from icefall_fusion.scoring.wer import count_errors, oracle_errors, word_errors, words_of
from icefall_fusion.scoring.wer_files import write_wer_files
from icefall_fusion.text.language import Language
from tests.reference.word_edits import word_edits


def nbest(utterance: str, *texts: str) -> NBest:
    return NBest(utterance, [Hypothesis([], text, {"total": -float(i)}) for i, text in enumerate(texts)])


def test_counts_of_each_kind() -> None:
    errors = count_errors("a b c d", "a x c d e")
    assert (errors.words, errors.insertions, errors.deletions, errors.substitutions) == (4, 1, 0, 1)
    assert errors.wer == 50.0
    assert count_errors("", "").wer == 0.0 and count_errors("", "a").wer == float("inf")
    assert count_errors("a b", "").deletions == 2


def test_reference_and_hypothesis_meet_the_same_normalizer() -> None:
    assert count_errors("Don't STOP, Mr. Finch!", "don't stop mr finch").errors == count_errors(
        "don't stop mr finch", "Don't STOP, Mr. Finch!"
    ).errors
    assert count_errors("She had 21 cats.", "She had 21 cats.").errors == 0
    assert count_errors("She had twenty one cats", "She had 21 cats").errors == 0


def test_printed_words_are_another_measure() -> None:
    reference = 'The 2 cats -- "Tom" and Mr. Finch -- sat.'
    hypothesis = "the two cats tom and mister finch sat"
    assert count_errors(reference, hypothesis).errors == 0
    printed = count_errors(reference, hypothesis, "printed")  # but "cats" and "and": two are too many
    assert (printed.words, printed.errors) == (10, 8)
    assert count_errors(reference, f"  {reference} ", "printed").errors == 0
    with pytest.raises(ValueError, match="measure must be one of .*libriheavy.*'cased'"):
        count_errors(reference, hypothesis, "cased")


def test_words_of_icefalls_libriheavy_recipe() -> None:
    for printed, words in {
        "I like this 《book>": "I LIKE THIS BOOK",
        'Mr. Finch had 21 cats -- "good-natured" ones.': "MR FINCH HAD 21 CATS GOOD NATURED ONES",
        "‘Don’t,’ he said": "'DON'T ' HE SAID",
        "Café 3rd": "CAF 3RD",
        "--": "",
    }.items():
        assert words_of(printed, "libriheavy") == words.split()
    spoken = "Mister Finch had twenty one cats, good natured ones"
    errors = count_errors('Mr. Finch had 21 cats -- "good-natured" ones.', spoken, "libriheavy")
    assert (errors.words, errors.errors) == (8, 3)  # Mister for MR, twenty one for 21


def test_totals_agree_with_a_plain_edit_distance() -> None:
    random.seed(1)
    for _ in range(50):
        ref = [random.choice("abcde") for _ in range(random.randrange(8))]
        hyp = [random.choice("abcde") for _ in range(random.randrange(8))]
        assert count_errors(" ".join(ref), " ".join(hyp)).errors == word_edits(ref, hyp)


def test_every_utterance_must_be_there() -> None:
    with pytest.raises(ValueError, match="hypotheses must hold every utterance of references.*u2"):
        word_errors({"u1": "a", "u2": "b"}, {"u1": "a"})
    with pytest.raises(ValueError, match="references must hold every utterance of hypotheses"):
        word_errors({"u1": "a"}, {"u1": "a", "u2": "b"})


def test_oracle() -> None:
    lists = [nbest("u1", "a x", "a b", "y z"), nbest("u2", "q"), NBest("u3", [])]
    errors = oracle_errors({"u1": "a b", "u2": "c d", "u3": "e"}, lists)
    assert (errors.words, errors.errors) == (5, 0 + 2 + 1)


def test_files_like_icefall(tmp_path) -> None:
    total = write_wer_files(tmp_path, "test-clean", "ctc-greedy", {"u1": "A b c"}, {"u1": "a x c d"})
    recogs = (tmp_path / "recogs-test-clean-ctc-greedy.txt").read_text()
    assert recogs == "u1:\tref=['a', 'b', 'c']\nu1:\thyp=['a', 'x', 'c', 'd']\n"
    errs = (tmp_path / "errs-test-clean-ctc-greedy.txt").read_text()
    assert errs.startswith("%WER = 66.67\nErrors: 1 insertions, 0 deletions, 1 substitutions, over 3 ref")
    assert "u1:\ta (b->x) c (*->d)" in errs and "1   b -> x" in errs
    assert "a   1 0 1 1" in errs and "b   0 1 1 0" in errs
    summary = (tmp_path / "wer-summary-test-clean-ctc-greedy.txt").read_text()
    assert summary == "settings\tWER\nctc-greedy\t66.67\n"
    assert total.wer == pytest.approx(200 / 3)
    write_wer_files(tmp_path, "test-clean", "ctc-greedy", {"u1": "A b c"}, {"u1": "a b c"}, "printed")
    summary = (tmp_path / "wer-summary-test-clean-ctc-greedy-printed.txt").read_text()
    assert summary == "settings\tWER\nctc-greedy-printed\t33.33\n"


def test_every_input_form(tmp_path) -> None:
    (tmp_path / "ref.txt").write_text("u1 hello there\nu2\n")
    assert read_texts(tmp_path / "ref.txt") == {"u1": "hello there", "u2": ""}
    cut = {"id": "u1", "supervisions": [{"text": "hello"}, {"text": "there"}]}
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wt") as file:
        file.write(json.dumps(cut) + "\n" + json.dumps({"id": "u2", "text": "x"}) + "\n")
    assert read_texts(tmp_path / "cuts.jsonl.gz") == {"u1": "hello there", "u2": "x"}
    write_nbests(tmp_path / "nbest.jsonl", [nbest("u1", "hello", "hello there")])
    assert read_texts(tmp_path / "nbest.jsonl") == {"u1": "hello"}
    (tmp_path / "twice.txt").write_text("u1 a\nu1 b\n")
    with pytest.raises(ValueError, match="'u1' comes twice"):
        read_texts(tmp_path / "twice.txt")
    (tmp_path / "bad.jsonl").write_text("{]\n")
    with pytest.raises(ValueError, match="bad.jsonl line 1"):
        read_texts(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("content", [b"\xff\xfe u1", b'{"id": "a", "supervisions": [{"text": null}]}'])
def test_files_that_hold_no_texts_are_named(content, tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.jsonl"):
        read_texts(path)
    with pytest.raises(FileNotFoundError, match="no file of texts at"):
        read_texts(tmp_path)


def test_score_job(tmp_path, capsys) -> None:
    (tmp_path / "ref.txt").write_text("u1 hello there\n")
    write_nbests(tmp_path / "nbest.jsonl", [nbest("u1", "hello", "hello there")])
    arguments = ["score", "--ref", str(tmp_path / "ref.txt"), "--hyp", str(tmp_path / "nbest.jsonl")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "%WER = 50.00 [1 / 2, 0 ins, 1 del, 0 sub]" in printed and "oracle %WER = 0.00" in printed
    assert (tmp_path / "out" / "wer-summary-test-score.txt").exists()
    (tmp_path / "ref.txt").write_text("u1 Hello there.\n")
    assert main([*arguments, "--measure", "printed"]) == 0
    printed = capsys.readouterr().out
    assert "%WER = 100.00 [2 / 2, 0 ins, 1 del, 1 sub]" in printed and "oracle %WER = 100.00" in printed
    assert main(["score", "--ref", "missing.txt", "--hyp", "missing.txt"]) == 2
    with pytest.raises(ValueError, match="ScoreOptions.key must be usable in a file name"):
        ScoreOptions(ref="a", hyp="b", key="x/y")


def test_spanish_words_and_mandarin_characters() -> None:
    spanish, mandarin = Language("es"), Language("zh")
    errors = count_errors("El año 3, ¿sí?", "el ano tres si", language=spanish)
    assert (errors.words, errors.substitutions, errors.errors) == (4, 2, 2)  # ñ is no n, sí is no si
    errors = count_errors("他有３个苹果。用Python", "他 有 三 个 平 果 用 python", language=mandarin)
    assert (errors.words, errors.substitutions, errors.errors) == (8, 1, 1)
    assert words_of("你好，ok", "printed", mandarin) == ["你", "好", "，ok"]


def test_references_of_another_language_are_an_error_and_not_a_rate_of_nothing(tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="references must have words of the language 'en'.*u1: '你好'"):
        word_errors({"u1": "你好"}, {"u1": "你好"})
    (tmp_path / "ref.txt").write_text("u1 你好世界\n", encoding="utf-8")
    (tmp_path / "hyp.txt").write_text("u1 你 好 时 界\n", encoding="utf-8")
    options = ["score", "--ref", str(tmp_path / "ref.txt"), "--hyp", str(tmp_path / "hyp.txt")]
    assert main(options) == 2 and "of 1 of 1 no word is left" in capsys.readouterr().err
    assert main([*options, "--language", "zh", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "%CER = 25.00 [1 / 4, 0 ins, 0 del, 1 sub]\n"
    assert (tmp_path / "wer-summary-test-score.txt").read_text() == "settings\tCER\nscore\t25.00\n"
    assert "时" in (tmp_path / "errs-test-score.txt").read_text(encoding="utf-8")
    assert main([*options, "--normalizer", "nowhere:f"]) == 2


@pytest.mark.parametrize("measure", ["printed", "libriheavy"])
def test_measures_that_do_not_normalize_do_not_ask_the_language(measure, tmp_path) -> None:
    texts = {"u1": "你好 世界", "u2": "Привет"}
    counts = word_errors(texts, texts, measure)
    assert (counts.words, counts.errors) == ({"printed": 3, "libriheavy": 0}[measure], 0)
    assert write_wer_files(tmp_path, "test", "key", texts, texts, measure) == counts


def test_one_reference_of_another_script_stops_no_score() -> None:
    texts = {"u1": "hello there", "u2": "Ἀχιλλεύς", "u3": "a cat"}
    counts = word_errors(texts, texts)
    assert (counts.words, counts.errors) == (4, 0)


def test_a_run_file_says_its_language(tmp_path, capsys) -> None:
    (tmp_path / "ref.txt").write_text("u1 你好\n", encoding="utf-8")
    write_nbests(tmp_path / "lists.jsonl", [nbest("u1", "你 坏", "你 好")])
    lists = (tmp_path / "lists.jsonl").read_text(encoding="utf-8")
    first = json.dumps({"options": {"language": {"language": "zh"}}}, separators=(",", ":"))
    (tmp_path / "nbest.jsonl").write_text(f"{first}\n{lists}", encoding="utf-8")
    assert main(["score", "--ref", str(tmp_path / "ref.txt"), "--hyp", str(tmp_path / "nbest.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "%CER = 50.00 [1 / 2, 0 ins, 0 del, 1 sub]", "oracle %CER = 0.00 [0 / 2, 0 ins, 0 del, 0 sub]",
    ]
