"""Tuning: counts equal reweighting one by one; the search reaches known optima; results are written.
Knows: icefall_fusion.decode.tune and score_table. Must not know: how hypotheses came about.
"""
from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tiny
import yaml

from icefall_fusion.__main__ import main
from icefall_fusion.decode.climb import Climb
from icefall_fusion.decode.score_table import ScoreTable, coordinate_search
from icefall_fusion.decode.tune_hotwords import choose_weight
from icefall_fusion.decode.weights import read_weights, weights_of
from icefall_fusion.nbest import Hypothesis, NBest, write_nbests
from icefall_fusion.scoring.phrases import PhraseScores, score_phrases
from icefall_fusion.scoring.score import read_texts
from icefall_fusion.scoring.wer import word_errors


def make(count: int = 40, seed: int = 1) -> tuple[list[NBest], dict[str, str]]:
    """Hypotheses whose LLM score tells right from wrong, at a scale at which CTC misleads."""
    rng = random.Random(seed)
    nbests, references = [], {}
    for index in range(count):
        words = [rng.choice("abcdef") for _ in range(rng.randrange(3, 9))]
        references[f"u{index}"] = " ".join(words)
        hypotheses = []
        for rank in range(rng.randrange(2, 7)):
            changed = list(words)
            for _ in range(rank):
                changed[rng.randrange(len(changed))] = rng.choice("abcdef")
            if rank == 3:
                changed = changed[:-1]
            wrong = sum(a != b for a, b in zip(words, changed)) + len(words) - len(changed)
            scores = {"ctc": 2.0 * wrong + rng.gauss(0, 1) - 20, "llm": -5.0 * wrong + rng.gauss(0, 2) - 10}
            scores["words"] = float(len(changed))
            hypotheses.append(Hypothesis([], " ".join(changed), {**scores, "total": scores["ctc"]}))
        nbests.append(NBest(f"u{index}", sorted(hypotheses, key=lambda h: -h.total)))
    return nbests, references


def test_counts_equal_reweighting_one_by_one() -> None:
    nbests, references = make()
    table = ScoreTable.make(nbests, references, ["llm"])
    for llm, bonus in ((0.0, 0.0), (0.3, -0.7), (1.5, 0.4)):
        weights = {"ctc": 1.0, "llm": llm, "words": bonus}
        texts = {nbest.utterance: nbest.reweight(weights)[0].text for nbest in nbests}
        assert int(table.count(np.array([[llm, bonus]]))[0]) == word_errors(references, texts).errors
    assert table.words == word_errors(references, references).words


def test_the_search_beats_every_point_of_a_coarse_grid() -> None:
    nbests, references = make()
    table = ScoreTable.make(nbests, references, ["llm"])
    weights, errors = coordinate_search(table, highest=2.0, bonus=2.0, rounds=4)
    grid = np.array([[a, b] for a in np.linspace(0, 2, 9) for b in np.linspace(-2, 2, 9)])
    assert errors <= table.count(grid).min() + 1
    assert weights["llm"] > 0.3 and errors < table.count(np.zeros((1, 2)))[0]
    assert int(table.count(np.array([[weights["llm"], weights["words"]]]))[0]) == errors


def test_what_a_source_takes_a_word_is_that_of_the_best_hypotheses() -> None:
    nbests, references = make(9)
    table = ScoreTable.make(nbests, references, ["llm"])
    for weights in ({"ctc": 1.0, "llm": 0.0, "words": 0.0}, {"ctc": 1.0, "llm": 0.7, "words": -0.4}):
        best = [nbest.reweight(weights)[0].scores for nbest in nbests]
        taken = -sum(scores["llm"] for scores in best) / sum(scores["words"] for scores in best)
        assert table.costs(weights) == {"llm": pytest.approx(min(taken, 7.0))}
    table.scores[..., 0] *= 0.1
    cheap = table.costs({"llm": 0.0, "words": 0.0})["llm"]
    best = [nbest.reweight({"ctc": 1.0})[0].scores for nbest in nbests]
    assert 0 < cheap < 7 and cheap == pytest.approx(
        -0.1 * sum(scores["llm"] for scores in best) / sum(scores["words"] for scores in best))


def along_a_valley(weights) -> float:
    """Errors of texts: their length is right where the bonus pays for the LLM, whose best weight is 0.5."""
    length = weights["words"] - 6.0 * weights["llm"]
    return 10 * abs(length) + abs(weights["llm"] - 0.5)


@pytest.mark.parametrize("cost", [6.0, 4.5])
def test_a_climb_follows_the_valley_of_a_bonus_that_pays(cost) -> None:
    start, climbed = {"ctc": 1.0, "llm": 0.1, "words": 0.6}, {}
    for name, costs in (("paid", {"llm": cost}), ("unpaid", {})):
        climb = Climb(along_a_valley, costs, ("ctc",), 1.6, 2, 6.0)
        weights, rate = climbed[name] = climb.from_best([start, {**start, "words": -1.0}])
        assert rate == along_a_valley(weights) <= along_a_valley(start) and weights["ctc"] == 1.0
    assert climbed["unpaid"][0] == start  # every step of one weight alone makes texts too short or too long
    if cost == 6.0:
        assert climbed["paid"][1] < 0.1
    climb = Climb(along_a_valley, {"llm": cost}, ("ctc",), 1.6, 0, 6.0)
    more = climb.with_more({"words": 0.5, "nlm": 0.3}, {"nlm": 0.4, "llm": 0.2})
    assert more == {"llm": 0.2, "nlm": 0.3, "words": pytest.approx(0.5 + 0.2 * cost)}


def test_lists_of_several_files_are_joined() -> None:
    nbests, references = make(6)
    halves = [NBest(n.utterance, n.hypotheses[part::2]) for n in nbests for part in (0, 1)]
    one, two = (ScoreTable.make(lists, references, ["llm"]) for lists in (nbests, halves))
    weights = np.array([[0.5, 0.1]])
    assert one.count(weights) == two.count(weights)


def test_missing_scores_and_references_are_told() -> None:
    nbests, references = make(3)
    with pytest.raises(ValueError, match=r"scores of \['nlm', 'words'\].*3 have none"):
        ScoreTable.make(nbests, references, ["nlm"])
    with pytest.raises(ValueError, match="lack 'u2'"):
        ScoreTable.make(nbests, {"u0": "a", "u1": "b"}, ["llm"])


def test_references_without_a_list_are_left_out() -> None:
    nbests, references = make(3)
    table = ScoreTable.make(nbests, references, ["llm"])
    more = ScoreTable.make(nbests, {**references, "skipped": "a"}, ["llm"])
    assert table.words == more.words and table.errors.tolist() == more.errors.tolist()
    with pytest.raises(ValueError, match="hold an utterance at least"):
        ScoreTable.make([], references, ["llm"])


def test_job_writes_weights_that_decode_reads(tmp_path) -> None:
    nbests, references = make()
    write_nbests(tmp_path / "nbest.jsonl", nbests)
    (tmp_path / "ref.txt").write_text("".join(f"{u} {text}\n" for u, text in references.items()))
    out = tmp_path / "weights.yaml"
    arguments = ["--nbest", f"[{tmp_path / 'nbest.jsonl'}]", "--ref", str(tmp_path / "ref.txt")]
    assert main(["tune", *arguments, "--out", str(out), "--methods", "llm-nbest-rescoring"]) == 0
    weights = weights_of("llm-nbest-rescoring", read_weights(str(out)))
    assert weights["llm"] > 0.3 and weights["ctc"] == 1.0
    assert yaml.safe_load(out.read_text())["dev_wer"]["llm-nbest-rescoring"] < 50


def test_confirmation_gives_the_error_rate_of_a_decode_with_its_weights(tmp_path, capsys) -> None:
    made = tiny.everything(tmp_path / "models")
    models = [f"emissions.model={made['model']}", *(f"{n}.path={made[n]}" for n in ("nlm", "llm"))]
    # utterances are cut into segments in tuning as in decoding, and the LLM reads the earlier ones
    options = [*models, f"test_sets.noise={made['cuts']}", "search.beam=4", "longest=1", "llm.carry=true"]
    method, scores = "llm-delayed-interval-16", "nlm-nbest-rescoring+llm-nbest-rescoring"
    as_words = [f"--{option}" for option in options]
    assert main(["decode", *as_words, "--methods", scores, "--out", str(tmp_path / "dev")]) == 0
    weights = tmp_path / "weights.yaml"
    confirm = [f"--confirm.{option}" for option in [*options, f"out={tmp_path / 'confirm'}"]]
    lists = str(tmp_path / "dev" / f"nbest-noise-{scores}.jsonl")
    assert main(["tune", "--nbest", f"[{lists}]", "--ref", made["cuts"], "--methods", f"{method},nlm-shallow",
                 "--out", str(weights), *confirm]) == 0
    assert weights.read_text() in capsys.readouterr().out
    out = tmp_path / "again"
    assert main(["decode", *as_words, "--methods", method, "--weights", str(weights), "--out", str(out)]) == 0
    (row,) = json.loads((out / "results.json").read_text())
    assert row["wer"] == pytest.approx(yaml.safe_load(weights.read_text())["dev_wer"][method], abs=6e-3)


def test_hot_words_are_weighed_by_recall_against_all_else(tmp_path) -> None:
    made = tiny.everything(tmp_path / "models")
    options = [f"emissions.model={made['model']}", f"test_sets.noise={made['cuts']}", "search.beam=4",
               f"ngram.path={made['ngram']}"]
    references = read_texts(made["cuts"])
    word = max(" ".join(references.values()).split(), key=len)
    (tmp_path / "names.txt").write_text(f"{word}\t200\n")  # noise says nothing of itself
    as_words = [f"--{option}" for option in options]
    assert main(["decode", *as_words, "--methods", "ngram-shallow", "--out", str(tmp_path / "dev")]) == 0
    method, weights = "hotwords-shallow+ngram-shallow", tmp_path / "weights.yaml"
    confirm = [f"--confirm.{one}" for one in [*options, f"out={tmp_path / 'confirm'}",
                                              f"hotwords={tmp_path / 'names.txt'}"]]
    given = ["--nbest", f"[{tmp_path / 'dev' / 'nbest-noise-ngram-shallow.jsonl'}]", "--ref", made["cuts"],
             "--methods", method, "--confirm_rounds", "1", *confirm]
    assert main(["tune", *given, "--out", str(weights), "--harm", "1000"]) == 0
    free = yaml.safe_load(weights.read_text())
    assert main(["tune", *given, "--out", str(weights), "--harm", "0"]) == 0
    held = yaml.safe_load(weights.read_text())
    worth, bare = free["dev_hotwords"][method], held["dev_hotwords"][method]
    assert worth["spoken"] > 0 and worth["recall"] > worth["recall_without"]
    assert bare["wer_else"] <= bare["wer_else_without"] and bare["recall"] <= worth["recall"]
    again = ["--hotwords", str(tmp_path / "names.txt"), "--methods", method, "--out", str(tmp_path / "again")]
    assert main(["decode", *as_words, *again, "--weights", str(weights)]) == 0
    (row,) = json.loads((tmp_path / "again" / "results.json").read_text())
    assert row["wer"] == pytest.approx(held["dev_wer"][method], abs=6e-3)


def test_the_weight_is_the_smallest_of_the_best_recall_without_harm() -> None:
    tried = []

    def score(weight: float) -> PhraseScores:
        tried.append(weight)
        return PhraseScores(20, min(15, int(10 * weight)), 0, 1000, 100 + int(2 * max(0.0, weight - 1.2)))

    assert choose_weight(score, 0.0)[0] == 1.5
    assert len(tried) == len(set(tried))
    assert choose_weight(score, 0.2)[0] == 1.5
    weight, worth = choose_weight(lambda tried: PhraseScores(20, int(5 * tried), 0, 100, int(tried > 1.6)), 0)
    assert weight == 1.5 and worth["recall"] == 35.0 and worth["recall_without"] == 0.0
    weight, _ = choose_weight(lambda tried: PhraseScores(20, int(8 * tried), 0, 100, int(tried > 1.8)), 0)
    assert weight == 1.75  # between two of the grid
    with pytest.raises(ValueError, match="references of dev"):
        choose_weight(lambda weight: PhraseScores(0, 0, 0, 10, 1), 0.1)


def test_phrases_are_counted_and_all_else_is_scored() -> None:
    references = {"a": "We met Mary Ann at the old mill.", "b": "Mary sang"}
    texts = {"a": "we met mary ann at old old mill mary", "b": "mary ann sang"}
    found = score_phrases(references, texts, ["Mary Ann", "mary", "mill"])
    assert (found.spoken, found.found, found.false) == (3, 2, 2)
    assert (found.words_else, found.errors_else) == (6, 3)  # the -> old; mary and ann put in
    assert found.recall == pytest.approx(200 / 3) and found.wer_else == 50.0
    with pytest.raises(ValueError, match="texts.*'b'"):
        score_phrases(references, {"a": ""}, ["mary"])


def mandarin_files(tmp_path) -> list[str]:
    """Write N-best lists of Mandarin, whose LLM score tells right from wrong; return the job's options."""
    lists = [
        NBest(f"u{number}", [
            Hypothesis([], text, {"ctc": ctc, "llm": llm, "words": 4.0, "total": ctc})
            for text, ctc, llm in (("你 坏 世 界", -1.0, -9.0), ("你 好 世 界", -2.0, -3.0))
        ])
        for number in range(4)
    ]
    write_nbests(tmp_path / "nbest.jsonl", lists)
    text = "".join(f"u{number} 你好，世界\n" for number in range(4))
    (tmp_path / "ref.txt").write_text(text, encoding="utf-8")
    return ["tune", "--nbest", str(tmp_path / "nbest.jsonl"), "--ref", str(tmp_path / "ref.txt"),
            "--out", str(tmp_path / "weights.yaml"), "--methods", "llm-nbest-rescoring"]


def test_weights_of_another_language_are_those_of_its_own_errors(tmp_path) -> None:
    assert main([*mandarin_files(tmp_path), "--language", "zh"]) == 0
    assert yaml.safe_load((tmp_path / "weights.yaml").read_text())["dev_wer"] == {"llm-nbest-rescoring": 0.0}


def test_references_whose_words_vanish_are_no_division_by_zero(tmp_path, capsys) -> None:
    assert main(mandarin_files(tmp_path)) == 2
    assert "of 4 of 4 no word is left, e.g. u0: '你好，世界'" in capsys.readouterr().err
    options = mandarin_files(tmp_path)
    (tmp_path / "ref.txt").write_text("".join(f"u{number} ...\n" for number in range(4)))
    assert main(options) == 2
    assert "references must have words of the language 'en'" in capsys.readouterr().err
