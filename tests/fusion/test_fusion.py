"""Shallow and delayed fusion against plain forwards, against a slow twin, and against themselves in batches.
Knows: tiny random language models, random log-probs. Must not know: trained models.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.fusion import (
    AtEnd,
    DelayedFusion,
    EveryFrame,
    FixedInterval,
    ShallowFusion,
    ShortestHypothesis,
)
from icefall_fusion.fusion.rescoring import rescore_with_attention, rescore_with_lm
from icefall_fusion.nbest import Hypothesis, NBest
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.text.tokens import AcousticTokens
from tests.reference.fused_search import SlowFusion, fused_search
from tests.search_tools import assert_near

transformers = pytest.importorskip("transformers")
from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.lm.loading import Vocabulary  # noqa: E402

PIECES = ["<blk>", "<sos/eos>", "<unk>", "▁a", "▁the", "▁se", "a", "d", "▁", "▁b", "ing", "▁i", "t"]
TRIGGERS = [
    AtEnd(),
    EveryFrame(),
    FixedInterval(3),
    FixedInterval(7),
    ShortestHypothesis(),
    ShortestHypothesis("pieces"),
    ShortestHypothesis(every=4),
]
SLOW_TRIGGERS = {
    "AtEnd": lambda t: ("end",),
    "EveryFrame": lambda t: ("interval", 1),
    "FixedInterval": lambda t: ("interval", t.frames),
    "ShortestHypothesis": lambda t: (t.unit, t.every),
}


def names(trigger) -> str:
    settings = [str(getattr(trigger, name)) for name in ("frames", "unit", "every") if hasattr(trigger, name)]
    return "-".join([type(trigger).__name__, *settings])


@pytest.fixture(scope="module")
def tokens() -> AcousticTokens:
    return AcousticTokens.from_pieces(PIECES, 0)


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the sea is a sea and the boat is it"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )


def tiny_model(vocab_size: int, seed: int, **options) -> torch.nn.Module:
    """Return a random Llama, or a Mistral where ``options`` has a sliding window."""
    torch.manual_seed(seed)
    kind = "Mistral" if "sliding_window" in options else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.35,
        bos_token_id=0,
        eos_token_id=1,
        **options,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def llm() -> CausalLm:
    tokenizer = byte_tokenizer()
    return CausalLm(
        tiny_model(len(tokenizer), 1), Vocabulary(tokenizer, None, 0, 1), "tiny-llm", self_check=False
    )


@pytest.fixture(scope="module")
def nlm(tokens) -> CausalLm:
    return CausalLm(
        tiny_model(tokens.size, 2), Vocabulary(None, tokens, 1, 1), "tiny-nlm", self_check=False
    )


def emissions(
    batch: int = 3, frames: int = 24, seed: int = 0, peak: float = 2.5
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = peak * torch.randn(batch, frames, len(PIECES), generator=generator)
    logits[..., 0] += 1.0
    logits[..., 1:3] -= 9.0  # marks and unknown pieces are rare
    lens = torch.randint(frames // 2, frames + 1, (batch,), generator=generator)
    lens[0] = frames
    return logits.log_softmax(-1), lens


@torch.no_grad()
def plain_log_prob(lm: CausalLm, ids: list[int], eos: bool = True) -> float:
    """One plain forward over bos, ids (and eos), from scratch."""
    path = torch.tensor([[lm.bos_id, *ids, *([lm.eos_id] if eos else [])]])
    log_probs = lm.model(path, use_cache=False).logits[0].double().log_softmax(-1)
    return float(log_probs[:-1].gather(1, path[0, 1:, None]).sum())


def text_log_prob(lm: CausalLm, text: str, eos: bool = True) -> float:
    return plain_log_prob(lm, lm.tokenizer.encode(text, add_special_tokens=False), eos)


def assert_same(one: list[NBest], other: list[NBest], tolerance: float = 2e-4) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert [h.tokens for h in a] == [h.tokens for h in b]
        for x, y in zip(a, b):
            for source in x.scores:
                assert x.scores[source] == pytest.approx(y.scores[source], abs=tolerance), source


# --- oracles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
def test_scores_are_those_of_a_plain_forward_over_the_whole_text(llm, tokens, trigger):
    log_probs, lens = emissions()
    for eos in (True, False):
        fusion = DelayedFusion(llm, 0.6, 0.8, trigger, eos=eos)
        nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=5), tokens, [fusion])
        assert sum(len(nbest) for nbest in nbests) > 10
        for hypothesis in (h for nbest in nbests for h in nbest):
            assert hypothesis.scores["llm"] == pytest.approx(
                text_log_prob(llm, hypothesis.text, eos), abs=1e-4
            )
            assert hypothesis.scores["words"] == len(hypothesis.words())
            expected = sum(
                w * hypothesis.scores[s] for s, w in {"ctc": 1, "llm": 0.6, "words": 0.8}.items()
            )
            assert hypothesis.total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{"score_beam": 1.0}, {"recover_mass": True}, {"blank_skip": 0.6}], ids=str
)
def test_scores_are_exact_whatever_the_search_leaves_out(llm, nlm, tokens, options):
    log_probs, lens = emissions(seed=8)
    fusions = [ShallowFusion(nlm, 0.3, 0.2), DelayedFusion(llm, 0.4, 0.5, FixedInterval(3))]
    options = PrefixSearchOptions(beam=5, **options)
    nbests = ctc_prefix_search(log_probs, lens, options, tokens, fusions)
    assert options.score_beam is None or any(len(nbest) < 5 for nbest in nbests)  # dead slots
    for hypothesis in (h for nbest in nbests for h in nbest):
        assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(llm, hypothesis.text), abs=1e-4)
        assert hypothesis.scores["nlm"] == pytest.approx(plain_log_prob(nlm, hypothesis.tokens), abs=1e-4)


@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
def test_a_sliding_window_slides_along_every_hypothesis(tokens, trigger, monkeypatch):
    from icefall_fusion.fusion import delayed

    monkeypatch.setattr(delayed, "_KEEP_AFTER", -1)  # clean up after every event: slots are reused
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer), 4, sliding_window=4, num_key_value_heads=1)
    lm = CausalLm(model, Vocabulary(tokenizer, None, 0, 1), "window", self_check=False)
    assert lm.window == 4
    log_probs, lens = emissions(batch=2, seed=9)
    fusion = DelayedFusion(lm, 0.6, 0.8, trigger)
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    hypotheses = [h for nbest in nbests for h in nbest]
    assert any(len(lm.encode(h.text)) > 8 for h in hypotheses)
    for hypothesis in hypotheses:
        assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(lm, hypothesis.text), abs=1e-4)


@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
@pytest.mark.parametrize("seed", range(3))
def test_delayed_fusion_is_its_slow_twin(llm, tokens, trigger, seed):
    log_probs, lens = emissions(seed=seed)
    fusion = DelayedFusion(llm, 0.5, 0.7, trigger)
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    slow = slow_delayed(llm, 0.5, 0.7, SLOW_TRIGGERS[type(trigger).__name__](trigger))
    compare_with_twin(nbests, log_probs, lens, 4, tokens, [slow])


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("trigger", TRIGGERS[1:], ids=names)
@pytest.mark.parametrize("late", [1, 4, 50])
def test_asynchronous_fusion_is_its_slow_twin(llm, tokens, trigger, late, engine):
    log_probs, lens = emissions(seed=4)  # three utterances: what others are late with must not matter
    fusion = DelayedFusion(llm, 0.5, 0.7, trigger, late=late)
    options = PrefixSearchOptions(beam=4, engine=engine)
    nbests = ctc_prefix_search(log_probs, lens, options, tokens, [fusion])
    slow = slow_delayed(llm, 0.5, 0.7, SLOW_TRIGGERS[type(trigger).__name__](trigger))
    slow.late = late
    compare_with_twin(nbests, log_probs, lens, 4, tokens, [slow])


@pytest.mark.parametrize("trigger", [ShortestHypothesis(), FixedInterval(2)], ids=names)
def test_cleaning_the_tree_while_scores_are_on_their_way_changes_nothing(llm, tokens, trigger, monkeypatch):
    from icefall_fusion.fusion import delayed

    log_probs, lens = emissions(batch=4, frames=40, seed=5)
    options = PrefixSearchOptions(beam=4)

    def run():
        fusion = DelayedFusion(llm, 0.5, 0.7, trigger, late=3)
        return ctc_prefix_search(log_probs, lens, options, tokens, [fusion])

    usual = run()
    monkeypatch.setattr(delayed, "_KEEP_AFTER", -1)
    assert_same(run(), usual)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_asynchronous_fusion_on_a_gpu_is_that_on_a_cpu(tokens):
    tokenizer = byte_tokenizer()
    log_probs, lens = emissions(batch=6, frames=60, seed=6)
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model(len(tokenizer), 1).to(device)
        lm = CausalLm(model, Vocabulary(tokenizer, None, 0, 1), "tiny-llm", self_check=False)
        fusion = DelayedFusion(lm, 0.5, 0.7, FixedInterval(4), late=3)
        options = PrefixSearchOptions(beam=4, engine="torch")
        found.append(ctc_prefix_search(log_probs.to(device), lens, options, tokens, [fusion]))
    for one, other in zip(*found):
        assert_near(*([(tuple(h.tokens), h.total) for h in nbest] for nbest in (other, one)), 1e-2)


@pytest.mark.parametrize("bonus", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_shallow_fusion_is_its_slow_twin(nlm, tokens, bonus, seed):
    log_probs, lens = emissions(seed=seed)
    fusion = ShallowFusion(nlm, 0.5, bonus)
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    compare_with_twin(nbests, log_probs, lens, 4, tokens, [slow_shallow(nlm, 0.5, bonus)])
    for hypothesis in (h for nbest in nbests for h in nbest):
        assert hypothesis.scores["nlm"] == pytest.approx(plain_log_prob(nlm, hypothesis.tokens), abs=1e-4)


@pytest.mark.parametrize("trigger", [ShortestHypothesis(), FixedInterval(5)], ids=names)
@pytest.mark.parametrize("seed", range(2))
def test_shallow_and_delayed_fusion_compose(llm, nlm, tokens, trigger, seed):
    log_probs, lens = emissions(seed=seed)
    fusions = [ShallowFusion(nlm, 0.4), DelayedFusion(llm, 0.3, 0.6, trigger)]
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, fusions)
    slow = [
        slow_shallow(nlm, 0.4, 0.0),
        slow_delayed(llm, 0.3, 0.6, SLOW_TRIGGERS[type(trigger).__name__](trigger)),
    ]
    compare_with_twin(nbests, log_probs, lens, 4, tokens, slow)
    assert nbests[0].weights == {"ctc": 1.0, "nlm": 0.4, "llm": 0.3, "words": 0.6}
    for nbest in nbests:
        for again, hypothesis in zip(nbest.reweight(nbest.weights), nbest):
            assert again.total == pytest.approx(hypothesis.total, abs=1e-4)


def slow_delayed(lm: CausalLm, weight: float, bonus: float, trigger: tuple) -> SlowFusion:
    def score(words):
        return text_log_prob(lm, " ".join(words), eos=False)

    def end(prefix, words):
        return text_log_prob(lm, " ".join(words))

    return SlowFusion("llm", weight, bonus, end, word_score=score, trigger=trigger)


def slow_shallow(lm: CausalLm, weight: float, bonus: float) -> SlowFusion:
    known: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def piece_score(prefix, piece):
        if prefix not in known:
            path = torch.tensor([[lm.bos_id, *prefix]])
            known[prefix] = lm.model(path, use_cache=False).logits[0, -1].double().log_softmax(-1)
        return float(known[prefix][piece])

    return SlowFusion(
        "nlm",
        weight,
        bonus,
        lambda prefix, words: plain_log_prob(lm, list(prefix)),
        piece_score=piece_score,
    )


def compare_with_twin(nbests, log_probs, lens, beam, tokens, fusions) -> None:
    for nbest, rows, length in zip(nbests, log_probs.double().tolist(), lens.tolist()):
        expected = fused_search(rows[:length], beam, tokens, fusions)
        assert [tuple(h.tokens) for h in nbest] == [prefix for prefix, _ in expected]
        for hypothesis, (_, scores) in zip(nbest, expected):
            assert hypothesis.scores == pytest.approx(scores, abs=3e-4)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_weight_zero_is_no_lm_bit_for_bit(llm, nlm, tokens, engine):
    log_probs, lens = emissions(batch=5)
    options = PrefixSearchOptions(beam=6, engine=engine)
    bare = ctc_prefix_search(log_probs, lens, options, tokens)
    for trigger in TRIGGERS:
        several = [[DelayedFusion(llm, 0.0, 0.0, trigger)]]
        if engine == "torch":  # shallow fusion is for tensors
            several.append([ShallowFusion(nlm, 0.0), DelayedFusion(llm, 0.0, 0.0, trigger)])
        for fusions in several:
            fused = ctc_prefix_search(log_probs, lens, options, tokens, fusions)
            for one, other in zip(bare, fused):
                assert [(h.tokens, h.scores["ctc"], h.total) for h in one] == [
                    (h.tokens, h.scores["ctc"], h.total) for h in other
                ]


@pytest.mark.parametrize("eos", [True, False])
def test_at_end_is_rescoring_of_the_final_beam(llm, tokens, eos):
    log_probs, lens = emissions(batch=4, seed=3)
    options = PrefixSearchOptions(beam=8)
    weights = {"ctc": 1.0, "llm": 0.7, "words": 0.5}
    fused = ctc_prefix_search(
        log_probs, lens, options, tokens, [DelayedFusion(llm, 0.7, 0.5, AtEnd(), eos=eos)]
    )
    bare = ctc_prefix_search(log_probs, lens, options, tokens)
    rescored = [nbest.reweight(weights) for nbest in rescore_with_lm(bare, llm, eos=eos)]
    assert any(a[0].text != b[0].text for a, b in zip(bare, rescored))
    assert_same(fused, rescored)


@settings(max_examples=25, deadline=None)
@given(
    more=st.lists(st.text("ab'\u00a0\u2003\u3000\u2028\x85\t\n\x1c", min_size=1, max_size=3), min_size=4,
                  max_size=4, unique=True),
    starts=st.lists(st.booleans(), min_size=4, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_words_end_at_single_spaces_alone(llm, more, starts, seed):
    """White space inside pieces belongs to words, in the search and in rescoring of its lists."""
    added = [("▁" if start else "") + text for text, start in zip(more, starts)]
    pieces = [*PIECES, *(piece for piece in added if piece not in PIECES)]
    tokens = AcousticTokens.from_pieces(pieces, 0)
    generator = torch.Generator().manual_seed(seed)
    log_probs = (3 * torch.randn(2, 16, len(pieces), generator=generator)).log_softmax(-1)
    lens, options = torch.tensor([16, 9]), PrefixSearchOptions(beam=6)
    tokenizer = Vocabulary(byte_tokenizer(), None, 0, 1)
    lm, apart = (CausalLm(llm.model, tokenizer, "own", self_check=False) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # with some pieces no word can be tokenized alone
        fused = ctc_prefix_search(log_probs, lens, options, tokens, [DelayedFusion(lm, 0.7, 0.5, AtEnd())])
        bare = ctc_prefix_search(log_probs, lens, options, tokens)
        rescored = rescore_with_lm(bare, apart)
    for hypothesis in (h for nbest in bare for h in nbest):
        assert hypothesis.words() == tokens.words(hypothesis.tokens)
        assert hypothesis.scores["words"] == len(hypothesis.words())
    assert_same(fused, [nbest.reweight({"ctc": 1.0, "llm": 0.7, "words": 0.5}) for nbest in rescored])
    for hypothesis in (h for nbest in fused for h in nbest):
        assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(lm, hypothesis.text), abs=1e-4)


@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
def test_a_batch_is_its_utterances_one_by_one(llm, nlm, tokens, trigger):
    log_probs, lens = emissions(batch=6, seed=5)
    lens[3] = 0

    def decode(chosen):
        fusions = [ShallowFusion(nlm, 0.3, 0.2), DelayedFusion(llm, 0.4, 0.5, trigger)]
        return ctc_prefix_search(
            log_probs[chosen], lens[chosen], PrefixSearchOptions(beam=4), tokens, fusions
        )

    one_by_one = [decode([row])[0] for row in range(len(lens))]
    assert_same(decode(list(range(len(lens)))), one_by_one)


def test_utterances_without_frames_have_the_end_only(llm, nlm, tokens):
    log_probs, _ = emissions(batch=2)
    fusions = [ShallowFusion(nlm, 0.3), DelayedFusion(llm, 0.4, 0.5)]
    nbests = ctc_prefix_search(
        log_probs, torch.tensor([0, 0]), PrefixSearchOptions(beam=4), tokens, fusions
    )
    for nbest in nbests:
        assert [h.text for h in nbest] == [""]
        assert nbest[0].scores["llm"] == pytest.approx(text_log_prob(llm, ""), abs=1e-5)
        assert nbest[0].scores["nlm"] == pytest.approx(plain_log_prob(nlm, []), abs=1e-5)
    assert ctc_prefix_search(log_probs[:0], torch.tensor([], dtype=torch.long), None, tokens, fusions) == []


def test_utterances_of_one_frame_are_scored(llm, nlm, tokens):
    log_probs, _ = emissions(batch=3)
    fusions = [ShallowFusion(nlm, 0.3), DelayedFusion(llm, 0.4, 0.5, EveryFrame())]
    nbests = ctc_prefix_search(log_probs, torch.tensor([1, 0, 1]), None, tokens, fusions)
    assert [len(nbest) for nbest in nbests] == [10, 1, 10]
    for hypothesis in (h for nbest in nbests for h in nbest):
        assert len(hypothesis.tokens) <= 1
        assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(llm, hypothesis.text), abs=1e-4)
        assert hypothesis.scores["nlm"] == pytest.approx(plain_log_prob(nlm, hypothesis.tokens), abs=1e-4)


# --- texts, prompts, piece LMs ----------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", [AtEnd(), FixedInterval(4)], ids=names)
def test_prompts_are_read_not_scored(llm, tokens, trigger):
    log_probs, lens = emissions()
    prompts = {"x": "the boat", "y": "", "z": "a sea is"}
    fusion = DelayedFusion(llm, 0.5, 0.2, trigger, prompt=prompts)
    nbests = ctc_prefix_search(
        log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion], ids=list(prompts)
    )
    again = rescore_with_lm(nbests, llm, "again", prompts=prompts)
    for nbest, more in zip(nbests, again):
        prompt = prompts[nbest.utterance]
        for hypothesis, other in zip(nbest, more):
            whole = text_log_prob(llm, f"{prompt} {hypothesis.text}".strip())
            expected = whole - (text_log_prob(llm, prompt, eos=False) if prompt else 0.0)
            assert hypothesis.scores["llm"] == pytest.approx(expected, abs=1e-4)
            assert other.scores["again"] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="prompt must have a text for each utterance, but is 'other'"):
        ctc_prefix_search(log_probs, lens, None, tokens, [fusion], ids=["x", "y", "other"])


def test_sentence_style_is_what_the_lm_reads(llm, tokens):
    log_probs, lens = emissions(seed=2)
    fusion = DelayedFusion(llm, 0.5, 0.2, FixedInterval(4), text="sentence")
    for nbest in ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion]):
        for hypothesis in nbest:
            words = ["I" if word == "i" else word for word in hypothesis.words()]
            text = " ".join(words)
            assert hypothesis.scores["llm"] == pytest.approx(
                text_log_prob(llm, text[:1].upper() + text[1:]), abs=1e-4
            )


def test_delayed_fusion_of_a_piece_lm_reads_the_pieces_of_the_text(nlm, tokens):
    log_probs, lens = emissions(seed=4)
    fusion = DelayedFusion(nlm, 0.5, 0.2, ShortestHypothesis(), source="nlm")
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    for hypothesis in (h for nbest in nbests for h in nbest):
        expected = plain_log_prob(nlm, tokens.encode(hypothesis.text))
        assert hypothesis.scores["nlm"] == pytest.approx(expected, abs=1e-4)


def test_letters_with_a_delimiter(llm):
    pieces = ["<pad>", "|", "a", "b", "s", "e", "'"]
    letters = AcousticTokens.from_pieces(pieces, 0, "", "|")
    generator = torch.Generator().manual_seed(1)
    log_probs = (3 * torch.randn(3, 30, len(pieces), generator=generator)).log_softmax(-1)
    lens = torch.tensor([30, 21, 12])
    for trigger in TRIGGERS:
        fusion = DelayedFusion(llm, 0.4, 0.3, trigger)
        nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), letters, [fusion])
        for hypothesis in (h for nbest in nbests for h in nbest):
            assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(llm, hypothesis.text), abs=1e-4)


def test_a_tokenizer_over_spaces_is_exact_too(tokens):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    raw.train_from_iterator(
        ["a the b i a the sea ing i the a b the a i", "the a d the i a a the b"] * 9, trainer
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>"
    )
    lm = CausalLm(
        tiny_model(len(tokenizer), 3), Vocabulary(tokenizer, None, 0, 1), "wide", self_check=False
    )
    log_probs, lens = emissions(seed=6)
    with pytest.warns(UserWarning, match="tokenized whole"):
        fusion = DelayedFusion(lm, 0.5, 0.2, EveryFrame())
    nbests = ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    slow = slow_delayed(lm, 0.5, 0.2, ("interval", 1))
    compare_with_twin(nbests, log_probs, lens, 4, tokens, [slow])


def test_cleaning_the_tree_changes_nothing(llm, nlm, tokens, monkeypatch):
    from icefall_fusion.fusion import delayed, shallow

    log_probs, lens = emissions(batch=4, frames=40, seed=7)

    def decode():
        fusions = [ShallowFusion(nlm, 0.3, 0.2), DelayedFusion(llm, 0.4, 0.5, FixedInterval(2))]
        return ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, fusions)

    usual = decode()
    monkeypatch.setattr(delayed, "_KEEP_AFTER", -1)
    monkeypatch.setattr(shallow, "_KEEP_AFTER", 1)
    assert_same(usual, decode())


class Watched(DelayedFusion):
    """Notes after every event how much is remembered beside what the live hypotheses' texts need."""

    def fuse_now(self, beam, fires):
        super().fuse_now(beam, fires)
        tree = self._tree.tree
        longest = int(tree.depth[beam.state[..., self.index].cpu().numpy()].max())
        words = int(beam.words[..., self.index].max())
        self.slots = max(getattr(self, "slots", 0), int(tree.slots.used.max()) - longest)
        self.histories = max(getattr(self, "histories", 0), len(self._word_nodes) - words)


def test_a_long_utterance_holds_little_more_than_its_text(llm, tokens, monkeypatch):
    monkeypatch.setattr(llm, "max_tokens", None)
    log_probs, _ = emissions(batch=1, frames=600, seed=10, peak=1.5)
    fusion = Watched(llm, 0.4, 0.5, FixedInterval(8))
    options = PrefixSearchOptions(beam=4)
    text = ctc_prefix_search(log_probs, torch.tensor([600]), options, tokens, [fusion])[0][0].text
    stats = fusion.stats()
    assert len(llm.encode(text)) > 300 and stats["lm_tokens_scored"] > 600
    assert fusion.slots < 120 and fusion.histories < 120  # clean-ups are 32 tokens apart


# --- counters ---------------------------------------------------------------------------------------------


def test_counters_say_what_was_done(llm, tokens):
    log_probs, lens = emissions(batch=4, frames=40)
    fusion = DelayedFusion(llm, 0.5, 0.2, FixedInterval(8))
    ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    stats = fusion.stats()
    assert stats["events"] <= 40 // 8
    assert stats["lm_forwards"] <= stats["events"] + 1
    assert 0 < stats["histories_scored"] <= stats["lm_tokens_scored"]
    assert 0 < stats["retokenize_hit_rate"] <= 1
    before = dict(stats)
    ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    again = fusion.stats()
    for name in ("events", "histories_scored", "lm_forwards", "lm_tokens_forwarded", "lm_tokens_scored"):
        assert again[name] == before[name], name
    assert again["retokenize_hit_rate"] == 1  # all words are known by now


def test_shallow_fusion_calls_the_model_once_a_frame_at_most(nlm, tokens):
    log_probs, lens = emissions(batch=4, frames=40)
    fusion = ShallowFusion(nlm, 0.5)
    ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=4), tokens, [fusion])
    assert 0 < fusion.stats()["lm_forwards"] <= 41


# --- rescoring --------------------------------------------------------------------------------------------


def an_nbest(name: str, texts: list[str]) -> NBest:
    scores = {"ctc": -1.0, "total": -1.0}
    return NBest(
        name,
        [Hypothesis([3 + i], text, {**scores, "words": len(text.split())}) for i, text in enumerate(texts)],
    )


def test_rescoring_adds_a_score_and_leaves_the_rest(llm, monkeypatch):
    from icefall_fusion.fusion import rescoring

    nbests = [
        an_nbest("u", ["the sea", "the see", ""]),
        an_nbest("empty", []),
        an_nbest("v", ["a boat is it"]),
    ]
    counters: dict[str, float] = {}
    first = rescore_with_lm(nbests, llm, counters=counters)
    assert [h.text for nbest in first for h in nbest] == [h.text for nbest in nbests for h in nbest]
    assert "llm" not in nbests[0][0].scores
    for hypothesis in (h for nbest in first for h in nbest):
        assert hypothesis.total == -1.0
        assert hypothesis.scores["llm"] == pytest.approx(text_log_prob(llm, hypothesis.text), abs=1e-4)
    assert counters["lm_forwards"] == 1
    monkeypatch.setattr(rescoring, "TOKENS_A_CALL", 1)
    counters = {}
    assert_same(first, rescore_with_lm(nbests, llm, counters=counters))
    assert counters["lm_forwards"] == 2
    assert rescore_with_lm([], llm) == []


class PieceCounter:
    """Stands for the attention decoder: the score is a function of frames, pieces and their number."""

    def score_tokens(self, encoder_out, lens, token_lists):
        ends = [float(encoder_out[row, : int(n)].sum()) for row, n in enumerate(lens)]
        return [torch.tensor([end - sum(ids) for ids in lists]) for end, lists in zip(ends, token_lists)]


def test_attention_rescoring_sees_each_utterance_with_its_own_frames(monkeypatch):
    from icefall_fusion.fusion import rescoring

    monkeypatch.setattr(rescoring, "UTTERANCES_A_CALL", 2)
    nbests = [an_nbest(str(i), ["a"] * (i % 3)) for i in range(6)]
    encoder_out = torch.randn(6, 9, 4, generator=torch.Generator().manual_seed(0))
    lens = torch.tensor([9, 3, 0, 0, 5, 7])
    for row, nbest in enumerate(rescore_with_attention(nbests, PieceCounter(), encoder_out, lens)):
        for hypothesis in nbest:
            expected = float(encoder_out[row, : int(lens[row])].sum()) - sum(hypothesis.tokens)
            assert hypothesis.scores["attention"] == pytest.approx(expected if lens[row] else 0.0, abs=1e-5)
    with pytest.raises(ValueError, match="nbests must have 6 utterances, but is 1"):
        rescore_with_attention(nbests[:1], PieceCounter(), encoder_out, lens)


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": -0.1}, "DelayedFusion.weight must be finite and at least 0, but is -0.1"),
        ({"weight": math.nan}, "DelayedFusion.weight must be finite"),
        ({"word_bonus": math.inf}, "DelayedFusion.word_bonus must be finite"),
        ({"source": "ctc"}, "DelayedFusion.source must be a name, none of"),
        ({"text": "lowr"}, "did you mean 'lower'"),
        ({"trigger": 16}, "DelayedFusion.trigger must be a trigger, but is 16"),
        ({"weight": "0.5"}, "DelayedFusion.weight must be finite and at least 0, but is '0.5'"),
        ({"weight": None}, "DelayedFusion.weight must be finite and at least 0, but is None"),
        ({"word_bonus": [1]}, "DelayedFusion.word_bonus must be finite, but is .1."),
        ({"source": 5}, "DelayedFusion.source must be a name, none of"),
        ({"late": 1.5}, "DelayedFusion.late must be an integer, at least 0, but is 1.5"),
        ({"late": "2"}, "DelayedFusion.late must be an integer, at least 0, but is '2'"),
        ({"text": 3}, "text must be one of"),
        ({"prompt": 5}, "DelayedFusion.prompt must be a text, or a mapping of utterance ids to texts"),
        ({"prompt": "\ud800"}, "DelayedFusion.prompt must be text that UTF-8 can write"),
        ({"prompt": {"u": b"x"}}, "DelayedFusion.prompt.'u'. must be text that UTF-8 can write, but is b'x'"),
    ],
)
def test_bad_arguments_are_named(llm, change, message):
    with pytest.raises(ValueError, match=message):
        DelayedFusion(**{"lm": llm, "weight": 0.5, **change})


@pytest.mark.parametrize("bad", [None, 2.5, "lm", [], torch.zeros(2)], ids=str)
def test_what_is_no_language_model_or_list_is_named(llm, bad):
    for kind in (DelayedFusion, ShallowFusion):
        with pytest.raises(ValueError, match=f"{kind.__name__}.lm must be a language model"):
            kind(bad, 0.5)
    with pytest.raises(ValueError, match="lm must be a language model"):
        rescore_with_lm([], bad)
    if bad != []:
        with pytest.raises(ValueError, match="nbests must be a list of N-best lists"):
            rescore_with_lm(bad, llm)
    if bad != "lm":
        with pytest.raises(ValueError, match="source must be a name"):
            rescore_with_lm([], llm, bad)
    for call in (lambda: DelayedFusion(llm, 0.5, text=bad), lambda: rescore_with_lm([], llm, text=bad)):
        with pytest.raises(ValueError, match="text must be one of"):
            call()


def test_bad_triggers_are_named(nlm):
    for bad in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"FixedInterval.frames must be an integer, .* but is {bad}"):
            FixedInterval(bad)
        with pytest.raises(ValueError, match=f"ShortestHypothesis.every must be an integer, .* but is {bad}"):
            ShortestHypothesis(every=bad)
    with pytest.raises(ValueError, match="ShortestHypothesis.unit must be one of .* did you mean 'words'"):
        ShortestHypothesis("word")
    with pytest.raises(ValueError, match="ShallowFusion.weight must be finite and at least 0"):
        ShallowFusion(nlm, -1.0)


def test_vocabularies_that_differ_are_refused_with_both_sizes(llm, nlm, tokens):
    log_probs, lens = emissions()
    with pytest.raises(ValueError, match=r"'tiny-llm' has \d+ pieces, the acoustic model 13"):
        ctc_prefix_search(log_probs, lens, None, tokens, [ShallowFusion(llm, 0.5)])
    other = AcousticTokens.from_pieces(PIECES[:-1] + ["z"], 0)
    with pytest.raises(ValueError, match="13 pieces, the acoustic model 13 and piece 12 is 't' .* 'z'"):
        ctc_prefix_search(log_probs, lens, None, other, [ShallowFusion(nlm, 0.5)])
    fewer = Vocabulary(None, AcousticTokens.from_pieces(PIECES[:-1], 0), 1, 1)
    padded = CausalLm(nlm.model, fewer, "padded", self_check=False)  # 12 pieces, 13 outputs
    with pytest.raises(ValueError, match="'padded' has 12 pieces, the acoustic model 13; use"):
        ctc_prefix_search(log_probs, lens, None, tokens, [ShallowFusion(padded, 0.5)])


def test_a_language_model_without_vocabulary_is_named(tokens):
    lm = CausalLm(tiny_model(tokens.size, 2), Vocabulary(None, None, 1, 1), "mute", self_check=False)
    log_probs, lens = emissions()
    message = "language model 'mute' must have a tokenizer or bpe.model"
    with pytest.raises(ValueError, match=message):
        DelayedFusion(lm, 0.5)
    with pytest.raises(ValueError, match=message):
        rescore_with_lm([an_nbest("u", ["a"])], lm)
    with pytest.raises(ValueError, match=message):
        ctc_prefix_search(log_probs, lens, None, tokens, [ShallowFusion(lm, 0.5)])


def test_delayed_fusion_needs_the_acoustic_vocabulary(llm):
    log_probs, lens = emissions()
    with pytest.raises(ValueError, match="tokens must be passed"):
        ctc_prefix_search(log_probs, lens, None, None, [DelayedFusion(llm, 0.5)])


def few_words_lm() -> CausalLm:
    """Return a language model whose tokenizer knows the words "the" and "of" alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "of": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    return CausalLm(tiny_model(4, 1), Vocabulary(tokenizer, None, 0, 1), "few-words", self_check=False)


@pytest.mark.parametrize("trigger", [EveryFrame(), AtEnd()], ids=names)
@pytest.mark.parametrize("word_by_word", [True, False])
def test_an_utterance_with_a_word_that_cannot_be_spelled_is_named(tokens, trigger, word_by_word):
    lm = few_words_lm()
    fusion = DelayedFusion(lm, 0.5, trigger=trigger)
    fusion._tokenizer.word_by_word = word_by_word
    path = torch.tensor([[4, 0, 4, 0, 4], [4, 0, 5, 0, 4]])  # the the the; the se the
    log_probs = torch.full((2, 5, len(PIECES)), -math.inf).scatter_(2, path[..., None], 0.0)
    with pytest.raises(ValueError, match="^utterance 'second': .* must spell every word, but 'se' has an"):
        ctc_prefix_search(log_probs, torch.tensor([5, 5]), None, tokens, [fusion], ids=["first", "second"])
    bare = ctc_prefix_search(log_probs, torch.tensor([5, 5]), None, tokens, ids=["first", "second"])
    with pytest.raises(ValueError, match="^utterance 'second': .* must spell every word, but 'se' has an"):
        rescore_with_lm(bare, lm)


@pytest.mark.filterwarnings("ignore:the language model's tokenizer cannot be used word by word")
@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("trigger", TRIGGERS, ids=names)
@pytest.mark.parametrize("word_by_word", [True, False])
def test_at_weight_zero_words_that_cannot_be_spelled_change_nothing(tokens, trigger, word_by_word, engine):
    log_probs, lens = emissions(seed=3)
    options = PrefixSearchOptions(beam=5, engine=engine)
    bare = ctc_prefix_search(log_probs, lens, options, tokens)
    letters = AcousticTokens.from_pieces(["<blk>", "▁", *"these"[:3]], 0)  # without an unknown piece
    by_letters = CausalLm(tiny_model(5, 1), Vocabulary(None, letters, 0, 1), "letters", self_check=False)
    for lm in (few_words_lm(), by_letters):
        fusion = DelayedFusion(lm, 0.0, trigger=trigger)
        fusion._tokenizer.word_by_word = word_by_word
        for one, other in zip(bare, ctc_prefix_search(log_probs, lens, options, tokens, [fusion])):
            assert [(h.tokens, h.scores["ctc"], h.total) for h in one] == [
                (h.tokens, h.scores["ctc"], h.total) for h in other
            ]
            assert all(math.isfinite(h.scores["llm"]) for h in other)


def test_a_language_model_that_gives_nan_is_named(tokens):
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer), 1)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    lm = CausalLm(model, Vocabulary(tokenizer, None, 0, 1), "broken", self_check=False)
    log_probs, lens = emissions()
    with pytest.raises(ValueError, match="'broken' must be numbers, but utterance '0' has NaN"):
        ctc_prefix_search(log_probs, lens, None, tokens, [DelayedFusion(lm, 0.5)])
