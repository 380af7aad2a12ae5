"""How often the host waits for a GPU from one fusion event to the next, counted without a GPU.
Knows: the GPU engine, delayed fusion, a CPU that passes for a GPU. Must not know: trained models.

The language model is on the CPU: counted is the search, and what fusion does with its tensors. The kernel
runs in Triton's interpreter. None of this has run on a GPU.
"""
from __future__ import annotations

import pytest
import torch

from icefall_fusion.fusion import AtEnd, DelayedFusion, FixedInterval, LookAhead, ShortestHypothesis
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
from icefall_fusion.search.engines import gpu, gpu_ngram
from icefall_fusion.search.engines.base import CompiledSearch
from tests.device_waits import OnDevice, Waits, inside
from tests.fusion.test_fusion import assert_same, emissions, llm, tokens  # noqa: F401 (fixtures)
from tests.ngram.test_ngram import ngram  # noqa: F401 (a fixture)

pytest.importorskip("triton")


class OnNoGpu(gpu.GpuSearch):
    """The engine with its kernel on the CPU's tensors; notes the waits at each stop."""

    def __init__(self, *arguments):
        super().__init__(*arguments, trusted=True)

    def _launch(self, until):
        arguments = inside(self.arguments(until))
        with torch.utils._python_dispatch._disable_current_modes():
            self.kernel.search_utterances[(self.beam.arena.batch,)](
                *arguments, form=self.form, num_warps=self.warps
            )


def count(monkeypatch, log_probs, lens, tokens, fusion):  # noqa: F811
    """Return the lists, and the waits from each launch of the kernel to the next; the last up to the end."""
    stops, search = [], CompiledSearch.steps
    with Waits() as waits:
        monkeypatch.setattr(gpu, "GpuSearch", OnNoGpu)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: waits)

        def noted(self):
            for _ in search(self):
                yield
            stops.append(len(waits.found))

        launch = OnNoGpu._search
        monkeypatch.setattr(OnNoGpu, "_search",
                            lambda self, until: (stops.append(len(waits.found)), launch(self, until))[1])
        monkeypatch.setattr(OnNoGpu, "steps", noted)
        options = PrefixSearchOptions(beam=4, groups=1, engine="triton", word_times=False)
        nbests = ctc_prefix_search(OnDevice(log_probs), lens, options, tokens, [fusion])
    return nbests, [waits.found[start:end] for start, end in zip(stops, stops[1:])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it counts without a GPU, in Triton's interpreter")
@pytest.mark.parametrize(
    ("trigger", "ahead", "late"),
    [(FixedInterval(4), False, 0), (ShortestHypothesis(), True, 0), (FixedInterval(4), False, 2),
     (AtEnd(), False, 0)],
    ids=repr,
)
def test_the_host_waits_once_from_event_to_event(
    llm, ngram, tokens, trigger, ahead, late, monkeypatch  # noqa: F811
):
    for name in ("_candidates", "hash_keys"):  # nothing is kept for this device
        monkeypatch.setattr(gpu, name, getattr(gpu, name).__wrapped__)
    log_probs, lens = emissions(2, 14, 3, 2.0)
    monkeypatch.setattr(gpu, "table_of", lambda ngram, device: gpu_ngram._make_table(ngram, device))
    look = LookAhead(ngram) if ahead else None
    fusion = DelayedFusion(llm, 0.5, 0.3, trigger, look_ahead=look, late=late)
    found, waits = count(monkeypatch, log_probs, lens, tokens, fusion)
    options = PrefixSearchOptions(beam=4, word_times=False)
    assert_same(found, ctc_prefix_search(log_probs, lens, options, tokens, [fusion]), 1e-3)
    assert len(waits) > (2 if not isinstance(trigger, AtEnd) else 0)
    for between in waits:  # what stands at a stop, its hypotheses and new prefixes come together
        assert between == ["_to_copy to the host"]
