"""Weights of a language model in fewer bits, by bitsandbytes or torchao.
Knows: transformers' options. Must not know: trees, search, fusion.
"""
from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from icefall_fusion.common.checks import check_choice
from icefall_fusion.lm.loading import QUANTIZATIONS


def quantization_options(quantization: str) -> dict[str, Any]:
    """Return what transformers is to be told of a quantization: 8bit, 4bit or int8.

    Raises:
        ValueError: there is no such quantization.
        ImportError: its package is not installed.
    """
    check_choice(quantization, QUANTIZATIONS[1:], "quantization")
    by_torchao = quantization == "int8"
    package = "torchao" if by_torchao else "bitsandbytes"
    if (find_spec("torchao") if by_torchao else find_spec("bitsandbytes")) is None:
        raise ImportError(f"quantization {quantization!r} needs {package}: pip install {package}")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if by_torchao:
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    elif quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config}
