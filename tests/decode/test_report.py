"""Two methods compared: figures agree with one another, pages are whole, the LLM's scores are its own.
Knows: the jobs report and score. Must not know: how words are recognized.
"""
from __future__ import annotations

import gzip
import json
import logging

import pytest
from tiny import LINES

from icefall_fusion.__main__ import main
from icefall_fusion.data import espeak
from icefall_fusion.decode.comparison import CAUSES
from icefall_fusion.decode.report import names_in
from icefall_fusion.lm import CausalLm
from icefall_fusion.nbest import Hypothesis, NBest, write_nbests
from icefall_fusion.scoring.pages import Page

HEARD = (  # of each of the four lines of the references: by A, by B, others in B's list
    ("the cat sad on the mat and looked at the see", "the cat sat on mat and looked at the sea", ()),
    ("a dog and cat met near the old harbor", "a dog an a cat met near the the old harbor",
     ("a dog and a cat met near the old harbor",)),
    ("we saw the see at dawn and he didn't speak", "we saw the sea at dawn and she didn't speak", ()),
    ("she sold the red shells to an honest sailer", "she sold the red shells to an honest sailor", ()),
)


@pytest.fixture(scope="module")
def compared(made, tmp_path_factory):
    """Two methods on the references, and what is told of them: folder, command, plain values."""
    folder = tmp_path_factory.mktemp("compared")
    names = [json.loads(line)["id"] for line in _lines(made["cuts"])]
    files = []
    for column, method in enumerate(("ctc-greedy", "llm-delayed-shortest")):
        files.append(str(folder / f"nbest-noise-{method}.jsonl"))
        lists = []
        for index, name in enumerate(names):
            texts = [HEARD[index % 4][column], *(HEARD[index % 4][2] if column else ())]
            hypotheses = [Hypothesis([], text, {"total": -rank}) for rank, text in enumerate(texts)]
            lists.append(NBest(name, hypotheses))
        write_nbests(files[-1], lists)
    command = ["report", "--compare", *files, "--ref", made["cuts"], "--samples", "200"]
    assert main([*command, "--llm.path", made["llm"], "--out", str(folder / "out")]) == 0
    return folder, command, json.loads((folder / "out" / "compare.json").read_text())


def test_figures_agree_with_one_another_and_with_the_job_score(compared, made, capsys) -> None:
    _, command, content = compared
    assert (content["a"], content["b"]) == ("ctc-greedy", "llm-delayed-shortest")
    for path, wer in zip(command[2:4], content["wer"]):
        assert main(["score", "--ref", made["cuts"], "--hyp", path]) == 0
        assert f"%WER = {wer:.2f} [" in capsys.readouterr().out
    assert content["significance"]["difference"] == pytest.approx(content["wer"][1] - content["wer"][0])
    kinds = content["kinds"]
    for outcome in ("won", "lost", "wrong"):
        assert sum(row[outcome] for row in kinds.values()) == content["outcomes"].get(outcome, 0)
    assert kinds["inserted"]["lost"] == 2 and kinds["deleted"] == {"won": 2, "lost": 2, "wrong": 0}
    if espeak.available():
        assert kinds["homophone"]["won"] == 5  # see / sea four times, sailer / sailor
    assert kinds["function word"]["lost"] == 4  # and / an, he / she
    wrong = {cause: sum(row[cause] for row in content["beam"].values()) for cause in CAUSES}
    assert wrong == {"in B's list": 2, "in A's list alone": 4, "in no list": 0}
    cells = content["tokens"]
    assert sum(cell["words"] for cell in cells) == content["words"]
    assert sum(cell["errors_b"] for cell in cells) == sum(wrong.values())


def test_examples_have_the_llm_s_own_scores(compared, made) -> None:
    _, _, content = compared
    lm = CausalLm.from_pretrained(made["llm"])
    rows = {json.loads(line)["id"]: json.loads(line) for line in _lines(made["cuts"])}
    assert {example["outcome"] for example in content["examples"]} == {"won", "lost"}
    for example in content["examples"]:
        assert example["reference"] in (example["a"], example["b"])
        llm, text = example["llm"], rows[example["utterance"]]["supervisions"][0]["text"]
        assert llm["right"] == pytest.approx(lm.log_prob(text), abs=1e-3)
        assert llm["prefers"] == ("right" if llm["right"] > llm["wrong"] else "wrong")
        if example["reference"] != "*":
            spelled = "".join(token for token, _ in llm["tokens_right"])
            assert spelled.strip().startswith(example["reference"])
    [sad] = [e for e in content["examples"] if e["a"] == "sad"]
    wrong = LINES[0].replace("sat", "sad")
    assert sad["llm"]["wrong"] == pytest.approx(lm.log_prob(wrong), abs=1e-3)
    assert sad["context"] == "the cat *sat* on the mat and"


def _lines(path: str) -> list[str]:
    with gzip.open(path, "rt") as file:
        return file.read().splitlines()


def test_pages_hold_everything(compared, capsys) -> None:
    folder, command, content = compared
    text, page = (folder / "out" / "compare.md").read_text(), (folder / "out" / "compare.html").read_text()
    assert "src=" not in page and "href=" not in page and "<script" not in page
    for part in (f"WER of A {content['wer'][0]:.2f} %", "Words won and lost", "Examples of words lost by B",
                 "by the lists that hold them", "tokens of a word"):
        assert part in text and part in page
    assert main(command) == 0  # no LLM, nothing written
    printed = capsys.readouterr().out
    assert "Words won and lost" in printed and "tokens of a word" not in printed


def test_plain_texts_serve_too_and_homophones_need_espeak(tmp_path, capsys, monkeypatch, caplog) -> None:
    texts = {"ref": "we see the sea", "one": "we sea the sea", "two": "we see the"}
    for name, line in texts.items():
        (tmp_path / name).write_text(f"u1 {line}\n")
    command = ["report", "--compare", str(tmp_path / "one"), str(tmp_path / "two"), "--ref",
               str(tmp_path / "ref"), "--samples", "10"]
    if espeak.available():
        assert main(command) == 0
        assert "| homophone | 1 | 0 | 0 | 1 |" in capsys.readouterr().out
    monkeypatch.setattr(espeak, "available", lambda: False)
    with caplog.at_level(logging.WARNING):
        assert main(command) == 0
    assert "| homophone | 0 | 0 | 0 | 0 |" in capsys.readouterr().out
    assert caplog.text.count("homophones are not told apart") == 1


@pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
def test_kinds_of_other_languages(tmp_path, capsys, caplog) -> None:
    """他 and 她 sound alike, 的 is a function word, 三 a number; Russian has neither lists nor a voice."""
    texts = {"ref": "他说三本书的事", "one": "他说三本书的事", "two": "她说五本书了"}
    for name, line in texts.items():
        (tmp_path / name).write_text(f"u1 {line}\n")
    command = ["report", "--compare", str(tmp_path / "one"), str(tmp_path / "two"), "--ref",
               str(tmp_path / "ref"), "--samples", "10", "--language"]
    assert main([*command, "zh"]) == 0
    page = capsys.readouterr().out
    assert "7 characters in 1 utterances. CER of A 0.00 %" in page
    for kind in ("homophone", "number", "function word", "deleted"):
        assert f"| {kind} | 0 | 1 | 0 | -1 |" in page, kind
    for name, line in {"ref": "он видел 3 моря", "one": "он видел 3 моря", "two": "он видел 5 море"}.items():
        (tmp_path / name).write_text(f"u1 {line}\n")
    with caplog.at_level(logging.WARNING):
        assert main([*command, "ru"]) == 0
    page = capsys.readouterr().out
    assert "function word" not in page and "| number | 0 | 1 | 0 | -1 |" in page
    assert "homophones are not told apart: there is no voice of ru" in caplog.text


@pytest.mark.parametrize(("more", "message"), [
    (["--runs", "a", "--language", "zh"], "ReportOptions.language must be left out without Report"),
    (["--runs", "a", "--normalizer", "m:f"], "ReportOptions.normalizer must be left out without"),
    (["--compare", "a", "b", "--ref", "c", "--language", "Chinese"], "language must be an ISO 639 code"),
    (["--compare", "a"], "ReportOptions.compare must name two files"),
    (["--compare", "a", "b"], "ReportOptions.ref must name the references"),
    (["--compare", "a", "b", "--ref", "c", "--runs", "d"], "ReportOptions.runs must be left out"),
    (["--compare", "a", "b", "--ref", "c"], "there is no file of texts at c"),
    ([], "ReportOptions.runs must name at least one folder"),
])
def test_bad_options_are_named(more, message, capsys) -> None:
    assert main(["report", *more]) == 2
    assert message in capsys.readouterr().err


def test_names_are_capitals_inside_of_sentences(tmp_path) -> None:
    cased = ("Old Marsh saw the Quodling’s boat. The sea was calm, said Rose.",
             "“Then I’ll see,” said he; a rose.")
    rows = [{"supervisions": [{"text": "x", "custom": {"cased": text}}]} for text in cased]
    (tmp_path / "cuts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert names_in(str(tmp_path / "cuts.jsonl")) == {"marsh", "quodling's"}
    assert names_in("none.txt") == set()


def test_a_page_escapes_its_text() -> None:
    page = Page("A < B")
    page.table(["a|b", "n"], [["x|*<y>*", 1234], ["2 * 3", 0.5]])
    assert "| x\\|**<y>** | 1,234 |" in page.markdown() and "| 2 * 3 | 0.50 |" in page.markdown()
    assert "<td>x|<mark>&lt;y&gt;</mark>" in page.html() and "A &lt; B" in page.html()
