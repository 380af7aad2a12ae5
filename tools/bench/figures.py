"""What benchmarks share: the least time of a few rounds, and figures to JSON with the machine.
Knows: devices, files. Must not know: what is measured.
"""
from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any, Callable

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icefall_fusion.common.devices import weight_bytes
from icefall_fusion.common.environment import describe_environment
from icefall_fusion.common.files import write_json


def least_seconds(work: Callable[[], Any], rounds: int, device: str) -> float:
    """Return the least time of a few rounds, the device's queue included; one more round warms up."""
    times = []
    for _ in range(rounds + 1):
        wait(device)
        begun = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def on_gpu(device: str) -> bool:
    """Return whether a device is a GPU."""
    return torch.device(device).type == "cuda"


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if on_gpu(device):
        torch.cuda.synchronize(device)


def floor_seconds(model: Any, forwards: int, tokens: int, rates: tuple[float, float]) -> float:
    """Return the least time of a model's calls: weights read once a call, or arithmetic, whichever is more.

    A table of embeddings is read by rows; it counts where it is the output layer too.

    Args:
        model: the language model, of transformers; 2 operations a parameter and token.
        forwards, tokens: calls, and tokens in all of them.
        rates: bytes and matrix operations a second (see `rates.rates`).
    """
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    table = 0 if inputs is outputs else inputs.numel()
    size = weight_bytes(model) - table * inputs.element_size()
    parameters = sum(p.numel() for p in model.parameters()) - table
    return max(size * forwards / rates[0], 2.0 * parameters * tokens / rates[1])


def write(args: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write what `save` writes, and say so."""
    print(f"\nwritten: {args.output}; machine: {json.dumps(save(args, rows, **more))}")


def save(args: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Write rows and ``more`` to ``args.output``, with the machine, which is returned, and the options."""
    environment = _environment(args.device)
    write_json(args.output, {"machine": environment, "options": vars(args), "rows": rows, **more})
    return environment


_environment = functools.lru_cache(maxsize=1)(describe_environment)  # it asks git and every package
