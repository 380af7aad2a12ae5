"""Names of devices, checked before anything is loaded onto one.
Knows: torch. Must not know: models, data, jobs.
"""
from __future__ import annotations

import torch

from icefall_fusion.checks import check


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
