"""Vocabularies in text files, with boundary marks and without; words of scripts without spaces.
Knows: icefall_fusion.text. Must not know: torch, transformers.
"""
from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from icefall_fusion.text.scripts import begins_unit, join_words, split_units, unspaced
from icefall_fusion.text.tokens import AcousticTokens

ICEFALL = "<blk> 0\n<sos/eos> 1\n<unk> 2\n▁the 3\n▁c 4\nat 5\n▁ 6\ns 7\n#0 8\n#1 9\n"
AISHELL = "<blk> 0\n<sos/eos> 1\n<unk> 2\n你 3\n好 4\n世 5\n界 6\nA 7\nI 8\n#0 9\n"
WENET = "<blank> 0\n<unk> 1\n你 2\n好 3\n世界 4\n▁PY 5\nTHON 6\n▁ 7\n<sos/eos> 8\n"
LETTERS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "ñ": 6, "'": 7}
WORDPIECE = {"[PAD]": 0, "[UNK]": 1, "ca": 2, "##ts": 3, "the": 4}


def load(folder: Path, name: str, content) -> AcousticTokens:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return AcousticTokens.load(folder / name)


def test_tokens_of_icefall(tmp_path) -> None:
    tokens = load(tmp_path, "tokens.txt", ICEFALL)
    assert (tokens.size, tokens.blank_id, tokens.sos_eos_id, tokens.unk_id) == (8, 0, 1, 2)
    assert tokens.encode("the cats") == [3, 4, 5, 7] and tokens.decode([3, 4, 5, 7]) == "the cats"
    assert AcousticTokens.load(tmp_path).fingerprint() == tokens.fingerprint()  # a folder is searched


def test_characters_without_marks(tmp_path) -> None:
    tokens = load(tmp_path, "tokens.txt", AISHELL)
    ids = tokens.encode("你好世界AI")
    assert ids == [3, 4, 5, 6, 7, 8] == tokens.encode("你 好 世 界AI")
    assert tokens.words(ids) == ["你", "好", "世", "界AI"]  # no piece says that a word of letters begins
    begin = [tokens.pieces[index] for index, starts in enumerate(tokens.starts_word) if starts]
    assert begin == ["你", "好", "世", "界"]
    assert tokens.encode("坏") == [2]


def test_characters_and_marked_pieces_of_wenet(tmp_path) -> None:
    tokens = load(tmp_path, "units.txt", WENET)
    assert (tokens.blank_id, tokens.sos_eos_id, tokens.unk_id) == (0, 8, 1)
    ids = tokens.encode("你好 PYTHON PYTHON 世界")
    assert ids == [2, 3, 5, 6, 5, 6, 4]
    assert tokens.words(ids) == ["你", "好", "PYTHON", "PYTHON", "世界"]
    assert join_words(tokens.words(ids)) == "你好PYTHON PYTHON世界"


def test_letters_of_hugging_face(tmp_path) -> None:
    tokens = load(tmp_path, "vocab.json", LETTERS)
    assert tokens.delimiter == "|" and tokens.blank_id == 0 and tokens.unk_id == 3
    assert tokens.words(tokens.encode("año a'a")) == ["añ⁇", "a'a"]
    spaces = {("<pad>", " ", "ñ", "a")[index]: index for index in range(4)}
    assert load(tmp_path, "vocab.json", spaces).words([3, 2, 1, 3]) == ["añ", "a"]


def test_letters_of_espnet(tmp_path) -> None:
    pieces = ["<blank>", "<unk>", "<space>", "a", "b", "<sos/eos>"]
    tokens = load(tmp_path, "tokens.txt", "".join(f"{piece} {index}\n" for index, piece in enumerate(pieces)))
    assert tokens.delimiter == "<space>" and tokens.encode("ab a") == [3, 4, 2, 3]
    assert tokens.decode([3, 4, 2, 3, 5]) == "ab a"


def test_characters_beside_a_delimiter_close_words_too(tmp_path) -> None:
    tokens = load(tmp_path, "vocab.json", {**LETTERS, "你": 8, "好": 9})
    ids = tokens.encode("你好a a你")
    assert [tokens.pieces[i] for i in ids] == ["你", "好", "a", "|", "a", "你"]
    assert tokens.words(ids) == ["你", "好a", "a", "你"]


def test_pieces_that_go_on_with_a_word(tmp_path) -> None:
    tokens = load(tmp_path, "vocab.json", WORDPIECE)
    assert tokens.words([4, 0, 2, 3]) == ["the", "cats"] and tokens.encode("the cats") == [4, 2, 3]


def test_pieces_without_any_mark_are_words_and_that_is_said(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        tokens = load(tmp_path, "tokens.txt", "<blk> 0\nAH 1\nB 2\n")
    assert "no piece marks where a word begins" in caplog.text
    assert tokens.words([1, 2]) == ["AH", "B"]


@pytest.mark.parametrize("content,message", [
    ("<blk> 0\na\n", "tokens.txt line 2 must be a piece and its id, but is 'a'"),
    ("<blk> 0\na 1\na 2\n", "line 3: pieces must differ, but 'a' comes twice"),
    ("<blk> 0\na 1\nb 1\n", r"ids of .* must differ from one another, but is \(1, 'a', 'b'\)"),
    ("<blk> 0\na 2\n", r"ids of .* must be 0..1 without a gap, but is 'without 1'"),
    ("", "ids of .* must be 0..-1 without a gap"),
    ("a 0\nb 1\n", "must have a blank, one of"),
])
def test_broken_tables(tmp_path, content, message) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, "tokens.txt", content)


def test_broken_files(tmp_path) -> None:
    for name, content, message in (
        ("vocab.json", "[1]", "must be a JSON object of ids by piece, but is"),
        ("vocab.json", '{"a": 0.5}', "must be a JSON object of ids by piece"),
        ("vocab.json", "{", "must be a JSON object of ids by piece, but is not"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, name, content)
    (tmp_path / "units.txt").write_bytes("你 0\n".encode("gb18030"))
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        AcousticTokens.load(tmp_path / "units.txt")


@pytest.fixture(scope="module")
def mandarin(tmp_path_factory) -> AcousticTokens:
    """SentencePiece pieces of Chinese characters, some of several characters, and of Latin words."""
    folder = tmp_path_factory.mktemp("zh")
    lines = ["今天天气很好我们去公园", "明天天气不好我们在家", "用python写程序 ai很好", "我们今天写程序"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "bpe"), vocab_size=70, model_type="bpe",
        user_defined_symbols=["<blk>", "<sos/eos>"], unk_id=2, bos_id=-1, eos_id=-1, pad_id=-1,
        add_dummy_prefix=False, character_coverage=1.0, minloglevel=2, normalization_rule_name="identity",
    )
    return AcousticTokens.load(folder)


@given(st.lists(st.sampled_from("今天气很好我们公园明家用写程序a p".split() + list("天气好我们写"))))
def test_pieces_of_sentencepiece_spell_the_text(mandarin, parts) -> None:
    text = unspaced(" ".join(parts))
    ids = mandarin.encode(text)
    assert mandarin.encode(" ".join(parts)) == ids
    words = mandarin.words(ids)
    if mandarin.unk_id not in ids:
        assert split_units(join_words(words)) == split_units(text)
    for word, (start, _) in zip(words, mandarin.word_spans(ids)):
        assert mandarin.starts_word[ids[start]] or start == 0 or not begins_unit(word)
