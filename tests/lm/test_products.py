"""Matrix products by any tile against plain arithmetic; which form is chosen, and what is refused.
Knows: products.py, fused layers, Triton's interpreter and compiler. Must not know: times of a GPU.

None of this has run on a GPU yet. Here the kernels run in Triton's interpreter (see conftest.py), which knows
no bfloat16; for sm_90 they are compiled.
"""
from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("triton")
from icefall_fusion.lm import products
from icefall_fusion.lm.fused import FusedModel
from icefall_fusion.lm.products import (
    FORMS,
    GATED_FORMS,
    SPLITS,
    Form,
    Machine,
    Products,
    Shape,
    check_close,
    multiply,
)
from tests.lm.test_fused import DEVICE, compiled_here, make, scores_of

SMALL = (Form(16, 0, 16, 4, 2), Form(32, 16, 16, 4, 2), Form(16, 32, 32, 4, 2))
eights = st.integers(1, 20).map(lambda n: 8 * n)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gate(mixed: Tensor) -> Tensor:
    first, second = mixed.chunk(2, -1)
    return F.silu(first) * second


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 100), eights, eights, st.sampled_from(SMALL), st.sampled_from((1, 2, 3)), st.booleans())
def test_a_product_is_that_of_plain_arithmetic(count, width, size, form, split, half) -> None:
    dtype = torch.float16 if half else torch.float32
    rows, weights = random(1, count, size, dtype=dtype), random(2, width, size, dtype=dtype)
    found = multiply(rows, weights, form._replace(split=split))
    assert found.shape == ((count, width) if split == 1 else (split, count, width))
    assert found.dtype == (dtype if split == 1 else torch.float32)
    total = found if split == 1 else found.sum(0)
    wanted = rows.double() @ weights.double().T
    torch.testing.assert_close(total.double(), wanted, atol=2e-2 if half else 1e-4, rtol=2e-3)
    assert torch.equal(found, multiply(rows, weights, form._replace(split=split)))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 50), eights, eights)
def test_a_gated_product_is_that_of_plain_arithmetic(count, width, size) -> None:
    rows, weights = random(1, count, size), random(2, 2 * width, size) / 8
    found = multiply(rows, weights, Form(16, 0, 16, 4, 2, 1, True))
    wanted = gate(rows.double() @ weights.double().T)
    torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "llama-biases"])
def test_layers_score_the_same_by_other_forms(name, split) -> None:
    lm = make(name)
    lm.fused = None
    want = scores_of(lm)
    lm.fused = FusedModel(lm.model)
    used = []

    class Always(dict):
        def get(self, key):
            used.append(key[0])
            if key[0] == "gates":
                return Form(16, 0, 16, 4, 2, 1, split == 2)
            return None if key[0] == "last" else Form(16, 16, 16, 4, 2, split)  # 97 columns do not serve

    lm.fused.products.chosen = Always()
    for found, wanted in zip(scores_of(lm), want):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    assert set(used) == ({"last"} if name == "llama-biases" else {"heads", "output", "gates", "down", "last"})
    lm.fused.products.on = False
    del used[:]
    scores_of(lm)
    assert not used


def seconds_of(calls) -> float:
    begun = time.perf_counter()
    calls[0]()
    return time.perf_counter() - begun


WEIGHTS = {
    "down": (Shape(24, 64, parts=True), [random(3, 24, 64), random(4, 24, 64)]),
    "gates": (Shape(16, 64, gated=True), [random(5, 32, 64)]),
}


def test_the_fastest_form_is_chosen(monkeypatch) -> None:
    monkeypatch.setattr(products, "FORMS", SMALL)
    monkeypatch.setattr(products, "GATED_FORMS", (Form(16, 0, 16, 4, 2, 1, True),))
    tuned, times = Products(gate), iter([3.0, 4.0, 2.0, 5.0, 6.0, 7.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    tuned.tune(WEIGHTS, [20], 100.0, lambda calls: (calls[-1](), next(times))[1], least=0)
    told = [row for row in tuned.told if row["product"] == "down"]
    assert [row["seconds"] for row in told] == [3.0, 4.0, 2.0, 5.0, 6.0, 7.0]
    assert told[0]["form"] is None and all(row["predicted"] >= row["floor"] > 0 for row in told[1:])
    assert tuned.chosen == {("down", 20): Form(*told[2]["form"])}  # of gates cuBLAS is the fastest
    rows, weights = random(6, 20, 64), WEIGHTS["down"][1][0]
    found = tuned.plain("down", rows, weights)
    check_close(found, F.linear(rows, weights))
    assert torch.equal(tuned.plain("down", rows[:19], weights), F.linear(rows[:19], weights))
    before = len(tuned.told)
    tuned.tune(WEIGHTS, [8], 100.0, seconds_of)  # too small to be worth it
    assert len(tuned.told) == before


def test_no_form_that_fails_or_is_off_is_chosen(monkeypatch, caplog) -> None:
    def broken(rows: Tensor, weights: Tensor, form: Form) -> Tensor:
        if form.more:
            raise RuntimeError("no such tile")
        return F.linear(rows, weights) * 1.1

    monkeypatch.setattr(products, "multiply", broken)
    tuned = Products(gate)
    tuned.tune({"down": WEIGHTS["down"]}, [20, 30], 100.0, lambda calls: 1.0 / (1 + len(tuned.told)), least=0)
    assert not tuned.chosen and len(tuned.told) == 2
    assert "times as far off as rounding allows" in caplog.text
    assert len(caplog.records) == len({record.args for record in caplog.records})  # each once

    def full(*given) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(products, "multiply", full)
    with pytest.raises(torch.OutOfMemoryError):
        Products(gate).tune({"down": WEIGHTS["down"]}, [20], 100.0, seconds_of, least=0)


def test_trials_end_with_their_budget(caplog) -> None:
    caplog.set_level("INFO")
    tuned = Products(gate)
    tuned.tune(WEIGHTS, [20, 30], 0.0, lambda calls: 1.0, least=0)
    assert not tuned.chosen and len(tuned.told) == 1 and "more than 20 tokens go by cuBLAS" in caplog.text


@pytest.mark.parametrize("wrong", [float("nan"), 0.5, -0.5])
def test_numbers_that_are_off_are_refused(wrong) -> None:
    wanted = random(1, 40, 30)
    check_close(wanted * (1 + 2**-9), wanted)
    check_close(torch.stack([wanted.float() - 3, torch.full_like(wanted, 3).float()]), wanted)
    found = wanted.clone()
    found[7, 3] += wrong
    with pytest.raises(ValueError, match="times as far off as rounding allows"):
        check_close(found, wanted)


def test_tiles_waves_and_seconds_are_counted() -> None:
    machine = Machine(processors=100, operations=1e12, memory=1e12, cache=1e12)
    found = Shape(1000, 640, parts=True).predict(300, Form(128, 0, 256, 8, 4, 2), machine)
    assert (found.tiles, found.waves) == (3 * 4 * 2, 1)
    assert found.bytes == 24 * (128 + 256) * 320 * 2 + 8 * 2 * 300 * 1000
    work = 100 * 2 * 128 * 256 * 320 / 1e12
    assert found.seconds == pytest.approx(work + 8 * 2 * 300 * 1000 / 1e12)
    gated = Shape(1000, 640, gated=True).predict(64, Form(64, 0, 128, 4, 4, 1, True), machine)
    assert gated.tiles == 8 and gated.bytes == 8 * (64 + 2 * 128) * 640 * 2


@given(st.integers(1, 2048), eights, eights, st.booleans(), st.booleans())
def test_nothing_is_faster_than_the_floor(rows, width, size, gated, parts) -> None:
    shape = Shape(width, size, gated, parts and not gated)
    found = shape.candidates(rows, Machine())
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert found[0].seconds >= shape.floor(rows, Machine())
    assert len(found) == len(FORMS) * (len(SPLITS) if shape.parts else 1) + len(GATED_FORMS) * gated


_COMPILE = """
from icefall_fusion.lm.fused_matmul import multiply
from icefall_fusion.lm.products import DEPTH, FORMS, GATED_FORMS
from tests.kernel_tools import compile_kernel, resources

for form in FORMS + GATED_FORMS:
    for kind in ("bf16",) if form.gated else ("bf16", "fp32"):
        def described(*block, kind="bf16"):
            return f"tensordesc<{kind}{list(block)}>".replace(" ", "") if all(block) else None

        made = compile_kernel(
            multiply,
            (described(form.rows, DEPTH), described(form.more, DEPTH), described(form.columns, DEPTH),
             described(1, form.rows, form.columns, kind=kind),
             described(1, form.more, form.columns, kind=kind), *3 * ["i32"]),
            {"GATED": form.gated, "M": form.rows, "MORE": form.more, "N": form.columns, "K": DEPTH},
            {"num_warps": form.warps, "num_stages": form.stages},
        )
        assembly = made.asm["ptx"]
        print(*resources(made), assembly.count("wgmma.mma_async"), assembly.count("cp.async.bulk.tensor"))
"""


def test_every_form_compiles_for_hopper_without_spills(tmp_path) -> None:
    lines = compiled_here(_COMPILE, tmp_path)
    assert len(lines) == 2 * len(FORMS) + len(GATED_FORMS)
    for shared, _, spilled, matrix_units, copy_engine in (map(int, line) for line in lines):
        assert shared <= 227 * 1024 and spilled == 0 and matrix_units and copy_engine
