"""Tree scores against plain forwards on tiny random models of many families; memory, laziness, refusals.
Knows: CausalLm, transformers. Must not know: search, fusion.
"""
from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.common.devices import weight_bytes
from icefall_fusion.lm import CausalLm, loading
from icefall_fusion.lm.loading import Vocabulary, check_tree
from icefall_fusion.lm.tree_scorer import TreeOptions
from tests import tiny

VOCAB, WINDOW = 97, 5
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
PLAIN = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = {  # name: (config class, its options, packed layout)
    "llama": ("LlamaConfig", SIZES, True),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": None}, True),
    "mistral-window": ("MistralConfig", {**SIZES, "sliding_window": WINDOW}, True),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}, True),
    "qwen2": ("Qwen2Config", SIZES, True),
    "qwen2-window": (
        "Qwen2Config",
        {**SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        True,
    ),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}, True),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 8, "sliding_window": WINDOW}, False),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 8, "sliding_window": WINDOW}, True),
    "gpt-neox": ("GPTNeoXConfig", PLAIN, True),
    "opt": ("OPTConfig", {**PLAIN, **OPT}, True),
    "gpt2": ("GPT2Config", {**GPT, "n_positions": 64}, True),
    "gpt-j": ("GPTJConfig", {**GPT, "rotary_dim": 4}, False),
    "phi3": ("Phi3Config", SIZES, True),
    "phi3-window": ("Phi3Config", {**SIZES, "sliding_window": WINDOW}, True),
    "olmo2": ("Olmo2Config", SIZES, True),
    "smollm3": ("SmolLM3Config", SIZES, True),
    "cohere": ("CohereConfig", {**SIZES, "logit_scale": 0.3}, True),
    "granite": ("GraniteConfig", {**SIZES, "logits_scaling": 3.0}, True),
    "stablelm": ("StableLmConfig", SIZES, False),
    "falcon": ("FalconConfig", {**PLAIN, "alibi": False}, False),
}
tokens = st.integers(0, VOCAB - 1)
events = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.lists(tokens, max_size=4)), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


def random_model(name: str, seed: int = 0, scale: float = 5.0) -> transformers.PreTrainedModel:
    """Return a random model whose tokens matter: weights large enough for peaked distributions."""
    kind, options, _ = FAMILIES[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(scale)
    return model.eval()


@pytest.fixture(scope="module")
def lm() -> CausalLm:
    return wrap("llama")


def wrap(name: str) -> CausalLm:
    return CausalLm(random_model(name), Vocabulary(None, None, 1, 2), name, self_check=False)


def plain_scores(
    model: transformers.PreTrainedModel, paths: list[list[int]], start: list[int]
) -> torch.Tensor:
    """Return log P of each path by transformers alone, one forward each."""
    totals = []
    for path in paths:
        ids = torch.tensor([start + path])
        with torch.inference_mode():
            log_probs = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        totals.append(sum(log_probs[len(start) - 1 + n, token].item() for n, token in enumerate(path)))
    return torch.tensor(totals)


# --- the same scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tree_scores_like_transformers_after_a_round_trip_to_disk(name: str, tmp_path: Path) -> None:
    original = random_model(name)
    original.save_pretrained(tmp_path)
    lm = CausalLm.from_pretrained(tmp_path)  # its self-check has a say too
    assert lm.packed == FAMILIES[name][2]
    generator = torch.Generator().manual_seed(3)
    paths = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in (1, 2, 7, 12)]
    paths += [paths[2][:3] + paths[0], paths[3][:9] + paths[1]]
    prompts = [[5, 6, 7], []]
    scorer = lm.open_tree(2, prompts)
    for length in (2, 4, 12):  # deeper each time, windows slide
        for b in (0, 1):
            cut = [path[:length] for path in paths]
            found = scorer.score([scorer.insert(scorer.root(b), path) for path in cut])
            torch.testing.assert_close(
                found, plain_scores(original, cut, [lm.bos_id, *prompts[b]]), atol=1e-4, rtol=1e-5
            )


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt2"])
def test_any_sequence_of_events_equals_scoring_from_scratch(name: str) -> None:
    lm = wrap(name)

    @settings(max_examples=8, deadline=None)
    @given(events)
    def run(script: list) -> None:
        prompts = [[3], [], [4, 4]]
        scorer = lm.open_tree(3, prompts)
        known: list[tuple[int, list[int], int]] = [(b, [], scorer.root(b)) for b in range(3)]
        for event in script:
            grown = []
            for pick, more in event:
                b, path, node = known[pick % len(known)]
                grown.append((b, path + more, scorer.insert(node, more)))
            found = scorer.score([node for _, _, node in grown], eos=True)
            for (b, path, _), score in zip(grown, found.tolist()):
                expected = sum(lm.token_log_probs([path], prompts[b], eos=True)[0])
                assert score == pytest.approx(expected, abs=1e-4)
            scorer.keep([node for _, _, node in grown[::2]])  # later events may still pick what was freed
            known += grown

    run()


def test_distributions_and_eos_equal_plain_forwards(lm: CausalLm) -> None:
    scorer = lm.open_tree(2)
    nodes = torch.tensor([scorer.insert(scorer.root(0), [5, 6]), scorer.root(1), scorer.root(0)])
    nodes = torch.cat([nodes, nodes[:1]])
    with torch.inference_mode():
        expected = lm.model(torch.tensor([[1, 5, 6]])).logits[0].log_softmax(-1)
    found = scorer.next_log_probs(nodes)
    torch.testing.assert_close(found, expected[[2, 0, 0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scorer.eos_scores(nodes), found[:, 2])
    assert scorer.stats()["lm_forwards"] == 1
    children = scorer.child(nodes, torch.tensor([9, 9, 9, 9]))
    assert children[0] == children[3] and len(set(children.tolist())) == 3
    torch.testing.assert_close(scorer.score(children[:1]), expected[[0, 1], [5, 6]].sum()[None] + found[0, 9])


def test_a_score_with_eos_is_the_score_and_eos_in_one_call(lm: CausalLm) -> None:
    scorer = lm.open_tree(1)
    node = scorer.insert(scorer.root(0), [5, 6])
    together = scorer.score([node, node], eos=True)
    assert scorer.stats()["lm_forwards"] == 1
    torch.testing.assert_close(together, scorer.score([node, node]) + scorer.eos_scores([node, node]))


def test_nothing_to_score_is_no_call_and_results_can_be_changed_in_place(lm: CausalLm) -> None:
    scorer = lm.open_tree(2)
    assert scorer.score([]).shape == (0,) and scorer.next_log_probs([]).shape == (0, VOCAB)
    assert scorer.score(scorer.roots()).tolist() == [0.0, 0.0]
    scorer.keep([[], []])
    assert scorer.stats()["lm_forwards"] == 0
    scorer.score([scorer.insert(scorer.root(0), [3])]).add_(1.0)
    scorer.next_log_probs([0]).add_(1.0)


def test_results_do_not_depend_on_the_batch(lm: CausalLm) -> None:
    generator = torch.Generator().manual_seed(1)
    paths = [torch.randint(0, VOCAB, (9,), generator=generator).tolist() for _ in range(6)]
    together = lm.open_tree(6)
    batch = [torch.zeros(0)] * 6
    for end in (2, 5, 9):
        nodes = [together.insert(together.root(b), path[:end]) for b, path in enumerate(paths)]
        batch = together.score(nodes)
    for b, path in enumerate(paths):
        alone = lm.open_tree(1)
        single = alone.score([alone.insert(alone.root(0), path)])
        torch.testing.assert_close(single[0], batch[b], atol=1e-5, rtol=1e-6)


def test_texts_prompts_and_the_slow_twin_agree(tmp_path: Path) -> None:
    lm = CausalLm.from_pretrained(tiny.language_model(tmp_path, 1, pieces=False))
    text, prompt = "the cat sat", "a dog. "
    ids = lm.encode(text)
    assert ids == lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (lm.bos_id, lm.eos_id) == (0, 1)
    assert lm.log_prob(text) == pytest.approx(sum(lm.token_log_probs([ids])[0]), abs=1e-4)
    given_prompt = sum(lm.token_log_probs([ids], lm.encode(prompt), eos=True)[0])
    assert lm.log_prob(text, prompt, eos=True) == pytest.approx(given_prompt, abs=1e-4)
    assert lm.log_probs([text, text + " on", ""])[2] == 0.0 and lm.log_probs([]) == []


def test_a_folder_with_acoustic_pieces_scores_their_ids(tmp_path: Path) -> None:
    lm = CausalLm.from_pretrained(tiny.language_model(tmp_path, 1, pieces=True), dtype="bfloat16")
    assert lm.tokenizer is None and lm.pieces.size == lm.vocab_size and lm.bos_id == lm.eos_id == 1
    assert lm.encode("the cat") == lm.pieces.encode("the cat")
    assert lm.log_prob("the cat") < 0


# --- laziness and memory ---------------------------------------------------------------------------------


def test_what_starts_and_ends_a_text_can_be_named(tmp_path: Path) -> None:
    folder = tiny.language_model(tmp_path / "llm", 3, pieces=False)
    lm = CausalLm.from_pretrained(folder, bos_token="</s>", eos_token="a")  # a token, and text of one
    assert (lm.bos_id, [lm.eos_id]) == (1, lm.encode("a"))
    plain = CausalLm.from_pretrained(folder)
    assert (plain.bos_id, plain.eos_id) == (0, 1)
    plain.bos_id = 1
    assert lm.log_prob("the cat") == pytest.approx(plain.log_prob("the cat"), abs=1e-5)
    pieces = tiny.language_model(tmp_path / "pieces", 3, pieces=True)
    assert CausalLm.from_pretrained(pieces, bos_token="<blk>").bos_id == 0
    for bad in ("", "two words", "<|endoftext|>"):
        with pytest.raises(ValueError, match="eos_token must be a token of .*, or text of one token, but is"):
            CausalLm.from_pretrained(folder, eos_token=bad)


def test_a_token_is_forwarded_only_when_a_child_is_scored(lm: CausalLm) -> None:
    scorer = lm.open_tree(2)
    root = scorer.root(0)
    scorer.score([scorer.insert(root, [token]) for token in range(20)])
    stats = scorer.stats()
    assert (stats["lm_tokens_forwarded"], stats["lm_tokens_scored"]) == (1, 20)
    scorer.score([scorer.insert(root, [3, 4])])
    stats = scorer.stats()
    assert (stats["lm_tokens_forwarded"], stats["lm_forwards"], stats["lm_tokens_recomputed"]) == (2, 2, 0)
    scorer.score([scorer.insert(root, [3, 4]), root])
    assert scorer.stats()["lm_forwards"] == 2


def test_slots_and_distributions_are_reused(lm: CausalLm) -> None:
    scorer = lm.open_tree(2)
    for start in range(30):
        nodes = []
        for b in range(2):
            nodes += [scorer.insert(scorer.root(b), [start, token, start, 9]) for token in range(5)]
        scorer.score(nodes)
        scorer.keep(nodes[:1])
    stats = scorer.stats()
    assert scorer.tree.slots.used.max() <= 1 + 3 + 11
    assert stats["kv_bytes_peak"] == 3 * 2 * 2 * 64 * 2 * 8 * 4  # layers, k and v, utterances, slots...
    assert len(scorer._store.log_probs) == 64


def test_what_was_freed_is_computed_again_and_counted(lm: CausalLm) -> None:
    scorer = lm.open_tree(1)
    node = scorer.insert(scorer.root(0), [5, 6, 7])
    first = scorer.score([node])
    scorer.keep([scorer.root(0)])
    again = scorer.score([scorer.insert(node, [8])])
    assert scorer.stats()["lm_tokens_recomputed"] == 2  # 5 and 6 had been forwarded, 7 had not
    expected = sum(lm.token_log_probs([[5, 6, 7, 8]])[0])
    assert again.item() == pytest.approx(expected, abs=1e-4) and first > again


def test_bounds_on_memory_split_calls_but_not_scores(lm: CausalLm) -> None:
    path = list(range(3, 43))
    whole, parts = lm.open_tree(2), lm.open_tree(2, options=TreeOptions(7, 4 * VOCAB * 10))
    scores = []
    for scorer in (whole, parts):
        nodes = [scorer.insert(scorer.root(b), path[b:]) for b in (0, 1)]
        scores.append(scorer.score(nodes))
    torch.testing.assert_close(*scores)
    assert whole.stats()["lm_forwards"] == 1 and parts.stats()["lm_forwards"] == -(-79 // 7)
    assert parts._store.in_use <= 10
    assert parts.stats()["distribution_bytes_peak"] <= 4 * VOCAB * 10
    kept = parts.next_log_probs([parts.insert(parts.root(0), path[:5])])
    torch.testing.assert_close(kept, whole.next_log_probs([whole.insert(whole.root(0), path[:5])]))


@pytest.mark.parametrize("length", [6, 7, 8, 14, 30])
def test_a_prompt_may_be_longer_than_a_call(lm: CausalLm, length: int) -> None:
    prompt, path = [3 + i % 40 for i in range(length)], [5, 9, 5]
    scorer = lm.open_tree(1, [prompt], TreeOptions(7, 4 * VOCAB * 10))
    score = scorer.score([scorer.insert(scorer.root(0), path)]).item()
    assert score == pytest.approx(sum(lm.token_log_probs([path], prompt)[0]), abs=1e-4)


def test_out_of_memory_halves_the_call_and_is_counted() -> None:
    lm = wrap("llama")

    def refuse_long_calls(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs["input_ids"].numel() > 16:
            raise torch.OutOfMemoryError("out of memory")

    path = list(range(3, 43))
    expected = sum(lm.token_log_probs([path])[0])
    handle = lm.model.register_forward_pre_hook(refuse_long_calls, with_kwargs=True)
    scorer = lm.open_tree(1)
    assert scorer.score([scorer.insert(scorer.root(0), path)]).item() == pytest.approx(expected, abs=1e-4)
    assert scorer.stats()["oom_backoffs"] == 2
    prompted = lm.open_tree(1, [path])
    score = prompted.score([prompted.insert(prompted.root(0), path[:3])]).item()
    handle.remove()
    assert score == pytest.approx(sum(lm.token_log_probs([path[:3]], path)[0]), abs=1e-4)


def test_rows_and_packed_layouts_agree() -> None:
    packed, rows = wrap("llama"), wrap("llama")
    rows.packed = False
    rows.model.set_attn_implementation("sdpa")
    scores = []
    for lm in (packed, rows):
        scorer = lm.open_tree(3)
        nodes = [scorer.insert(scorer.root(b % 3), [b, 3 * b, 5, *range(b)]) for b in range(8)]
        scores.append(scorer.score(nodes[:3] + nodes[5:]))
        scores[-1] = torch.cat([scores[-1], scorer.score(nodes[4:5])])
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-6)


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        transformers.FalconConfig(**PLAIN, alibi=True),
        transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4),
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2),
    ],
    ids=["bloom", "falcon-alibi", "mpt", "mamba"],
)
def test_models_without_positions_or_plain_attention_are_refused(config, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be used in a token tree|not from ALiBi|must be of types"):
        CausalLm.from_pretrained(tmp_path)


@pytest.mark.parametrize(  # in bfloat16 so small a model feels its positions no more than its rounding
    "dtype, wrong", [(torch.float32, "masks"), (torch.float32, "positions"), (torch.bfloat16, "masks")]
)
def test_wrong_masks_and_positions_are_refused(dtype: torch.dtype, wrong: str, monkeypatch) -> None:
    model = random_model("llama").to(dtype)
    lm = CausalLm(model, Vocabulary(None, None, 1, 2), "llama")
    logits = lm.tree_logits

    def other(tokens, positions, mask, window_mask, cache, wanted):
        if wrong == "masks":
            return logits(tokens, positions, torch.ones_like(mask), window_mask, cache, wanted)
        return logits(tokens, torch.zeros_like(positions), mask, window_mask, cache, wanted)

    monkeypatch.setattr(lm, "tree_logits", other)
    with pytest.raises(ValueError, match="cannot be used in a token tree: its scores must differ"):
        check_tree(lm)


@pytest.mark.parametrize("more, good", [(0.5, True), (30.0, False)])
def test_a_path_after_which_logits_are_steep_may_be_rounded(more: float, good: bool, monkeypatch) -> None:
    """A float32 model with huge activations differs by 0.001 in one path; what differs by more is wrong."""
    lm = CausalLm(random_model("llama"), Vocabulary(None, None, 1, 2), "llama")
    logits, calls = lm.tree_logits, []

    def rounded(*given):
        found = logits(*given).clone()
        calls.append(found)
        if len(calls) == 3:  # the last event: one token of it
            found[-1, 0] += more
        return found

    monkeypatch.setattr(lm, "tree_logits", rounded)
    worst = loading._differences(lm).max()
    assert len(calls) == 3 and worst > loading.TOLERANCE_FLOAT32
    calls.clear()
    if good:
        check_tree(lm)
    else:
        with pytest.raises(ValueError, match="by at most 0.01 a token in 100 % of the paths"):
            check_tree(lm)


def test_folders_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold a config.json"):
        CausalLm.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be a folder, a .gguf file or a hub name"):
        CausalLm.from_pretrained(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded as a causal LM"):
        CausalLm.from_pretrained(tmp_path)
    t5 = {"vocab_size": 20, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2, "d_kv": 4}
    transformers.T5Config(**t5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="causal LM"):
        CausalLm.from_pretrained(tmp_path)


def test_broken_weights_and_vocabularies_are_refused(tmp_path: Path) -> None:
    folder = tiny.language_model(tmp_path / "lm", 1, pieces=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="these are missing"):
        CausalLm.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cannot be loaded as a causal LM"):
        CausalLm.from_pretrained(folder)
    small = transformers.LlamaConfig(**{**SIZES, "vocab_size": 20, "bos_token_id": 1})
    transformers.LlamaForCausalLM(small).save_pretrained(folder)
    with pytest.raises(ValueError, match="no more entries than the model's 20"):
        CausalLm.from_pretrained(folder)


def test_a_tokenizer_that_contradicts_its_sentence_piece_model_is_refused(tmp_path: Path) -> None:
    mistral_common = pytest.importorskip("mistral_common")
    source = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(source, tmp_path / "tokenizer.model")
    options = {**SIZES, "vocab_size": 32000, "hidden_size": 8, "num_hidden_layers": 1}
    transformers.MistralForCausalLM(transformers.MistralConfig(**options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must agree with its tokenizer.model, but 'hello world'"):
        CausalLm.from_pretrained(tmp_path)


def test_positions_have_an_end() -> None:
    lm = wrap("gpt2")
    scorer = lm.open_tree(1)
    node = scorer.insert(scorer.root(0), [3] * 65)
    with pytest.raises(ValueError, match="at most 64 tokens .the model's positions., prompt"):
        scorer.score([node])
    assert wrap("llama").max_tokens is None


def test_arguments_are_checked(lm: CausalLm) -> None:
    scorer = lm.open_tree(1)
    with pytest.raises(ValueError, match="nodes must lie between 0 and 0"):
        scorer.score([1])
    with pytest.raises(ValueError, match="node must lie between"):
        scorer.insert(3, [1])
    with pytest.raises(ValueError, match="token ids must lie between 0 and 96"):
        scorer.insert(0, [97])
    with pytest.raises(ValueError, match="batch must be an integer, at least 1"):
        lm.open_tree(0)
    with pytest.raises(ValueError, match="prompts must be one for each of the 2 utterances"):
        lm.open_tree(2, [[1]])
    with pytest.raises(ValueError, match="model llama must have a tokenizer"):
        lm.log_prob("text")
    for bad, rule in ((5, "UTF-8 can write, but is 5"), ("a \udc00", "UTF-8 can write")):
        with pytest.raises(ValueError, match=f"text must .* {rule}"):
            lm.log_prob(bad)
        with pytest.raises(ValueError, match=f"prompt must .* {rule}"):
            lm.log_prob("text", prompt=bad)
    with pytest.raises(ValueError, match="texts must be a list of texts, not one text, but is 'the cat'"):
        lm.log_probs("the cat")
    for bad in (2.5, "2", True):
        with pytest.raises(ValueError, match="batch must be an integer, at least 1, but is"):
            lm.open_tree(bad)
    for bad in (None, 2.5, "a"):
        for name, call in {
            "paths": lambda bad: lm.token_log_probs([bad] if isinstance(bad, str) else bad),
            "texts": lm.log_probs,
            "options": lambda bad: lm.open_tree(1, options=bad or 5),
            "node": lambda bad: scorer.insert(bad, [1]),
            "live": scorer.keep,
        }.items():
            if name != "live" or bad != "a":
                with pytest.raises(ValueError, match=f"^{name} must "):
                    call(bad)
    for bad in (None, 2.5, object()):
        with pytest.raises(ValueError, match="path_or_name must be a folder or a hub name"):
            CausalLm.from_pretrained(bad)
    with pytest.raises(ValueError, match="prompts must be a list of token ids for each utterance, but is 7"):
        lm.open_tree(1, 7)
    for bad in ("ab", [1.5], [None]):
        with pytest.raises(ValueError, match="prompt must hold integers, but is"):
            lm.open_tree(1, [bad])
        with pytest.raises(ValueError, match="token_ids must hold integers, but is"):
            scorer.insert(0, bad)
        with pytest.raises(ValueError, match="nodes must hold integers, but is"):
            scorer.score(bad)
    with pytest.raises(ValueError, match="TreeOptions.max_forward_tokens must be an integer, at least 1"):
        TreeOptions(max_forward_tokens=0)
    with pytest.raises(ValueError, match="TreeOptions.max_distribution_bytes must be an integer, at least 0"):
        TreeOptions(max_distribution_bytes="many")
    without = CausalLm(random_model("llama"), Vocabulary(), "bare", self_check=False)
    with pytest.raises(ValueError, match="prompt must hold at least one token, as bare has no bos"):
        without.open_tree(1)
    with pytest.raises(ValueError, match="eos must be off for a model without eos"):
        bare = without.open_tree(1, [[4]])
        bare.eos_scores([bare.root(0)])


def test_a_tree_takes_its_keys_and_values_along() -> None:
    """No circle of references holds them until Python's collector comes by: it does not know their size."""
    lm = CausalLm(random_model("llama"), Vocabulary(None, None, 1, 2), "tiny", self_check=False)
    gc.collect()
    gc.disable()
    try:
        tree = lm.open_tree(1)
        tree.score([tree.insert(tree.root(0), [3, 4, 5])])
        held = [layer.keys for layer in tree._cache.layers] + [tree._store.log_probs]
        kept = [weakref.ref(tensor) for tensor in held]
        del held
        assert all(tensor() is not None for tensor in kept)
        del tree
        assert [tensor() for tensor in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_options_that_need_absent_packages_or_names(tmp_path: Path, monkeypatch) -> None:
    folder = tiny.language_model(tmp_path, 1, pieces=True)
    with pytest.raises(ValueError, match="quantization must be one of"):
        CausalLm.from_pretrained(folder, quantization="3bit")
    for package, name in (("bitsandbytes", "4bit"), ("torchao", "int8")):
        for file in ("loading", "quantization"):
            monkeypatch.setattr(f"icefall_fusion.lm.{file}.find_spec", lambda asked: None)
        with pytest.raises(ImportError, match=f"needs {package}: pip install {package}"):
            CausalLm.from_pretrained(folder, quantization=name)
    monkeypatch.undo()
    assert CausalLm.from_pretrained(folder, device_map={"": "cpu"}).log_prob("the cat") < 0


@pytest.mark.parametrize(("name", "package", "least", "most"), [
    ("8bit", "bitsandbytes", 0.25, 0.45), ("4bit", "bitsandbytes", 0.14, 0.35),
    ("int8", "torchao", 0.25, 0.45),
])
def test_quantized_weights_are_small_and_score_alike_by_tree_and_plainly(
    tmp_path: Path, name: str, package: str, least: float, most: float
) -> None:
    pytest.importorskip(package)
    folder = tiny.language_model(tmp_path, 1, pieces=True)
    config = transformers.LlamaConfig(
        vocab_size=tiny.piece_count(), hidden_size=64, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=1, eos_token_id=1,
    )
    torch.manual_seed(2)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    exact = CausalLm.from_pretrained(folder)
    lm = CausalLm.from_pretrained(folder, quantization=name)
    assert least < weight_bytes(lm.model) / weight_bytes(exact.model) < most
    texts = ["the cat sat on the mat", "the cat met a dog", "we saw the sea"]
    found, without = lm.log_probs(texts, eos=True), exact.log_probs(texts, eos=True)
    plain = [sum(lm.token_log_probs([lm.encode(text)], eos=True)[0]) for text in texts]
    assert found == pytest.approx(plain, abs=0.05)
    assert found == pytest.approx(without, rel=0.02) and found != without


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gpt2"])
def test_the_tree_on_a_gpu_equals_the_cpu(name: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        lm = CausalLm(random_model(name).to(device), Vocabulary(None, None, 1, 2), name)
        scorer = lm.open_tree(3)
        paths = [[b, 7, 3 * b] for b in range(6)]
        nodes = torch.tensor([scorer.insert(scorer.root(b % 3), path) for b, path in enumerate(paths)])
        nodes = nodes.to(device)
        results.append(scorer.score(nodes).cpu())
        results[-1] = torch.cat([results[-1], scorer.next_log_probs(nodes[:2]).cpu().flatten()])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
