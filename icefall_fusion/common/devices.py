"""Devices and kernels, checked before anything is loaded; the bytes of a model's weights.
Knows: torch. Must not know: models, data, jobs.
"""
from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.common.unavailable import Unavailable, asked_once


def check_device(device: str, option: str) -> None:
    """Raise ValueError unless ``device`` is one that PyTorch knows and this machine has.

    Args:
        device: e.g. cpu or cuda:1.
        option: its name for the message.
    """
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{option} must be a device such as cpu or cuda, but is {device!r}") from None
    if wanted.type == "cuda":
        count = torch.cuda.device_count()
        check((wanted.index or 0) < count, option, f"be one of the {count} GPUs that PyTorch sees", device)


#: Environment variable with the names of kernels that must not run, separated by spaces: a module of kernels
#: or ``MODULE:FORM``. For a machine on which a kernel was seen to fail: the plain way runs then, and says so.
WITHOUT_KERNELS = "ICEFALL_FUSION_WITHOUT_KERNELS"


def refuse_switched_off(kernel: str) -> None:
    """Refuse a kernel that `WITHOUT_KERNELS` names.

    Raises:
        Unavailable: it does.
    """
    if kernel in os.environ.get(WITHOUT_KERNELS, "").split():
        raise Unavailable(f"{WITHOUT_KERNELS} switches {kernel} off", unusual=True)


@asked_once
def load_kernels(module: str) -> Any:
    """Return a module of Triton kernels by its name.

    Raises:
        Unavailable: Triton is not there, or too old for the kernels, or they are switched off.
    """
    refuse_switched_off(module)
    try:
        return importlib.import_module(module)
    except Exception as error:  # of Triton: any
        reason = f"Triton cannot be had ({type(error).__name__}: {error})"
        raise Unavailable(reason, unusual=True) from error


def kernels_run_on(device: torch.device) -> bool:
    """Return whether Triton kernels run on a device: a GPU, or any in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, as they are in memory; shared ones count once.

    Quantized weights count with their scales.
    """
    parts = [part for tensor in (*model.parameters(), *model.buffers()) for part in _parts(tensor)]
    for module in model.modules():  # where bitsandbytes puts scales after the first forward
        scale = getattr(getattr(module, "state", None), "SCB", None)
        parts += [scale] if isinstance(scale, torch.Tensor) else []
    tensors = {part.data_ptr(): part for part in parts}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that belong to one: torchao wraps several, bitsandbytes has scales beside."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else [state.absmax, state.code]
    scales.append(getattr(tensor, "SCB", None))
    return [tensor, *(scale for scale in scales if isinstance(scale, torch.Tensor))]
