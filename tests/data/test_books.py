"""From books to utterances, selections, vocabularies and token streams, on tiny books.
Knows: the text jobs of icefall_fusion.data. Must not know: audio, models.
"""
from __future__ import annotations

import itertools
import json
import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icefall_fusion.__main__ import main
from icefall_fusion.data import books, lm_text, paragraphs, selection, tokenizers
from icefall_fusion.text.normalizer import normalize

WORDS = "the old house by the river was dark and nobody had seen its master since the winter came".split()


def write_books(folder: Path, count: int, paragraphs: int = 30) -> None:
    folder.mkdir()
    for number in range(count):
        generator = random.Random(number)
        text = ["CHAPTER I", "", "The Old House", ""]
        for _ in range(paragraphs):
            for _ in range(3):
                sentence = " ".join(generator.choices(WORDS, k=generator.randint(3, 60)))
                text.append(sentence.capitalize() + ".")
            text = text[:-3] + [" ".join(text[-3:]), ""]
        (folder / f"book-{number:02d}.txt").write_text("\n".join(text), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("minibooks")
    write_books(root / "books", 5)
    options = books.PrepareTextOptions(str(root / "books"), str(root), test_books=1, dev_books=1, workers=2)
    assert books.run(options) == 0
    hours = {"train_hours": 0.02, "dev_hours": 0.004, "test_hours": 0.004}
    assert selection.run(selection.SelectOptions(str(root), **hours)) == 0
    sizes = {"pieces": 32, "llm_tokens": 300}
    assert tokenizers.run(tokenizers.TokenizerOptions(str(root), **sizes)) == 0
    assert lm_text.run(lm_text.LmTextOptions(str(root), pieces=32, workers=1)) == 0
    return root


def test_sentences_end_before_capitals_but_not_after_titles_and_initials() -> None:
    paragraph = 'Mr. Grey met J. Brown. "Ha! indeed!" said he. "Go!" No. 5 was shut? Yes.'
    assert books.sentences(paragraph) == [
        "Mr. Grey met J. Brown.", '"Ha! indeed!" said he.', '"Go!"', "No. 5 was shut?", "Yes.",
    ]


def test_long_sentences_are_split_at_their_best_joint() -> None:
    clause = "he walked to the river where the boats were lying"
    sentence = f"{clause}, {clause}; {clause}, {clause}"
    assert books.split_sentence(sentence, 25, 110) == [f"{clause}, {clause};", f"{clause}, {clause}"]
    assert books.split_sentence("x" * 300, 25, 230) == []


def test_headings_and_foreign_text_are_left_out() -> None:
    options = books.PrepareTextOptions("unused")
    text = "CHAPTER THE FIRST\n\nThe Old House by the River\n\n* * * *\n\n"
    latin = "Arma virumque cano Troiae qui primus ab oris."
    assert books.book_utterances(text + latin + "\n", "b", options) == ([], [latin])


@given(st.lists(st.text(alphabet='abI .,;:!?"\'—', max_size=300), max_size=3), st.integers(1, 30))
def test_utterances_keep_to_their_bounds(paragraphs: list[str], minimum: int) -> None:
    for paragraph in paragraphs:
        for utterance in books.paragraph_utterances(paragraph, minimum, minimum * 6):
            assert minimum <= len(utterance) <= minimum * 6
            assert utterance == " ".join(utterance.split())


def random_paragraphs(seed: int, least: int) -> list[str]:
    generator = random.Random(seed)
    words = [*WORDS, "spring-cart", "to-day", "half-forgotten", "stopped--then", "“Indeed,”"]
    lines = ["CHAPTER I", "The Old House"]
    for _ in range(generator.randint(10, 40)):
        sentences = [generator.choices(words, k=generator.randint(least, 40)) for _ in range(3)]
        lines.append(" ".join(" ".join(sentence).capitalize() + "." for sentence in sentences))
        lines.append(" ".join(generator.choices(words, k=8)) + "?")
    return lines


@given(st.integers(0, 10**6), st.integers(3, 20), st.integers(60, 80))
def test_hard_wrapped_books_give_the_same_utterances(seed: int, least: int, width: int) -> None:
    lines = random_paragraphs(seed, least)
    options = books.PrepareTextOptions("unused")
    expected, _ = books.book_utterances("\n".join(lines), "b", options)
    assert len(expected) > 10 and paragraphs.paragraphs("\n".join(lines)) == lines
    wrapped = "\n\n".join(textwrap.fill(line, width) for line in lines)
    assert paragraphs.is_hard_wrapped(wrapped.splitlines())
    assert books.book_utterances(wrapped, "b", options)[0] == expected
    assert books.book_utterances(wrapped.replace("\n", "\r\n"), "b", options)[0] == expected


def test_a_sentence_a_line_is_not_hard_wrapped() -> None:
    stories = Path(__file__).resolve().parents[2] / "tools" / "demo" / "stories.txt"
    assert not paragraphs.is_hard_wrapped(stories.read_text(encoding="utf-8").splitlines())
    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(9, 16))) for _ in range(200)]
    assert not paragraphs.is_hard_wrapped([line + "." for line in lines])
    assert not paragraphs.is_hard_wrapped(lines)
    assert not paragraphs.is_hard_wrapped([])


def test_hyphens_at_line_ends_are_joined_where_the_book_tells_how() -> None:
    words = frozenset({"example", "today", "to-day"})
    join = lambda text: paragraphs._join(text.split("/"), words)  # noqa: E731
    assert join("an exam-/ple of that") == "an example of that"
    assert join("even to-/day, they say") == "even to-day, they say"
    assert join("in a spring-/cart") == "in a spring-cart"
    assert join("two-/and threefold, in 1914-/18--/or so") == "two- and threefold, in 1914- 18-- or so"


def test_verse_in_a_hard_wrapped_book_keeps_its_lines() -> None:
    prose = [textwrap.fill(line, 72) for line in random_paragraphs(1, 20)]
    verse = "The river ran so deep and wide,\nAnd nobody had seen\nThe house upon the other side."
    found = paragraphs.paragraphs("\n\n".join([*prose, verse, *prose]))
    assert set(verse.splitlines()) < set(found) and verse.replace("\n", " ") not in found


START, END = "*** START OF THE PROJECT GUTENBERG EBOOK", "*** END OF THE PROJECT GUTENBERG EBOOK"


@pytest.mark.parametrize(
    ("head", "foot"),
    [
        (f"\ufeffThe Project Gutenberg eBook of It\n\n{START} IT ***\n", f"{END} IT ***\nlicense\n"),
        (f"{START}, WITH\nA LONG TITLE ***\n", f"End of the Project Gutenberg EBook of It\n\n{END} ***\n"),
        (f"{START} IT ***\n\nProduced by Jane Doe and\nvolunteers.\n\n", f"{END} IT ***\n*** END OF IT ***"),
        ("legalese\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n",
         "End of Project Gutenberg's It"),
    ],
)
def test_headers_and_footers_of_gutenberg_are_left_out(head: str, foot: str) -> None:
    body = "It was\n\n*** END OF PART ONE ***\n\nthe end of it all."
    assert paragraphs.gutenberg_body(f"{head}\n{body}\n\n\n{foot}").strip() == body
    assert paragraphs.gutenberg_body(body) == body


def test_splits_are_whole_books_by_alphabet(data: Path) -> None:
    splits = {"train": ["book-00", "book-01", "book-02"], "dev": ["book-03"], "test": ["book-04"]}
    for split, expected in splits.items():
        utterances = list(books.read_jsonl(data / "text" / f"{split}.jsonl"))
        assert sorted({utterance["book"] for utterance in utterances}) == expected
        for book in expected:
            of_book = [utterance for utterance in utterances if utterance["book"] == book]
            assert [utterance["index"] for utterance in of_book] == list(range(len(of_book)))
        for utterance in utterances:
            assert utterance["text"] == normalize(utterance["cased"])
            assert utterance["id"] == f"{utterance['book']}-{utterance['index']:06d}"


def test_text_does_not_depend_on_workers(data: Path, tmp_path: Path) -> None:
    one_each = {"test_books": 1, "dev_books": 1}
    books.run(books.PrepareTextOptions(str(data / "books"), str(tmp_path), workers=1, **one_each))
    for split in books.SPLITS:
        name = f"text/{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()


def test_selected_sets_are_disjoint_and_spread_over_books(data: Path) -> None:
    names = ("train", "dev", "test-clean", "test-other")
    files = [data / "text" / f"selected_{name}.jsonl" for name in names]
    sets = {name: list(books.read_jsonl(path)) for name, path in zip(names, files)}
    texts = [utterance["text"] for utterances in sets.values() for utterance in utterances]
    assert len(texts) == len(set(texts))
    assert {utterance["book"] for utterance in sets["train"]} == {"book-00", "book-01", "book-02"}
    assert {utterance["book"] for utterance in sets["test-clean"]} == {"book-04"}
    for name, hours in (("train", 0.02), ("test-clean", 0.004), ("test-other", 0.004)):
        assert sum(len(utterance["text"]) for utterance in sets[name]) >= hours * 3600 * 14.5


def test_too_many_hours_are_refused_with_what_there_is(data: Path) -> None:
    with pytest.raises(ValueError, match=r"hours must not exceed .* about 0\.\d+ h, but is \[100"):
        selection.run(selection.SelectOptions(str(data), test_hours=100.0))


def test_speakable() -> None:
    assert selection.is_speakable('"I saw Mr. Grey," said he; it was late (very late).')
    for cased in ("in 1830", "Charles II. was", "J. Grey", "Capt. Grey", "a café", "Queen ANNE"):
        assert not selection.is_speakable(cased)


def test_llm_tokenizer_spells_words_one_by_one_and_adds_nothing(data: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(data / "llm_tokenizer"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    text = "The old house, don't Zoë"
    whole = tokenizer(text).input_ids
    first, *others = text.split(" ")
    by_word = [tokenizer(first).input_ids] + [tokenizer(" " + word).input_ids for word in others]
    assert whole == [index for ids in by_word for index in ids]
    assert tokenizer.decode(whole) == text


def test_token_streams_hold_the_utterances(data: Path) -> None:
    from tokenizers import Tokenizer

    llm = Tokenizer.from_file(str(data / "llm_tokenizer" / "tokenizer.json"))
    spoken = sorted(utterance["text"] for utterance in books.read_jsonl(data / "text" / "dev.jsonl"))
    documents = read_documents(data / "lm" / "llm" / "dev.npy", 0, 1)
    assert sorted(" ".join(llm.decode(ids) for ids in documents).split()) == sorted(" ".join(spoken).split())
    counts = json.loads((data / "lm" / "llm" / "dev.json").read_text())
    assert counts["documents"] == len(documents)
    assert counts["words"] == len(" ".join(spoken).split())
    pieces = read_documents(data / "lm" / "matched_llm" / "dev.npy", 1, 1)
    assert len(pieces) == len(documents)
    selected = list(books.read_jsonl(data / "text" / "selected_train.jsonl"))
    assert len(read_documents(data / "lm" / "nlm" / "train.npy", 1, 1)) == len(selected)


def test_the_llm_reads_all_of_both_forms(data: Path) -> None:
    for name, split in (("train", "train"), ("dev_cased", "dev")):
        utterances = list(books.read_jsonl(data / "text" / f"{split}.jsonl"))
        words = sum(len(utterance["cased"].split()) for utterance in utterances)
        if split == "train":
            words += sum(len(utterance["text"].split()) for utterance in utterances)
        assert json.loads((data / "lm" / "llm" / f"{name}.json").read_text())["words"] == words


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cased_share_is_what_goes_in_as_printed(share: float) -> None:
    utterances = [{"book": "b", "text": f"word {n}", "cased": f"Word {n}."} for n in range(3000)]
    normalized, cased = lm_text.book_documents(utterances, "train", lm_text.LmTextOptions(cased_share=share))
    assert " ".join(normalized) == " ".join(utterance["text"] for utterance in utterances)
    assert " ".join(cased).count("Word") == pytest.approx(3000 * share, abs=200 if 0 < share < 1 else 0)


def read_documents(path: Path, bos: int, eos: int) -> list[list[int]]:
    documents: list[list[int]] = []
    tokens = iter(np.load(path).tolist())
    for token in tokens:
        assert token == bos
        documents.append(list(itertools.takewhile(lambda token: token != eos, tokens)))
    return documents


@given(st.integers(0, 50), st.integers(2, 9), st.integers(0, 5))
def test_groups_cover_all_utterances_once(count: int, max_group: int, seed: int) -> None:
    groups = lm_text.document_groups(count, max_group, random.Random(seed))
    assert [index for start, stop in groups for index in range(start, stop)] == list(range(count))
    assert all(1 <= stop - start <= max_group for start, stop in groups)


def test_broken_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "text" / "train.jsonl"
    path.parent.mkdir()
    good = '{"text": "a", "cased": "A."}'
    missing = ('{"text": "a"}', "have the key 'cased', but is .'text'.")
    for line, rule in (("[1]", "be a JSON object"), missing, ("{", "is not JSON")):
        path.write_text(f"{good}\n{line}\n")
        with pytest.raises(ValueError, match=rf"train.jsonl, line 2 (must )?{rule}"):
            tokenizers.run(tokenizers.TokenizerOptions(str(tmp_path)))


def test_missing_inputs_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder of books not found"):
        books.run(books.PrepareTextOptions(str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match="run prepare-text first"):
        tokenizers.run(tokenizers.TokenizerOptions(str(tmp_path)))
    with pytest.raises(ValueError, match=r"hold more than 12 \+ 8 books"):
        books.split_books(tmp_path, 12, 8)
    with pytest.raises(ValueError, match="cased_share must be between 0 and 1, but is 1.5"):
        lm_text.LmTextOptions(cased_share=1.5)


def test_samples_are_those_of_the_lists_without_holding_them(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [{"text": f"t {i}", "cased": f"C {i}"} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few, all_cased, other = tokenizers.sample_fields(path, [("text", 7, 3), ("cased", 99, 3), ("text", 7, 4)])
    assert few == random.Random(3).sample([row["text"] for row in rows], 7) != other
    assert all_cased == [row["cased"] for row in rows]


def test_a_recipe_with_an_llm_of_its_own_needs_neither_tokens_nor_streams_of_one(
    data: Path, tmp_path: Path
) -> None:
    for name in ("train", "selected_train", "selected_dev"):
        target = tmp_path / "text" / f"{name}.jsonl"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((data / "text" / f"{name}.jsonl").read_bytes())
    assert tokenizers.run(tokenizers.TokenizerOptions(str(tmp_path), pieces=32, llm_tokens=0)) == 0
    assert lm_text.run(lm_text.LmTextOptions(str(tmp_path), pieces=32, streams=("nlm",), workers=1)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lang_bpe_32", "lm", "text"]
    assert [path.name for path in (tmp_path / "lm").iterdir()] == ["nlm"]
    for split in ("train", "dev"):
        same = [(root / "lm" / "nlm" / f"{split}.npy").read_bytes() for root in (data, tmp_path)]
        assert same[0] == same[1]
    with pytest.raises(ValueError, match="LmTextOptions.streams must be one of"):
        lm_text.LmTextOptions(streams=("lm",))


def test_pieces_can_be_taken_from_another_model(tmp_path, capsys) -> None:
    one, other = tmp_path / "one" / "text", tmp_path / "other" / "text"
    texts = {one: "the quick brown fox jumps over lazy dogs and packs my box", other: "seven ships sail"}
    for folder, words in texts.items():
        folder.mkdir(parents=True)
        rows = [{"text": " ".join(words.split()[i % 5 :]), "cased": words} for i in range(40)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["train-tokenizers", "--pieces", "32", "--llm_tokens", "0", "--data_dir"]
    assert main([*arguments, str(one.parent)]) == 0
    given = one.parent / "lang_bpe_32"
    assert main([*arguments, str(other.parent), "--pieces_from", str(given)]) == 0
    for name in ("bpe.model", "tokens.txt"):
        assert (other.parent / "lang_bpe_32" / name).read_bytes() == (given / name).read_bytes()
    arguments[2] = "40"
    assert main([*arguments, str(other.parent), "--pieces_from", str(given / "bpe.model")]) == 2
    assert "TokenizerOptions.pieces must be 32, as" in capsys.readouterr().err
