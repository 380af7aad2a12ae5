"""Acoustic vocabularies: SentencePiece models, pieces with a word mark, letters with a delimiter.
Knows: icefall_fusion.text.tokens. Must not know: torch, transformers.
"""
from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from icefall_fusion.data.tokenizers import train_pieces
from icefall_fusion.text.tokens import AcousticTokens

LINES = ["the night was dark", "a knight rode to the dark tower", "don't mourn in the morning said he"] * 20
LETTERS = AcousticTokens.from_pieces(["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "'"], 0, delimiter="|")
MARKED = AcousticTokens.from_pieces(["<blk>", "<sos/eos>", "<unk>", "▁", "▁a", "b", "▁b", "ab", "a"], 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    train_pieces(LINES, 28, folder)
    return folder


def test_load_follows_the_icefall_convention(folder: Path) -> None:
    tokens = AcousticTokens.load(folder)
    assert tokens.pieces[:3] == ["<blk>", "<sos/eos>", "<unk>"]
    assert (tokens.size, tokens.blank_id, tokens.sos_eos_id, tokens.unk_id) == (28, 0, 1, 2)
    table = (folder / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert table == [f"{piece} {index}" for index, piece in enumerate(tokens.pieces)]
    assert tokens.fingerprint() == AcousticTokens.load(folder / "bpe.model").fingerprint()
    assert tokens.starts_word == [piece.startswith("▁") for piece in tokens.pieces]


def test_encode_and_decode_agree_with_sentencepiece(folder: Path) -> None:
    tokens = AcousticTokens.load(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "bpe.model"))
    for line in LINES[:3]:
        ids = tokens.encode(line)
        assert ids == processor.encode(line)
        assert tokens.decode(ids) == processor.decode(ids) == line
    assert tokens.encode("") == [] and tokens.decode([]) == ""


def test_delimiter_starts_the_next_word_and_has_no_text() -> None:
    assert [LETTERS.pieces[index] for index, starts in enumerate(LETTERS.starts_word) if starts] == ["|"]
    ids = [4, 5, 4, 4, 6, 0, 5, 4]
    assert LETTERS.words(ids) == ["a", "ba"]
    assert LETTERS.word_spans(ids) == [(1, 2), (4, 7)]
    assert LETTERS.encode("ab b'a") == [5, 6, 4, 6, 7, 5]
    assert LETTERS.decode(LETTERS.encode("az")) == "a⁇"


def test_empty_words_and_silent_pieces_vanish() -> None:
    assert MARKED.words([1, 3, 3, 5, 0, 4, 1]) == ["b", "a"]
    assert MARKED.word_spans([1, 3, 3, 5, 0, 4, 1]) == [(2, 4), (5, 6)]
    assert MARKED.words([5, 5, 2, 4]) == ["bb⁇", "a"]


def test_every_piece_is_a_word_without_a_mark() -> None:
    tokens = AcousticTokens.from_pieces(["<blk>", "x", "y"], 0, word_start="")
    assert tokens.words([1, 0, 2, 1]) == ["x", "y", "x"]


def test_only_marks_begin_words_where_that_is_asked_for() -> None:
    tokens = AcousticTokens.from_pieces(["", "|", "你", "好", "a"], 0, delimiter="|", unspaced=False)
    assert tokens.words([2, 3, 1, 4, 2]) == ["你好", "a你"]
    assert tokens.encode("你好 a你") == [2, 3, 1, 4, 2]


@given(st.lists(st.integers(0, MARKED.size - 1), max_size=12), st.sampled_from([MARKED, LETTERS]))
def test_spans_are_ordered_disjoint_and_spell_the_words(ids: list[int], tokens: AcousticTokens) -> None:
    ids = [index % tokens.size for index in ids]
    spans = tokens.word_spans(ids)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:]))
    assert tokens.words(ids) == [tokens.decode(ids[start:stop]) for start, stop in spans]
    assert tokens.decode(ids).split() == tokens.words(ids)


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=5), st.sampled_from([MARKED, LETTERS]))
def test_decode_inverts_encode(words: list[str], tokens: AcousticTokens) -> None:
    assert tokens.words(tokens.encode(" ".join(words))) == words


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"SentencePiece model not found: .*bpe\.model"):
        AcousticTokens.load(tmp_path)
    (tmp_path / "bpe.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="must be a SentencePiece model"):
        AcousticTokens.load(tmp_path)
    with pytest.raises(ValueError, match=r"blank_id must be in 0\.\.1, but is 5"):
        AcousticTokens.from_pieces(["<blk>", "a"], 5)
    with pytest.raises(ValueError, match="delimiter must be one of the pieces, but is '|'"):
        AcousticTokens.from_pieces(["<blk>", "a"], 0, delimiter="|")
    with pytest.raises(ValueError, match=r"pieces must differ from one another \(duplicates\), but is 1"):
        AcousticTokens.from_pieces(["<blk>", "a", "a"], 0)
    for bad, rule in ((5, "be text"), ("a\ud800", "be text"), ("a b", "hold no space")):
        with pytest.raises(ValueError, match=rf"pieces\[2\] must {rule}"):
            AcousticTokens.from_pieces(["<blk>", "a", bad], 0)
    with pytest.raises(ValueError, match=r"ids\[1\] is 99"):
        MARKED.decode([4, 99])
    with pytest.raises(ValueError, match="no unknown piece"):
        AcousticTokens.from_pieces(["<blk>", "▁a"], 0).encode("b")
