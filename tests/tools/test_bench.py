"""The benchmarks measure what they say: all ways to score an LLM's events agree, fits and sums are right.
Knows: tools/bench as modules. Must not know: times.
"""
from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import random
import runpy
import time
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.lm.loading import Vocabulary  # noqa: E402

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench"


@pytest.fixture(scope="module")
def llm_tree():
    return runpy.run_path(str(BENCH / "llm_tree.py"))


@pytest.fixture(scope="module")
def lm() -> CausalLm:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    return CausalLm(model, Vocabulary(None, None, 1, 2), "tiny", self_check=False)


def random_events(event, seed: int, count: int = 6):
    """Beams of two utterances that grow, part and now and then lose their last tokens."""
    generator = random.Random(seed)
    beams = [[()], [()]]
    for number in range(count):
        utterances, paths = [], []
        for utterance, beam in enumerate(beams):
            grown = []
            for _ in range(4):
                path = generator.choice(beam)
                if generator.random() < 0.2:
                    path = path[:-1]
                grown.append(path + tuple(generator.randrange(3, 40) for _ in range(generator.randrange(3))))
            beams[utterance] = grown
            utterances += [utterance] * len(grown)
            paths += grown
        yield event(utterances, paths, number == count - 1)


@pytest.mark.parametrize("seed", range(4))
def test_all_ways_to_score_events_agree(llm_tree, lm, seed) -> None:
    events = list(random_events(llm_tree["Event"], seed))
    found = {}
    for way in llm_tree["WAYS"]:
        attention = lm.model.config._attn_implementation
        if way in ("full texts", "path caches"):
            lm.model.set_attn_implementation("sdpa")
        row, scores = llm_tree["replay"](way, lm, [(2, events)], "cpu")
        lm.model.set_attn_implementation(attention)
        found[way] = torch.cat(scores)
        assert row["events"] == len(events) and row["tokens_forwarded"] > 0
    for way, scores in found.items():
        assert scores.tolist() == pytest.approx(found["full texts"].tolist(), abs=1e-4), way


def test_exponents_are_those_of_powers() -> None:
    exponent = runpy.run_path(str(BENCH / "scaling.py"))["exponent"]
    for power in (0.0, 0.5, 1.0, 2.0):
        assert exponent([5, 10, 40], [3 * size**power for size in (5, 10, 40)]) == pytest.approx(power)


def test_rows_of_several_sets_are_put_together() -> None:
    compare = runpy.run_path(str(BENCH / "fusion.py"))["compare"]
    found = [
        {"method": method, "wer": wer, "words": words, "search_seconds": 1.0, "lm_seconds": lm,
         "audio_seconds": 10.0, "kv_bytes_peak": 8, "peak_memory_bytes": 5}
        for method, wer, words, lm in [("llm-shallow", 10.0, 100, 5.0), ("other", 20.0, 100, 1.0),
                                       ("llm-shallow", 40.0, 50, 3.0), ("other", 50.0, 50, 1.0)]
    ]
    shallow, other = compare(found, ["llm-shallow", "other"], 10, 32)
    assert shallow["wer"] == pytest.approx(20.0) and other["wer"] == pytest.approx(30.0)
    assert other["times_faster"] == pytest.approx(10.0 / 4.0) and shallow["times_faster"] == 1
    assert other["rtf"] == pytest.approx(0.2)


def test_the_frame_loop_stops_as_often_as_asked_and_says_what_does_not_serve() -> None:
    bench = runpy.run_path(str(BENCH / "frame_loop.py"))
    args = argparse.Namespace(device="cpu", frames=24, rounds=1)
    row = bench["measure"](args, "native", 3, 4, 8)
    assert row["loop_us"] > 0 and row["whole_us"] > 0 and row["prepare_us"] > 0
    assert "PrefixSearchOptions.engine must be" in bench["measure"](args, "triton", 3, 70, 0)["missing"]
    stopped = []
    fusion = bench["Stops"](8)
    fusion.fuse_now = lambda beam, fires: stopped.append(fires.tolist())
    log_probs = torch.randn(2, 24, 9).log_softmax(-1)
    bench["ctc_prefix_search"](log_probs, torch.tensor([24, 10]), fusions=[fusion], blank_id=0)
    assert stopped == [[True, True], [True, False], [True, False]]


def test_host_time_is_that_of_events_without_the_device() -> None:
    clock = runpy.run_path(str(BENCH / "host.py"))["Clock"]()
    spent = []

    def busy() -> None:
        begun = time.thread_time()
        while time.thread_time() - begun < 0.02:
            pass
        spent.append(1)

    on_device = clock.wrap(busy, True)
    on_device()  # the end of an utterance is no event
    clock.wrap(lambda: (busy(), on_device()), False)()
    assert len(spent) == 3 and 0.02 <= clock.device < clock.events - 0.019


def test_a_shape_has_random_weights_and_the_folders_tokenizer(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import shapes

    tiny = {"kind": "Llama", "vocab_size": 9000, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    folder = shapes.FOLDER / "matched_llm"
    usual = CausalLm.from_pretrained(folder)
    with shapes.of_shape("tiny"):
        lm = CausalLm.from_pretrained(str(folder), dtype=torch.bfloat16, device="cpu", device_map=None)
    assert (lm.vocab_size, lm.layers, lm.model.dtype) == (9000, 1, torch.bfloat16)
    assert (lm.bos_id, lm.eos_id, lm.encode("a word")) == (usual.bos_id, usual.eos_id, usual.encode("a word"))
    assert CausalLm.from_pretrained(folder).layers == usual.layers


PROGRAMS = sorted(p for folder in ("tools", "egs") for p in BENCH.parents[1].joinpath(folder).rglob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_what_a_program_imports_of_the_package_is_there(path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "icefall_fusion":
            module = importlib.import_module(node.module)
            for alias in node.names:
                inside = hasattr(module, "__path__") and f"{node.module}.{alias.name}"
                there = hasattr(module, alias.name) or (inside and importlib.util.find_spec(inside))
                assert there, f"{path.name} imports {alias.name}, which {node.module} does not have"
