"""Re-tokenization without spaces: Chinese text, tokens that span characters, characters of single bytes.
Knows: tokenizers trained here on text of our own, tiny random language models. Must not know: trained models.
"""
from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.fusion import DelayedFusion, EveryFrame, FixedInterval, ShortestHypothesis
from icefall_fusion.fusion.base import tokenizer_for
from icefall_fusion.fusion.boundaries import Crossing, HoldingTokenizer
from icefall_fusion.fusion.rescoring import rescore_with_lm
from icefall_fusion.fusion.retokenize import WordTokenizer
from icefall_fusion.fusion.streaming import DelayedStream
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.scripts import join_words, split_units
from icefall_fusion.text.styles import adapt
from icefall_fusion.text.tokens import AcousticTokens
from tests.fusion.test_fusion import text_log_prob, tiny_model

transformers = pytest.importorskip("transformers")
from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.lm.loading import Vocabulary  # noqa: E402

CHINESE = [
    "今天天气很好我们去公园看花", "明天天气不好我们在家看书", "他今天没有去学校因为天气很冷",
    "世界上有很多好看的书",
    "我们都在学校学习写字", "公园里的花很好看", "你好世界", "你们好吗我们很好", "天上有云地上有花",
    "他们用ok这个字", "你说ok我说好", "ok no ok",
]
#: Characters of the text, Latin letters, and some that no token was learned for: their bytes are tokens.
UNITS = list("今天气很好我们去公园看花世界书学校你地上云龘𠮷") + ["ok", "no"]
TEXTS = st.lists(st.sampled_from(UNITS), max_size=12)
PIECES = ["<blk>", "<sos/eos>", "<unk>", *"今天气很好我们世界你龘", "天气", "▁ok", "k"]
RULES = ["words", "tokens"] + ["jieba"] * bool(find_spec("jieba"))


def byte_level(size: int = 256 + 2 + 60):
    """Byte-level BPE that does not know characters: tokens span them, and may begin or end inside of one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CHINESE * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def with_byte_fallback():
    """BPE over characters with "▁" for spaces, as of Llama 1: characters it lacks are spelled by bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    special = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CHINESE * 9, trainer)
    state = tokenizer.to_str().replace('"byte_fallback":false', '"byte_fallback":true')
    tokenizer = Tokenizer.from_str(state)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


FAMILIES = {"byte-level": byte_level, "byte-fallback": with_byte_fallback}


@pytest.fixture(scope="module", params=list(FAMILIES))
def tokenizer(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def llm(tokenizer) -> CausalLm:
    vocabulary = Vocabulary(tokenizer, None, 0, 1)
    return CausalLm(tiny_model(len(tokenizer), 3), vocabulary, "chinese", self_check=False)


@pytest.fixture(scope="module")
def tokens() -> AcousticTokens:
    return AcousticTokens.from_pieces(PIECES, 0)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the language model's tokenizer cannot be used word")
        yield


def emissions(batch: int = 3, frames: int = 26, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(batch, frames, len(PIECES), generator=generator)
    logits[..., 0] += 1.0
    logits[..., 1:3] -= 9.0
    lens = torch.randint(frames // 2, frames + 1, (batch,), generator=generator)
    lens[0] = frames
    return logits.log_softmax(-1), lens


def whole_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_tokenizers_are_what_the_tests_need(tokenizer) -> None:
    texts = [tokenizer.convert_ids_to_tokens(whole_ids(tokenizer, text)) for text in CHINESE]
    assert any(len(tokens) < len(text) for tokens, text in zip(texts, CHINESE))  # tokens span characters
    assert len(whole_ids(tokenizer, "龘")) == 3  # and this one is spelled by bytes
    before = [whole_ids(tokenizer, CHINESE[0][:count]) for count in range(len(CHINESE[0]))]
    # tokens change as text grows
    assert any(after[: len(one)] != one for one, after in zip(before, before[1:]))


@settings(max_examples=60, deadline=None)
@given(words=TEXTS)
def test_ids_are_those_of_the_whole_text(tokenizer, words) -> None:
    words = split_units(join_words(words))
    own = WordTokenizer(tokenizer)
    for count in range(len(words) + 1):
        text = join_words(words[:count])
        assert own.encode(words[:count]) == whole_ids(tokenizer, text) == own.encode_whole(words[:count])
    assert not own.word_by_word or all(word.isascii() for word in words)


@settings(max_examples=60, deadline=None)
@given(words=TEXTS, more=TEXTS)
def test_what_is_shown_never_changes_whatever_follows(tokenizer, words, more) -> None:
    holding = HoldingTokenizer(tokenizer, "as-is", "tokens")
    words, more = split_units(join_words(words)), split_units(join_words(more))
    ids, shown = holding.encode_closed(words)
    assert 0 <= shown <= len(words)
    longer = whole_ids(tokenizer, adapt([*words, *more], "as-is"))
    assert longer[: len(ids)] == ids
    assert tokenizer.decode(ids).startswith(adapt(words[:shown], "as-is"))


def test_some_text_is_shown_and_some_is_held_back() -> None:
    holding = HoldingTokenizer(byte_level(), "as-is", "tokens")
    shown = [holding.encode_closed(list(text))[1] / len(text) for text in CHINESE[:8]]
    assert 0 < sum(shown) / len(shown) < 1


def test_places_that_no_entry_crosses() -> None:
    crossing = Crossing(["▁", "a", "b", "c", "ab", "bcd", "xyz"])
    assert crossing.safe_part(b"") == 0
    assert crossing.safe_part(b"a") == 0  # it may become "ab"
    assert crossing.safe_part(b"ab") == 0  # "bcd" may follow, and "ab" and "bcd" cross all places
    assert crossing.safe_part(b"abb") == 2 and crossing.safe_part(b"ac") == 2
    assert crossing.safe_part(b"abcd") == 4 and crossing.safe_part(b"cxy") == 1
    assert Crossing(["▁a", "<0xE4>"]).spelling("<0xE4>") == b"\xe4"
    assert Crossing(["Ġa"]).spelling("Ġa") == b" a"


@pytest.mark.skipif(find_spec("jieba") is None, reason="jieba is not installed")
def test_segments_of_jieba(tokenizer) -> None:
    holding = HoldingTokenizer(tokenizer, "as-is", "jieba")
    words = list("今天天气很好")
    ids, shown = holding.encode_closed(words)
    assert 0 < shown < len(words) and ids == whole_ids(tokenizer, join_words(words[:shown]))
    assert holding.encode_closed([]) == ([], 0)


def test_unknown_boundaries_are_refused(llm, monkeypatch) -> None:
    with pytest.raises(ValueError, match="boundaries must be one of .*'tokens'.*'token'"):
        DelayedFusion(llm, 0.5, boundaries="token")
    fusion = DelayedFusion(llm, 0.5, boundaries="tokens")
    with pytest.raises(ValueError, match="DelayedFusion.boundaries must be words in a stream"):
        DelayedStream(fusion, llm, [], 10)
    monkeypatch.setitem(__import__("sys").modules, "jieba", None)
    with pytest.raises(ValueError, match="need the package jieba"):
        HoldingTokenizer(llm.tokenizer, "as-is", "jieba")


# --- oracles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("trigger", [EveryFrame(), FixedInterval(4), ShortestHypothesis()], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_a_plain_forward_over_the_whole_text(llm, tokens, rule, trigger, late) -> None:
    log_probs, lens = emissions()
    fusion = DelayedFusion(llm, 0.6, 0.8, trigger, boundaries=rule, late=late)
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=5), tokens, [fusion])
    hypotheses = [h for nbest in nbests for h in nbest]
    assert len(hypotheses) > 10 and any("龘" in h.text for h in hypotheses)
    for hypothesis in hypotheses:
        text = join_words(hypothesis.words())
        assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(llm, text), abs=1e-4)
        assert hypothesis.scores["words"] == len(hypothesis.words())
        expected = sum(w * hypothesis.scores[s] for s, w in {"ctc": 1, "llm": 0.6, "words": 0.8}.items())
        assert hypothesis.total == pytest.approx(expected, abs=1e-4)
    rescored = rescore_with_lm(nbests, llm, "again")
    for one, other in zip(hypotheses, (h for nbest in rescored for h in nbest)):
        assert other.scores["again"] == pytest.approx(one.scores["llm"], abs=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_is_its_utterances_one_by_one_and_weight_0_changes_nothing(llm, tokens, rule) -> None:
    log_probs, lens = emissions(seed=2)
    options = PrefixSearchOptions(beam=5)
    fusion = DelayedFusion(llm, 0.6, 0.8, FixedInterval(3), boundaries=rule)
    batch = ctc_prefix_search(log_probs, lens, options, tokens, [fusion])
    for row in range(len(lens)):
        alone = ctc_prefix_search(log_probs[row : row + 1], lens[row : row + 1], options, tokens, [fusion])[0]
        assert [h.tokens for h in alone] == [h.tokens for h in batch[row]]
    nothing = DelayedFusion(llm, 0.0, 0.0, FixedInterval(3), boundaries=rule)
    plain = ctc_prefix_search(log_probs, lens, options, tokens)
    weightless = ctc_prefix_search(log_probs, lens, options, tokens, [nothing])
    totals = [[[(h.tokens, h.total) for h in nbest] for nbest in found] for found in (plain, weightless)]
    assert totals[0] == totals[1]


def test_rules_agree_where_nothing_is_pruned(llm, tokens) -> None:
    log_probs, lens = emissions(batch=1, frames=3, seed=4)
    found = []
    for rule in RULES:
        fusion = DelayedFusion(llm, 0.6, 0.8, EveryFrame(), boundaries=rule)
        options = PrefixSearchOptions(beam=4000)
        found.append(ctc_prefix_search(log_probs, lens, options, tokens, [fusion])[0])
    for other in found[1:]:
        assert [h.tokens for h in other[:50]] == [h.tokens for h in found[0][:50]]


def test_after_a_prompt_and_of_both_scripts(llm) -> None:
    own = tokenizer_for(llm, "as-is")
    ids = own.encode(["世", "界", "ok"], prompted=True)
    assert llm.tokenizer.decode(ids) == "世界ok"
    assert llm.tokenizer.decode(own.encode(["ok", "no", "世"], prompted=True)).strip() == "ok no世"
    assert WordTokenizer(llm.tokenizer).encode(["ok", "no"]) == whole_ids(llm.tokenizer, "ok no")


def test_words_of_scripts_without_spaces_are_told_once(tokenizer) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        own = WordTokenizer(tokenizer)
        own.encode(["世", "界"])
        own.encode(["你", "好"])
    assert sum("no spaces around" in str(warning.message) for warning in told) == 1


def test_marks_with_an_underline_leave_a_vocabulary_byte_level() -> None:
    entries = ["Ġthe", "ä", "½", "ł", "<｜begin▁of▁sentence｜>"]
    crossing = Crossing(entries)
    assert crossing.spelling("Ġthe") == b" the" and crossing.spelling("ä½ł") == bytes([0xE4, 0xBD, 0xA0])
    assert Crossing(["▁the", "<0x0A>"]).spelling("▁the") == b" the"
