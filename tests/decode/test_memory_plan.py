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
from icefall_fusion.decode.language_models import LmOptions, Lms
from icefall_fusion.decode.memory_plan import (
    BatchShape,
    MethodShape,
    describe_plan,
    plan_memory,
    weight_bytes,
)
from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.vocabulary import Vocabulary

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


def test_a_plan_adds_up(tmp_path):
    lm = CausalLm.from_pretrained(tiny.language_model(tmp_path, 3, pieces=False))
    shapes = [BatchShape(4, 10.0), BatchShape(1, 60.0), BatchShape(2, 2.0)]

    def of(*parts):
        return MethodShape(5, 5, parts)

    def plan(methods, encoder=lambda shape: (0, 0)):
        return plan_memory(None, {"llm": lm}, shapes, methods, encoder, held=10**6, ngram=7)

    greedy = plan({"ctc-greedy": of()}, lambda shape: (1000 * shape.rows, int(shape.seconds)))
    assert greedy["total"] == 10**6 + 4010 and greedy["largest"] == "the encoder, 4 of 10 s"
    delayed = plan({"a": of(("delayed", "llm")), "b": of()}, lambda shape: (1000, 1))
    part = delayed["llm"]
    assert part["weights"] == weight_bytes(lm.model) and delayed["ngram"] == 7 and delayed["free"] == {}
    assert part["kv"] == 4 * 128 * part["kv_a_token"]  # 10 s of speech and a beam of 5: 120 tokens
    assert part["forward"] >= 4 * 5 * 4 * lm.vocab_size  # a distribution for each slot
    assert delayed["total"] == 10**6 + 1000 + part["kv"] + part["forward"]
    assert delayed["largest"] == "a, 4 of 10 s" and delayed["inputs"] == 1000 and delayed["encoder"] == 1
    both = plan({"a": of(("delayed", "llm"), ("rescoring", "llm"))})
    rescored = plan({"a": of(("rescoring", "llm"))})
    assert both["total"] == max(delayed["total"] - 1000, rescored["total"])  # one after the other
    methods = {"a": of(("delayed", "llm"))}
    prompted = plan_memory(
        None, {"llm": lm}, shapes, methods, lambda _: (0, 0), 0, prompts={"llm": 9.0}
    )
    assert prompted["llm"]["kv"] == 2 * part["kv"]  # 129 tokens
    assert "the peak is about 1 MB" in describe_plan(greedy) and "llm" in describe_plan(greedy)


def test_a_run_records_plan_and_peak(tmp_path):
    made = tiny.everything(tmp_path / "models")
    models = ["--emissions.model", made["model"], "--llm.path", made["llm"], "--nlm.path", made["nlm"]]
    out, methods = tmp_path / "out", "llm-delayed-shortest,nlm-nbest-rescoring,attention-rescoring"
    what = ["--test_sets.noise", made["cuts"], "--methods", methods, "--out", str(out)]
    assert main(["decode", *models, *what]) == 0
    record = json.loads((out / "run.json").read_text())
    plan = record["memory"]["noise"]
    lm = CausalLm.from_pretrained(made["llm"])
    assert plan["acoustic_weights"] > 0 and plan["nlm"]["weights"] > 0
    assert plan["llm"]["weights"] == weight_bytes(lm.model)
    stages = record["test_sets"]["noise"]["llm-delayed-shortest"]["stages"]
    assert 0 < stages["kv_bytes_peak"] < plan["llm"]["kv"]  # short utterances
    assert plan["inputs"] > 0 and plan["total"] > plan["held"] + plan["gathered"]
    assert plan["peak"] > 0 and plan["largest"] != "nothing"
    assert main(["decode", *models, *what]) == 0  # nothing is left to do, so nothing to plan
    assert json.loads((out / "run.json").read_text())["memory"] == {}


def test_tied_weights_count_once():
    layer = torch.nn.Linear(4, 4, bias=False)
    assert weight_bytes(torch.nn.ModuleList([layer, layer])) == 64


def test_unused_models_are_counted_as_the_plan_counts_them(tmp_path):
    folders = {name: tiny.language_model(tmp_path / name, 3, pieces=True) for name in ("nlm", "llm")}
    lms = Lms({name: LmOptions(str(folder)) for name, folder in folders.items()}, "cpu")
    weights = {name: weight_bytes(lms.get(name).model) for name in folders}
    assert lms.unused_bytes(["nlm"]) == weights["llm"] > 0
    assert lms.unused_bytes([]) == sum(weights.values()) and lms.unused_bytes(["nlm", "llm", "ctc"]) == 0
