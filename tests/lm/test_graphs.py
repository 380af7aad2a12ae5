"""Events on static buffers against the plain path; what is kept, what goes, what fails.
Knows: graphs.py, fused layers, tiny random models. Must not know: search, fusion.

No graph was ever captured on a GPU. Without one the same class runs each event on its static buffer without
a capture; kernels run in Triton's interpreter (see conftest.py).
"""
from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")
from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.fused import FusedModel
from icefall_fusion.lm.fused_loading import use_graphs
from icefall_fusion.lm.graphs import EventGraphs, GraphCapture, graphs_of
from tests.lm.test_fused import DEVICE, make, scores_of


def fused(name: str) -> CausalLm:
    lm = make(name)
    lm.fused = FusedModel(lm.model)
    return lm


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("after, most", [(0, 32), (1, 1)])
def test_static_buffers_change_no_score(name, after, most) -> None:
    lm = fused(name)
    want = scores_of(lm)
    lm.fused.graphs = EventGraphs(lm.fused.logits, None, most, after)
    for _ in range(2):  # another tree with other buffers: what was kept serves it too
        for found, wanted in zip(scores_of(lm), want):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    graphs = lm.fused.graphs
    assert 0 < len(graphs._kept) <= most and graphs.failure is None
    assert graphs.captured == len(graphs._kept) if most == 32 else graphs.captured > most
    assert graphs.replayed > graphs.captured or most == 1


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_graphs_on_a_gpu_change_no_score(name) -> None:
    lm = fused(name)
    want = scores_of(lm)
    lm.fused.graphs = graphs_of(lm.fused)
    for _ in range(3):
        for found, wanted in zip(scores_of(lm), want):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)  # other sizes, other kernels
    assert lm.fused.graphs.failure is None and lm.fused.graphs.replayed > 0


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_capture_that_fails_is_told_once_and_each_kernel_is_launched(caplog, kind) -> None:
    class Fails:
        device = torch.device("cpu")

        def __call__(self, work):
            raise kind("operation not permitted when stream is capturing")

    lm = fused("llama")
    want = scores_of(lm)
    lm.fused.graphs = EventGraphs(lm.fused.logits, Fails(), after=0)
    lm.fused.graphs._take_turns = lambda: None  # there are no streams here
    for found, wanted in zip(scores_of(lm), want):
        assert torch.equal(found, wanted)
    assert caplog.text.count("no CUDA graphs") == 1 and "not permitted" in lm.fused.graphs.failure
    assert lm.fused.graphs.replayed == 0


def test_a_graph_that_goes_waits_for_its_own_device(monkeypatch) -> None:
    class Captures:
        device = torch.device("cpu")

        def __call__(self, work):
            return work

    lm, waited = fused("llama"), []
    lm.fused.graphs = EventGraphs(lm.fused.logits, Captures(), most=1, after=0)
    lm.fused.graphs._take_turns = lambda: None  # there are no streams here
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    scores_of(lm)
    assert waited and set(waited) == {Captures.device}


def test_what_fails_before_a_capture_is_waited_for(monkeypatch) -> None:
    class Stream:
        waits = 0

        def wait_stream(self, other):
            pass

        def synchronize(self):
            self.waits += 1

    def work():
        raise torch.OutOfMemoryError("no memory")

    for name, value in (("current_stream", lambda device: Stream()), ("CUDAGraph", object),
                        ("device", contextlib.nullcontext), ("stream", contextlib.nullcontext)):
        monkeypatch.setattr(torch.cuda, name, value)
    capture = GraphCapture.__new__(GraphCapture)
    capture.device, capture._stream, capture._pool = torch.device("cpu"), Stream(), None
    with pytest.raises(torch.OutOfMemoryError):
        capture(work)
    assert capture._stream.waits == 1


def test_memory_that_runs_out_is_not_swallowed() -> None:
    def run(event):
        raise torch.OutOfMemoryError("no memory")

    lm = fused("llama")
    lm.fused.graphs = EventGraphs(run, None, after=0)
    with pytest.raises(torch.OutOfMemoryError):
        scores_of(lm)


def test_weights_are_freed_with_their_model() -> None:
    lm = fused("llama")
    lm.fused.graphs = graphs_of(lm.fused)
    scores_of(lm)
    scores_of(lm)
    assert lm.fused.graphs.captured
    gone = weakref.ref(lm.fused)
    gc.disable()  # a collection would free circles, too
    try:
        lm.fused = None
        assert gone() is None
    finally:
        gc.enable()


def test_graphs_are_relied_on_when_scores_by_them_agree(monkeypatch, caplog) -> None:
    lm = fused("llama")
    use_graphs(lm)
    graphs = lm.fused.graphs
    assert graphs.after == 1 and graphs.replayed > graphs.captured > 0 and lm.fused.products.on
    logits = EventGraphs.logits

    def off(self, sizes, host):
        found = logits(self, sizes, host)
        return None if found is None else found.flip(0)

    with monkeypatch.context() as patch:
        patch.setattr(EventGraphs, "logits", off)
        use_graphs(lm)
    assert lm.fused.graphs is None and not lm.fused.products.on and "CUDA graphs fail" in caplog.text
    monkeypatch.setenv("ICEFALL_FUSION_WITHOUT_KERNELS", "icefall_fusion.lm.graphs")
    caplog.clear()
    use_graphs(lm)
    assert lm.fused.graphs is None and "switches icefall_fusion.lm.graphs off" in caplog.text
