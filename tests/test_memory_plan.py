"""The memory plan against what models, caches and a decode really hold.
Knows: tiny models, run.json. Must not know: how a decode works.
"""
from __future__ import annotations

import json

import pytest
import tiny
import torch
import transformers

from icefall_fusion.__main__ import main
from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.vocabulary import Vocabulary
from icefall_fusion.lms import LmOptions, Lms
from icefall_fusion.memory_plan import describe_plan, plan_memory, weight_bytes

SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 40}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Llama", {"num_key_value_heads": 2}),
        ("GPTNeoX", {}),
        ("GPT2", {}),
        ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    ],
)
def test_bytes_of_a_token_are_those_of_the_tree_cache(family, more, dtype):
    config = getattr(transformers, f"{family}Config")(intermediate_size=32, **SHAPE, **more)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    lm = CausalLm(model, Vocabulary(None, None, 0, 1), family, self_check=False)
    tree = lm.open_tree(2)
    tree.score([tree.insert(tree.root(row), [3, 5, 7]) for row in range(2)])
    slots = tree.tree.slots.capacity
    assert tree.stats()["kv_bytes_peak"] == 2 * slots * lm.kv_bytes_a_token


def test_a_plan_adds_up_and_a_run_records_it(tmp_path):
    made = tiny.everything(tmp_path / "models")
    lm = CausalLm.from_pretrained(made["llm"])
    plan = plan_memory(None, {"llm": lm}, ((4, 10.0), (1, 60.0)), beam=5)
    part = plan["llm"]
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    assert part["weights"] >= sum(t.numel() * 4 for t in tensors) * 0.9
    assert part["kv"] == 4 * 128 * part["kv_a_token"]  # 10 s of speech and a beam of 5: 120 tokens
    assert part["distributions"] == 4 * 5 * 4 * lm.vocab_size
    assert plan["total"] == part["weights"] + part["kv"] + part["distributions"] and plan["free"] == {}
    assert "llm" in describe_plan(plan) and "acoustic model 0 MB" in describe_plan(plan)
    models = ["--emissions.model", made["model"], "--llm.path", made["llm"]]
    out = tmp_path / "out"
    methods = "llm-delayed-shortest,nlm-nbest-rescoring"
    models += ["--nlm.path", made["nlm"]]
    what = ["--test_sets.noise", made["cuts"], "--methods", methods, "--out", str(out)]
    assert main(["decode", *models, *what]) == 0
    record = json.loads((out / "run.json").read_text())
    planned = record["memory_plan"]
    assert planned["acoustic_weights"] > 0 and planned["nlm"]["weights"] > 0
    assert planned["llm"]["weights"] == part["weights"]
    stages = record["test_sets"]["noise"]["llm-delayed-shortest"]["stages"]
    assert 0 < stages["kv_bytes_peak"] < planned["llm"]["kv"]  # short utterances


def test_tied_weights_count_once():
    layer = torch.nn.Linear(4, 4, bias=False)
    assert weight_bytes(torch.nn.ModuleList([layer, layer])) == 64


def test_unused_models_are_counted_as_the_plan_counts_them(tmp_path):
    folders = {name: tiny.language_model(tmp_path / name, 3, pieces=True) for name in ("nlm", "llm")}
    lms = Lms({name: LmOptions(str(folder)) for name, folder in folders.items()}, "cpu")
    weights = {name: weight_bytes(lms.get(name).model) for name in folders}
    assert lms.unused_bytes(["nlm"]) == weights["llm"] > 0
    assert lms.unused_bytes([]) == sum(weights.values()) and lms.unused_bytes(["nlm", "llm", "ctc"]) == 0
