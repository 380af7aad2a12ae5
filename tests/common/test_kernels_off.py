"""Kernels that were seen to fail on a machine can be switched off by name; the plain way runs and says so.
Knows: the switch, the kernels' two homes. Must not know: how a kernel works.
"""
from __future__ import annotations

import pytest
import torch

from icefall_fusion.common.devices import WITHOUT_KERNELS, load_kernels
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.engines import gpu, gpu_check
from tests.lm.test_fused import make

pytest.importorskip("triton")


def test_a_module_of_kernels_is_switched_off_and_the_model_says_so(monkeypatch, caplog) -> None:
    from icefall_fusion.lm import fused, fused_loading

    lm = make("llama")
    load_kernels.cache_clear()
    monkeypatch.setenv(WITHOUT_KERNELS, f"other {fused.KERNELS}")
    with pytest.raises(Unavailable, match="ICEFALL_FUSION_WITHOUT_KERNELS switches .*fused_kernels off"):
        load_kernels(fused.KERNELS)
    lm.fused = None
    assert "switches" in fused_loading.use_fused_kernels(lm) and lm.fused is None
    assert "runs as transformers runs it: ICEFALL_FUSION_WITHOUT_KERNELS" in caplog.text
    load_kernels.cache_clear()


def test_one_form_of_the_search_kernel_is_switched_off(monkeypatch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu_check.check_kernel.cache_clear()
    monkeypatch.setenv(WITHOUT_KERNELS, f"{gpu.KERNEL}:ahead")
    with pytest.raises(Unavailable, match="switches .*gpu_kernel:ahead off"):
        gpu_check.check_kernel(device, "ahead")
    gpu_check.check_kernel(device, "alone")
    gpu_check.check_kernel.cache_clear()
