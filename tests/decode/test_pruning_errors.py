"""The job pruning-errors counts every word that is wrong, and its method's results are those of any decode.
Knows: the job. Must not know: how a beam is watched.
"""
from __future__ import annotations

import json

from job_tools import arguments, lists
from lhotse import CutSet

from icefall_fusion.__main__ import main
from icefall_fusion.decode.pruning_errors import missing_words
from icefall_fusion.fusion.watch import FATES
from icefall_fusion.scoring.wer import compare_words


def test_every_wrong_word_has_a_fate(made, tmp_path, capsys) -> None:
    models = ["--emissions.model", made["model"], "--llm.path", made["llm"], "--search.beam", "4"]
    command = ["pruning-errors", *models, "--cuts", made["cuts"], "--out", str(tmp_path / "out.json")]
    assert main([*command, "--method", "llm-delayed-interval-8"]) == 0
    assert "| kind of word | never in the beam |" in capsys.readouterr().out
    told = json.loads((tmp_path / "out.json").read_text())
    assert main(arguments(made, tmp_path / "run", "--methods", "llm-delayed-interval-8")) == 0
    run = lists(tmp_path / "run", "llm-delayed-interval-8")
    texts = {cut.id: cut.supervisions[0].text for cut in CutSet.from_file(made["cuts"])}
    errors = [compare_words(text.split(), run[name][0].words()) for name, text in texts.items()]
    assert told["wrong"] == sum(one.deletions + one.substitutions for one in errors) > 0
    assert told["words"] == sum(one.words for one in errors) and told["unwatched"] == 0
    counted = [row[fate] for row in told["kinds"].values() for fate in FATES]
    assert sum(counted) == told["wrong"]
    assert main([*command, "--method", "ctc-prefix"]) == 2
    assert "PruningErrorsOptions.method must have a delayed fusion" in capsys.readouterr().err
    assert main([*command, "--method", "llm-delayed-shortest", "--longest", "1"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["unwatched"] > 0


def test_missing_words_are_those_without_a_right_counterpart() -> None:
    assert missing_words("we saw the sea".split(), "saw a the see now".split()) == [0, 3]
    assert missing_words([], ["a"]) == [] and missing_words(["a"], []) == [0]
