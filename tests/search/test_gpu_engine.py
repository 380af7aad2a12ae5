"""The prefix search by a GPU kernel: the same as by tensors. Without a GPU, Triton's interpreter runs it.
Knows: search, fusions, tiny language models. Must not know: trained models.
"""
from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.fusion import AtEnd, DelayedFusion, FixedInterval, LookAhead, NgramFusion, ShallowFusion
from icefall_fusion.fusion import ShortestHypothesis as Shortest
from icefall_fusion.fusion.hotwords import HotWordFusion
from icefall_fusion.ngram.piece_ngram import NgramOrder, PieceNgram
from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search, engines
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines import gpu, gpu_check, gpu_ngram, native
from icefall_fusion.search.engines.base import plan_frames
from icefall_fusion.search.fusion import FusionSet
from icefall_fusion.search.search_input import check_input
from tests.fusion.test_fusion import assert_same as assert_same_scores
from tests.fusion.test_fusion import emissions, llm, nlm, tokens  # noqa: F401 (fixtures)
from tests.ngram.test_ngram import ngram  # noqa: F401 (a fixture)
from tests.search_tools import TOKENS, WordLengths, assert_near, assert_same, listing
from tests.search_tools import emissions as small

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def decode(engine, log_probs, lens, tokens=None, fusions=(), beam=4, **options):  # noqa: F811
    chosen = PrefixSearchOptions(beam=beam, engine=engine, **options)
    return ctc_prefix_search(log_probs.to(DEVICE), lens.to(DEVICE), chosen, tokens, fusions)


@pytest.mark.parametrize(
    ("beam", "options"),
    [
        (1, {}), (4, {}), (10, {}), (33, {}), (1, {"blank_skip": 0.8}), (10, {"blank_skip": 0.8}),
        (4, {"score_beam": 2.0}), (10, {"score_beam": 2.0}), (4, {"top_pieces": 3}),
    ], ids=str,
)
def test_equals_the_search_by_tensors(beam, options):
    log_probs = small(beam, 3, 14, 18, 2.5, 3.0)
    never = torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(beam)) < 0.2
    never[..., 0] = False
    log_probs = log_probs.masked_fill(never, -math.inf)
    lens = torch.tensor([14, 9, 0])
    nbests = [decode(engine, log_probs, lens, beam=beam, **options) for engine in ("triton", "torch")]
    for kernel, tensors in zip(*nbests):
        kernel, tensors = listing(kernel), listing(tensors)
        most = max(1, min(len(kernel), len(tensors)) - 1)  # the last may tie with one that is not there
        scores = [[score for _, score in rows][:most] for rows in (kernel, tensors)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3)
        assert abs(len(kernel) - len(tensors)) <= 1 and kernel[0][0] == tensors[0][0]


def test_more_than_62_columns():
    log_probs = small(3, 1, 7, 120, 0.3)
    lens, fusions = torch.tensor([7]), [WordLengths(0.0)]
    tokens = type(TOKENS).from_pieces(["<blk>", *(f"▁{i}" for i in range(119))], 0)  # noqa: F811
    ranked = [WordLengths(0.1, 0.0, 2)]
    for one in (fusions, ranked):
        kernel, tensors = (decode(e, log_probs, lens, tokens, one, beam=40) for e in ("triton", "torch"))
        best = [[h.total for h in nbest[0]][:39] for nbest in (kernel, tensors)]
        assert best[0] == pytest.approx(best[1], abs=1e-3)


def test_many_frames_do_not_run_out_of_numbers():
    log_probs = small(7, 1, 150, 6, 1.0)
    lens = torch.tensor([150])
    kernel, tensors = (decode(engine, log_probs, lens, beam=2) for engine in ("triton", "torch"))
    assert_same(listing(kernel[0]), listing(tensors[0]), 1e-3)


@pytest.mark.parametrize(
    ("trigger", "every", "late"),
    [
        (AtEnd(), None, 0), (AtEnd(), 3, 0), (FixedInterval(3), 1, 0), (FixedInterval(3), 2, 3),
        (Shortest(), None, 0), (Shortest(), 1, 0), (Shortest(), 1, 2), (Shortest(), 2, 3),
        (Shortest("pieces", 2), None, 0), (Shortest("pieces", 2), 3, 0), (Shortest("pieces", 2), 1, 2),
    ], ids=str,
)
def test_delayed_fusion_equals_that_by_tensors(llm, ngram, tokens, trigger, every, late):  # noqa: F811
    log_probs, lens = emissions(batch=2, frames=14, seed=3, peak=2.0)
    nbests = []
    for engine in ("triton", "torch"):
        look = None if every is None else LookAhead(ngram, 0.6, every)
        fusion = DelayedFusion(llm, 0.4, 0.5, trigger, look_ahead=look, late=late)
        nbests.append(decode(engine, log_probs, lens, tokens, [fusion]))
    assert_same_scores(*nbests, 1e-3)


@pytest.mark.parametrize(
    ("weight", "bonus", "delayed"),
    [(0.4, 0.3, None), (0.4, 0.3, 0.4), (0.0, 0.0, 0.4), (0.0, 0.0, 0.0), (3.0, -1.0, 0.4)],
)
def test_an_ngram_joins_as_by_tensors(llm, ngram, tokens, weight, bonus, delayed):  # noqa: F811
    log_probs, lens = emissions(batch=2, frames=9, seed=4, peak=2.0)
    nbests = []
    for engine in ("triton", "torch"):
        fusions = [NgramFusion(ngram, weight, bonus)]
        if delayed is not None:
            fusions.append(DelayedFusion(llm, delayed, 0.5 * (delayed > 0), Shortest()))
        nbests.append(decode(engine, log_probs, lens, tokens, fusions))
    assert_same_scores(*nbests, 1e-3)


def test_fusions_without_a_stop_rule_and_weights_of_zero(llm, tokens):  # noqa: F811
    log_probs, lens = small(5, 2, 12, 6, blank_bias=2.0), torch.tensor([12, 7])
    kernel, tensors = (
        decode(engine, log_probs, lens, TOKENS, [WordLengths(0.3, 0.2, 3)]) for engine in ("triton", "torch")
    )
    assert_same_scores(kernel, tensors, 1e-3)
    log_probs, lens = emissions(batch=2, frames=12, seed=1)
    bare = decode("triton", log_probs, lens, tokens)
    fused = decode("triton", log_probs, lens, tokens, [DelayedFusion(llm, 0.0, 0.0, FixedInterval(4))])
    for one, other in zip(bare, fused):
        assert [(h.tokens, h.scores["ctc"], h.total, h.times) for h in one] == [
            (h.tokens, h.scores["ctc"], h.total, h.times) for h in other
        ]


def test_the_table_of_an_ngram_has_all_of_it(ngram):  # noqa: F811
    table = gpu_ngram.table_of(ngram, torch.device("cpu"))
    assert gpu_ngram.table_of(ngram, torch.device("cpu")) is table
    first, *longer = ngram.orders
    assert torch.equal(table.first_score, first.log_probs)
    assert torch.equal(table.first_backoff, first.backoffs)
    _check_table(table, {
        key * 16 + order.length: (log_prob, backoff)
        for order in longer for key, log_prob, backoff in zip(*(x.tolist() for x in order.tensors()[:3]))
    })


def _check_table(table, expected):
    cells = {int(key): cell for cell, key in enumerate(table.key.tolist()) if key >= 0}
    assert cells.keys() == expected.keys()
    for key, cell in cells.items():
        buckets = [int(bucket) for bucket in gpu_ngram.buckets_of(torch.tensor([key]), table.mask)]
        assert cell // gpu_ngram.BUCKET in buckets
        assert (float(table.score[cell]), float(table.backoff[cell])) == expected[key]


@pytest.mark.parametrize("count", [0, 1, 14, 15, 1400, 7000])
def test_the_table_of_an_ngram_is_nearly_full(count):
    """Up to 7/8 of the cells hold n-grams, also where the keys of all are numbers in a row."""
    base = 102
    keys = torch.arange(count)
    orders = [NgramOrder(1, torch.arange(base), torch.zeros(base), torch.zeros(base))]
    orders.append(NgramOrder(2, keys, -torch.rand(count), torch.rand(count)))
    table = gpu_ngram.table_of(PieceNgram(base - 2, orders), torch.device("cpu"))
    values = zip(*(x.tolist() for x in orders[1].tensors()[:3]))
    _check_table(table, {key * 16 + 2: (log_prob, backoff) for key, log_prob, backoff in values})
    if count > 1000:
        assert count / len(table.key) > 0.4


def test_a_search_that_it_does_not_serve_is_refused(llm, nlm, ngram, tokens, monkeypatch):  # noqa: F811
    log_probs, lens = emissions(batch=1, frames=5)
    for why, options, fusions in (
        ("its beam is at most 62, here 63", {"beam": 63}, []),
        ("it cannot recover mass", {"recover_mass": True}, []),
        (r"it has no shallow fusion but that of one n-gram .* \(nlm\)", {}, [ShallowFusion(nlm, 0.3)]),
        (
            "it has one n-gram, for shallow fusion or for look-ahead",
            {},
            [NgramFusion(ngram, 0.3), DelayedFusion(llm, 0.4, look_ahead=LookAhead(ngram))],
        ),
    ):
        with pytest.raises(ValueError, match=f"PrefixSearchOptions.engine must be auto or torch: {why}"):
            decode("triton", log_probs, lens, tokens, fusions, **options)
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="it is for cuda, the log-probs are on cpu"):
            decode("triton", log_probs, lens)


@pytest.mark.parametrize("form", gpu_check.trials())
def test_a_device_is_tried_before_a_search_relies_on_it(form):
    gpu_check.check_kernel.cache_clear()
    gpu_check.check_kernel(torch.device(DEVICE), form)


def _another_weight(search):
    *before, table, phrases, late, state = search._before
    tables = (one._replace(weight=3 * one.weight) for one in (table, phrases))
    search._before = (*before, *tables, late, state)


@pytest.mark.parametrize(
    ("form", "spoil"),
    [
        ("alone", lambda search: search.state.mass.total.sub_(0.5)),
        ("pieces", lambda search: search.state.counts.longest.add_(3)),
        ("ahead", _another_weight),
        ("ngram", _another_weight),
        ("phrases", _another_weight),
        ("phrases+ngram", _another_weight),
    ],
)
def test_a_trial_sees_a_wrong_kernel(form, spoil, monkeypatch):
    class Wrong(gpu.GpuSearch):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            spoil(self)

    monkeypatch.setattr(gpu_check, "GpuSearch", Wrong)
    with pytest.raises(RuntimeError, match="nats off those of tensors"):
        gpu_check.run_trial(form, torch.device(DEVICE))


def test_a_trial_that_fails_tells_why(monkeypatch, caplog):
    def broken(*arguments, **more):
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(gpu_check, "GpuSearch", broken)
    gpu_check.check_kernel.cache_clear()
    with pytest.raises(Unavailable, match="trial 'alone': RuntimeError: no such architecture") as raised:
        gpu_check.check_kernel(torch.device(DEVICE), "alone")
    causes = [type(raised.value.__cause__), type(raised.value.__cause__.__cause__)]
    assert causes == [Unavailable, RuntimeError]
    with pytest.raises(ValueError, match="name must be one of .*'ahead'.* 'other'"):
        gpu_check.run_trial("other", torch.device(DEVICE))
    gpu_check.check_kernel.cache_clear()


def test_what_a_search_needs_of_the_kernel(llm, ngram, tokens):  # noqa: F811
    log_probs, lens = emissions(batch=1, frames=5)
    pieces, look = Shortest("pieces", 2), LookAhead(ngram)
    for fusions, score_beam, form in (
        ([], None, "alone"),
        ([], 5.0, "pieces"),
        ([DelayedFusion(llm, 0.0, trigger=pieces)], None, "alone"),
        ([DelayedFusion(llm, 0.3)], None, "ranked"),
        ([DelayedFusion(llm, 0.3, trigger=pieces)], None, "pieces"),
        ([DelayedFusion(llm, 0.3, look_ahead=look)], None, "ahead"),
        ([NgramFusion(ngram, 0.0)], None, "ngram"),
        ([NgramFusion(ngram, 0.3), HotWordFusion(["sea"])], None, "phrases+ngram"),
        ([HotWordFusion(["sea"])], None, "phrases"),
    ):
        inputs, together = check_input(log_probs, lens, 0, tokens, None), FusionSet(fusions, tokens)
        starts_word = torch.tensor(tokens.starts_word)
        together.begin(Beam.at_root(inputs, 4, starts_word, len(fusions)), inputs.ids)
        assert gpu_check.form_of(together, score_beam) == form


def test_a_kernel_that_cannot_be_made_leaves_the_search_to_tensors(monkeypatch, caplog):
    log_probs, lens = small(1, 2, 8, 9), torch.tensor([8, 5])
    usual = decode("torch", log_probs, lens)

    def broken(self, until):
        raise RuntimeError("out of resource: shared memory")

    class NoKernel(gpu.GpuSearch):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.compile()

    monkeypatch.setattr(gpu.GpuSearch, "_launch", broken)
    monkeypatch.setattr(native, "NativeSearch", NoKernel)  # what auto takes on a CPU
    engines.tell.cache_clear()
    nbests = decode("auto", log_probs, lens)
    assert [listing(nbest) for nbest in nbests] == [listing(nbest) for nbest in usual]
    assert "out of resource" in caplog.text and "Traceback" in caplog.text
    with pytest.raises(ValueError, match="be auto or torch: .*out of resource"):
        decode("triton", log_probs, lens)


@pytest.mark.parametrize("beam", [4, 20, 33])  # the wider the beam, the fewer pieces are tried at once
def test_a_batch_without_words_and_with_an_ngram(beam):
    log_probs, lens = small(4, 2, 8, 40), torch.tensor([8, 5])

    bigram, trial = gpu_check._random_bigram().to(torch.device(DEVICE)), gpu_check.Trial(ngram="shallow")
    scores = [gpu_check._Scores(trial, bigram)]
    nbests = [decode(name, log_probs, lens, None, scores, beam) for name in ("triton", "torch")]
    for kernel, tensors in zip(*nbests):
        assert [h.total for h in kernel] == pytest.approx([h.total for h in tensors], abs=1e-3)


def test_what_a_search_shares_with_the_next_is_made_once(ngram, tokens, monkeypatch):  # noqa: F811
    def opened(frames):
        log_probs, lens = emissions(batch=2, frames=frames)
        inputs = check_input(log_probs.to(DEVICE), lens.to(DEVICE), 0, tokens, None)
        fusions = FusionSet([NgramFusion(ngram, 0.3)], tokens)
        beam = Beam.at_root(inputs, 4, torch.tensor(tokens.starts_word, device=DEVICE), 1)
        fusions.begin(beam, inputs.ids)
        plan = plan_frames(inputs, None, False)
        search = gpu.GpuSearch(inputs, plan, beam, PrefixSearchOptions(4), fusions)
        arguments = dict(zip(search.kernel.search_utterances.arg_names, search.arguments(1)))
        table = arguments["ngram"]
        return [arguments["slots"], arguments["columns"], arguments["pieces"].key,
                table.key, table.score, table.backoff, table.first_score, table.first_backoff]

    first, second = opened(7), opened(9)
    assert all(one is other for one, other in zip(first, second))
    monkeypatch.setattr(gpu, "make_pairs", None)
    monkeypatch.setattr(gpu_ngram, "_make_table", None)
    opened(8)


#: Fusions of a search: each needs a kernel of its own, and compiling one takes seconds.
FUSED = {
    "alone": lambda lm, grams: [],
    "words": lambda lm, grams: [DelayedFusion(lm, 0.4, 0.5, Shortest())],
    "ahead": lambda lm, grams: [DelayedFusion(lm, 0.4, 0.5, Shortest(), look_ahead=LookAhead(grams, 0.6))],
    "ngram": lambda lm, grams: [NgramFusion(grams, 0.3, 0.2), DelayedFusion(lm, 0.3, 0.5, Shortest())],
}


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("fused", "beam"), [*((name, 10) for name in FUSED), ("alone", 33), ("words", 33)]
)
def test_a_gpu_agrees_with_tensors_and_a_cpu(llm, ngram, tokens, fused, beam):  # noqa: F811
    """The kernels that a decode needs, compiled for the GPU. It has never run on one."""
    log_probs, lens = emissions(batch=8, frames=120, seed=5, peak=2.0)
    nbests = [
        decode(name, log_probs, lens, tokens, FUSED[fused](llm, ngram), beam) for name in ("triton", "torch")
    ]
    chosen = PrefixSearchOptions(beam=beam)
    nbests.append(ctc_prefix_search(log_probs, lens, chosen, tokens, FUSED[fused](llm, ngram)))
    for kernel, *others in zip(*nbests):
        for other in others:
            assert_near(*([(tuple(h.tokens), h.total) for h in nbest] for nbest in (kernel, other)), 1e-2)


@pytest.mark.parametrize("fused", FUSED)
def test_what_a_gpu_is_held_to_holds_between_engines_of_a_cpu(llm, ngram, tokens, fused):  # noqa: F811
    """By the same log-probs, so that the test above cannot fail for its data."""
    log_probs, lens = emissions(batch=8, frames=120, seed=5, peak=2.0)
    for beam in (10, 33):
        nbests = [
            ctc_prefix_search(log_probs, lens, PrefixSearchOptions(beam=beam, engine=engine), tokens,
                              FUSED[fused](llm, ngram))
            for engine in ("native", "torch")
        ]
        for one, other in zip(*nbests):
            assert_near(*([(tuple(h.tokens), h.total) for h in nbest] for nbest in (one, other)), 1e-2)


_COMPILE = """
from tools.bench.kernel_registers import compile_form, usage
for capability, beam, form in ((80, 10, "alone"), (90, 10, "alone"), (90, 50, "interval"), (90, 20, "ahead"),
                               (90, 10, "ngram+interval"), (90, 10, "phrases+ngram")):
    made, _, _ = compile_form(form, beam, None, 40, 3, 2, capability)
    for batch in (1, 3):
        again = compile_form(form, beam, None, 40, 3, batch, capability)[0]
        assert again is made, "batches of another size need another kernel"
    row = usage(made, capability)
    assert row["stored"] + row["loaded"] <= 64, f"{form} at beam {beam} spills: {row}"
    assert row["registers"] and row["instructions"] > 500, row
    print(capability, beam, form, row)
"""


def test_it_compiles_for_gpus_that_are_not_here(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    environment.update(TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=str(root))
    run = subprocess.run([sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.splitlines()) == 6
