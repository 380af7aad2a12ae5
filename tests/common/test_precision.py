"""The number type of a device: what a trial finds, and what precisions mean.
Knows: torch, a tiny language model. Must not know: how fast anything is.
"""
from __future__ import annotations

import time

import tiny
import torch

from icefall_fusion.common.precision import fast_dtype, in_bf16
from icefall_fusion.lm import CausalLm

CPU = torch.device("cpu")


def test_bfloat16_is_taken_where_it_is_clearly_faster() -> None:
    def seconds(dtype: torch.dtype) -> float:
        matrix, spent = torch.ones(768, 768, dtype=dtype), []
        for _ in range(5):
            begun = time.perf_counter()
            matrix @ matrix
            spent.append(time.perf_counter() - begun)
        return min(spent)

    times = seconds(torch.bfloat16) / seconds(torch.float32)
    if not 1 / 2 < times < 2:  # between them either is right
        assert fast_dtype("cpu") == (torch.bfloat16 if times < 1 else torch.float32)
    assert fast_dtype("meta") == torch.float32


def test_what_a_precision_is_on_a_device() -> None:
    assert in_bf16("bf16", CPU) and not in_bf16("float32", CPU)
    assert in_bf16("fast", CPU) == (fast_dtype("cpu") == torch.bfloat16)


def test_a_language_model_is_loaded_in_the_fast_type(tmp_path) -> None:
    lm = CausalLm.from_pretrained(tiny.language_model(tmp_path, 1, pieces=True), dtype="fast")
    assert {weight.dtype for weight in lm.model.parameters()} == {fast_dtype("cpu")}
