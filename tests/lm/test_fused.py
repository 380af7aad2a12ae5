"""Fused kernels against transformers' own layers: the same logits for the same events; what they refuse.
Knows: CausalLm, tiny random models. Must not know: search, fusion.

Without a GPU the kernels run in Triton's interpreter (see conftest.py).
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")
from icefall_fusion.common.unavailable import Unavailable  # noqa: E402
from icefall_fusion.lm import CausalLm, tree_forward  # noqa: E402
from icefall_fusion.lm.fused import FusedModel  # noqa: E402
from icefall_fusion.lm.fused_loading import check_fusible, try_kernels, use_fused_kernels  # noqa: E402
from icefall_fusion.lm.loading import Vocabulary, check_tree  # noqa: E402
from tests.lm.test_causal_lm import SIZES, WINDOW, random_model  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-heads-of-6": ("LlamaConfig", {"hidden_size": 24, "num_key_value_heads": 4}),
    "mistral-window": ("MistralConfig", {"sliding_window": WINDOW, "num_key_value_heads": 1}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW,
                                     "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
}


def make(name: str) -> CausalLm:
    kind, options = FAMILIES[name]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**{**SIZES, "num_hidden_layers": 2, **options})
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))  # norms and biases too
    return CausalLm(model.to(DEVICE), Vocabulary(None, None, 1, 2), name, self_check=False)


def scores_of(lm: CausalLm) -> list[torch.Tensor]:
    """Return scores and distributions of events with branches, prompts, dead ends and reused slots."""
    scorer = lm.open_tree(3, [[5, 6, 7], [], [9]])
    found, generator = [], torch.Generator().manual_seed(1)
    alive = [[[]], [[]], [[]]]
    for utterances in ((0, 1, 2), (1,), (0, 2), (0, 1, 2)):
        nodes = []
        for b in utterances:
            alive[b] = [
                path + torch.randint(3, 97, (more,), generator=generator).tolist()
                for path in alive[b][:2] for more in (1, 0, 3)
            ]
            nodes += [scorer.insert(scorer.root(b), path) for path in alive[b]]
        found.append(scorer.score(nodes, eos=True).cpu())
        found.append(scorer.next_log_probs(nodes[:2]).cpu())
        scorer.keep([scorer.insert(scorer.root(b), path) for b in range(3) for path in alive[b][:2]])
    return found


@pytest.mark.gpu  # there it is another test: compiled
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_transformers_layers(name: str) -> None:
    lm = make(name)
    lm.fused = None
    plain = {key: value.clone() for key, value in lm.model.state_dict().items()}
    want = scores_of(lm)
    check_fusible(lm.model)
    lm.fused = FusedModel(lm.model)
    try_kernels(lm.fused)
    for found, wanted in zip(scores_of(lm), want):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    check_tree(lm)
    joined = lm.model.state_dict()
    assert all(torch.equal(joined[key], value) for key, value in plain.items())
    attention = lm.model.model.layers[0].self_attn
    assert attention.k_proj.weight.data_ptr() > attention.q_proj.weight.data_ptr()  # nothing is held twice
    shared = attention.k_proj.weight.untyped_storage().data_ptr()
    assert shared == attention.q_proj.weight.untyped_storage().data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8, 12])
def test_all_forms_of_attention_are_tried_before_they_are_relied_on(monkeypatch, size) -> None:
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "head_dim": size})
    model = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE, torch.float16)
    fused, forms, launch = FusedModel(model), set(), FusedModel.look
    monkeypatch.setattr(
        FusedModel, "look",
        lambda self, queries, event, *others: (
            forms.add(self.lines(event.width, queries.dtype)), launch(self, queries, event, *others)
        )[1],
    )
    try_kernels(fused)
    assert forms == ({16, 32, 64} if size == 8 else {16, 32})
    monkeypatch.setattr(FusedModel, "look", lambda self, *given: launch(self, *given) * 1.1)
    with pytest.raises(RuntimeError, match="attention of 16 queries at once is .* off"):
        try_kernels(fused)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_is_near_single_precision(dtype) -> None:
    lm = make("llama")
    assert lm.fused is not None  # chosen by itself on a GPU
    want = scores_of(lm)
    model = make("llama").model.to(dtype)
    half = CausalLm(model, Vocabulary(None, None, 1, 2), "half")
    assert half.fused is not None
    for found, wanted in zip(scores_of(half)[::2], want[::2]):
        torch.testing.assert_close(found, wanted, atol=0.5, rtol=0.05)


@pytest.mark.parametrize("device, bucket", [("cpu", 8), ("cuda", 64)])
def test_padded_tokens_change_nothing(monkeypatch, device, bucket) -> None:
    assert tree_forward.token_bucket(torch.device(device)) == bucket
    lm, sizes, logits = make("llama"), [], CausalLm.tree_logits
    lm.fused = None
    monkeypatch.setattr(tree_forward, "token_bucket", lambda device: 1)
    want = scores_of(lm)
    monkeypatch.setattr(tree_forward, "token_bucket", lambda device: bucket)
    monkeypatch.setattr(
        CausalLm, "tree_logits",
        lambda self, tokens, *others: (sizes.append(len(tokens)), logits(self, tokens, *others))[1],
    )
    for found, wanted in zip(scores_of(lm), want):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert sizes and not any(size % bucket for size in sizes)


def test_what_the_kernels_cannot_do_is_said(monkeypatch) -> None:
    def refused(model, why):
        with pytest.raises(Unavailable, match=re.escape(why)):
            check_fusible(model)

    refused(random_model("olmo2"), "Olmo2ForCausalLM is none of")
    model = random_model("llama")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE == "cpu":
        refused(model, "it is not on a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_fusible(model)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:1]
    refused(model, "only some dimensions of each head have rotary positions")
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(SIZES["hidden_size"], 8)  # a shard of it
    refused(model, "its heads have 8 entries and weights of [(8, 32), ")
    model.model.layers[1].mlp.down_proj = torch.nn.Bilinear(2, 2, 2)
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(SIZES["hidden_size"], 32)
    refused(model, "its layers are quantized or have adapters (Bilinear)")
    model.model.layers[0].mlp.down_proj.to(torch.bfloat16)
    refused(model, "several")


def test_what_fails_on_a_gpu_is_told_and_transformers_runs(monkeypatch, caplog) -> None:
    lm = make("llama")
    want = scores_of(lm)
    monkeypatch.setattr(FusedModel, "_gate", lambda self, mixed: mixed[:, : self.inner] * 2)
    failure = use_fused_kernels(lm)
    assert lm.fused is None and "fused kernels fail" in caplog.text and "ValueError: model" in caplog.text
    assert failure.startswith("Traceback") and failure in caplog.text
    for found, wanted in zip(scores_of(lm), want):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("where", ["_gate", "look"])
def test_memory_that_runs_out_is_not_a_failure_of_kernels(monkeypatch, caplog, where) -> None:
    def fail(*given):
        raise torch.OutOfMemoryError("no memory")

    lm = make("llama")
    monkeypatch.setattr(FusedModel, where, fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        use_fused_kernels(lm)
    assert lm.fused is None and not caplog.text


def test_a_model_of_another_kind_says_why_it_is_not_fused() -> None:
    lm = CausalLm(random_model("olmo2"), Vocabulary(None, None, 1, 2), "olmo2", self_check=False)
    assert use_fused_kernels(lm).startswith("Olmo2ForCausalLM is none of") and lm.fused is None


_COMPILE = """
from icefall_fusion.lm import fused_kernels
from tests.kernel_tools import compile_kernel, resources

WIDE = "*i64"
for capability in (80, 90):
    def tell(name, *others):
        made = resources(compile_kernel(getattr(fused_kernels, name), *others, capability))
        print(name, capability, made.shared, made.registers, made.spilled)

    for kind, forms in (("*bf16", (16, 32, 64)), ("*fp32", (16,))):
        tell("add_and_norm", (*[kind] * 4, "i32", "fp32"), {"ADD": 1, "BLOCK": 4096}, {"num_warps": 8})
        tell("add_and_norm", (kind, "*fp32", kind, kind, "i32", "fp32"), {"ADD": 8, "BLOCK": 4096},
             {"num_warps": 8})
        tell("silu_and_multiply", (kind, kind, "i32"), {"BLOCK": 1024}, {})
        for heads, key_heads, size, padded, norms in ((32, 8, 128, 64, kind), (32, 32, 100, 128, None)):
            rotate = (kind if norms else "*fp32", kind, kind, norms, norms, WIDE, WIDE, kind, "i32", "fp32")
            sizes = {"PARTS": 1 if norms else 4, "NORM": norms is not None, "Q": heads, "H": key_heads,
                     "D": size, "HEADS": padded, "DP": 128}
            tell("rotate_and_store", rotate, sizes, {"num_warps": 8})
            for lines in forms[:2] if size == 100 else forms:
                looked = (kind, WIDE, WIDE, "*i32", kind, "fp32", "i32", "i32")
                sizes = {"H": key_heads, "G": heads // key_heads, "D": size, "DP": 128, "M": lines,
                         "N": 32 if kind == "*fp32" else 64}
                tell("attend", looked, sizes, {"num_warps": 4, "num_stages": 2})
"""


def compiled_here(program: str, folder: Path) -> list[list[str]]:
    """Return the words of each line of a program that compiles kernels; what it compiled is not kept."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    environment.update(TRITON_CACHE_DIR=str(folder), PYTHONPATH=str(root))
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [line.split() for line in run.stdout.splitlines()]


def test_they_compile_for_gpus_that_are_not_here(tmp_path) -> None:
    lines = compiled_here(_COMPILE, tmp_path)
    assert len(lines) == 34
    for name, capability, shared, _, spilled in lines:
        assert int(shared) < 100_000 and int(spilled) <= (32 if capability == "80" else 0), (name, spilled)
