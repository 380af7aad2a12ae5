"""tools/bench/retokenization.py and dialogue.py: figures that can be told by hand, on tiny models and books.
Knows: the benchmarks as programs. Must not know: what real tokenizers and books give.
"""
from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import tiny

from icefall_fusion.text.language import Language
from icefall_fusion.text.tokens import AcousticTokens

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


def run_bench(name: str, monkeypatch, *arguments: object) -> list[dict]:
    """Run a benchmark as a program; return its rows."""
    output = Path(str(arguments[-1]))
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments[:-1]), "--output", str(output)])
    runpy.run_path(str(BENCH / name), run_name="__main__")
    return json.loads(output.read_text())["rows"]


def test_closing_inside_of_words_costs_and_rises(tmp_path: Path, monkeypatch) -> None:
    text = tmp_path / "dev.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny.LINES[:4]))
    llm = tiny.language_model(tmp_path / "llm", 3, pieces=False)
    pieces = tiny.write_bpe(tmp_path / "lang").parent
    rows = run_bench("retokenization.py", monkeypatch, "--text", text, "--pieces", pieces, "--tokenizers",
                     llm, pieces, "--boundaries", "words", "tokens", "pieces", "letters", "--lm", llm,
                     "--lm-utterances", "2", tmp_path / "out.json")
    table = {(row["tokenizer"], row["boundaries"]): row for row in rows if "tokenizer" in row}
    assert set(table) == {(str(llm), rule) for rule in ("words", "tokens", "pieces", "letters")} | {
        (str(pieces), "words")}
    assert table[str(llm), "words"]["changed"] == table[str(llm), "tokens"]["changed"] == 0.0
    assert 0 < table[str(llm), "pieces"]["changed"] < 1 and 0 < table[str(llm), "letters"]["changed"] < 1
    assert len({row["tokens_a_word"] for (name, _), row in table.items() if name == str(llm)}) == 1
    words, parts, letters = (row for row in rows if "lm" in row)
    assert words["appended"] == pytest.approx(words["plain"], rel=1e-4) and words["rises"] == 0
    for row in (parts, letters):  # a random model finds no spelling more likely, but scores of parts rise
        assert row["plain"] == pytest.approx(words["plain"], rel=1e-5) and row["rises"] > 0
        assert row["appended"] != pytest.approx(row["plain"], rel=1e-3)
    assert letters["closings_a_word"] > parts["closings_a_word"] > words["closings_a_word"] == 1.0


def test_characters_of_mandarin_change_tokens_but_for_those_that_are_held_back() -> None:
    sys.path.insert(0, str(BENCH))
    try:
        import retokenization
    finally:
        sys.path.remove(str(BENCH))
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = ["今天天气很好我们去公园", "明天天气不好我们在家"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(lines * 8, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    rows = {}
    for rule in ("words", "tokens"):
        with pytest.warns(UserWarning, match="cannot be used word by word"):
            rows[rule] = retokenization.boundary_row(tokenizer, rule, lines, None, Language("zh"))
    assert rows["words"]["changed"] > 0 == rows["words"]["held"]
    assert rows["tokens"]["changed"] == 0 < rows["tokens"]["held"]
    single = sorted(set("".join(lines)) - {"气"})
    tokens = AcousticTokens.from_pieces(["<blk>", *single, "天气"], 0)
    parts = retokenization.parts_of(lines[0], "words", tokens)
    assert parts == ["今", "天", "天气", "很", "好", "我", "们", "去", "公", "园"]


BOOKS = {
    "en": 'A cat sat there. "I saw the sea at dawn," he said. "It was red and very calm."\n\n'
          "The sea was calm.\n",
    "es": "Era tarde en la casa. \n\n—¿Quién llama a la puerta? —dijo Juan sin mirar—. ¡Nadie llama aquí!\n\n"
          "»Así pensaba él aquella tarde.\n",
    "zh": '天气很好，没有风。他说："我们去海边看看吧，你说好不好？"她没有说话。\n',
}
PARTS = {
    "en": {"A cat sat there.": "narration", '"I saw the sea at dawn," he said.': "mixed",
           '"It was red and very calm."': "dialogue", "The sea was calm.": "narration",
           "No such text": "not found"},
    "es": {"Era tarde en la casa.": "narration", "¿Quién llama a la puerta?": "dialogue",
           "dijo Juan sin mirar .": "narration", "¡Nadie llama aquí!": "dialogue",
           "»Así pensaba él aquella tarde.": "dialogue"},
    "zh": {"天气很好，没有风。": "narration", '"我们去海边看看吧，你说好不好？"': "dialogue",
           "她没有说话。": "narration"},
}


@pytest.mark.parametrize("language", ["en", "es", "zh"])
def test_parts_of_books_and_their_errors(language, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "one.txt").write_text(BOOKS[language], encoding="utf-8")
    own = Language(language)
    rows = [{"id": f"u{index}", "book": "one", "index": index, "cased": cased, "text": own.normalize(cased)}
            for index, cased in enumerate(PARTS[language])]
    source = tmp_path / "selected.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    heard = tmp_path / "heard.txt"  # all of the narration is right, nothing else is
    heard.write_text("".join(
        f"{row['id']} {row['text'] if part == 'narration' else ''}\n"
        for row, part in zip(rows, PARTS[language].values())), encoding="utf-8")
    found = run_bench("dialogue.py", monkeypatch, "--books", tmp_path, "--utterances", source, "--language",
                      language, "--nbest", heard, "--write", tmp_path / "parts.json", tmp_path / "out.json")
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert list(parts.values()) == list(PARTS[language].values())
    row = found[-1]
    assert row["narration"]["wer"] == 0 and row["dialogue"]["wer"] == 100
    assert row["all"]["words"] == sum(len(own.units(one["text"])) for one in rows)


def test_single_quotes_and_books_without_marks(tmp_path: Path, monkeypatch) -> None:
    lines = {"one": "'Yes,' said he, 'it's the boys' boat.' The sea was calm.",
             "two": "The sea was calm. He left.",
             "curly": "“He cried, ‘Stop,’ and ran.” ‘Twas calm on the sea.\n\n“So it was.”"}
    cut = {"one": ("it's the boys' boat.", "The sea was calm."), "two": ("The sea was calm.",),
           "curly": ("and ran.", "‘Twas calm on the sea.", "So it was.")}
    rows = []
    for book, line in lines.items():
        (tmp_path / f"{book}.txt").write_text(line, encoding="utf-8")
        rows += [{"id": f"{book}{index}", "book": book, "index": index, "cased": cased, "text": cased.lower()}
                 for index, cased in enumerate(cut[book])]
    source = tmp_path / "selected.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_bench("dialogue.py", monkeypatch, "--books", tmp_path, "--utterances", source, "--write",
              tmp_path / "parts.json", tmp_path / "out.json")
    assert json.loads((tmp_path / "parts.json").read_text()) == {
        "one0": "dialogue", "one1": "narration", "two0": "unmarked",
        "curly0": "dialogue", "curly1": "narration", "curly2": "dialogue"}
