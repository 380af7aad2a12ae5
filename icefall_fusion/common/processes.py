"""Devices and data parallel processes: joining them, moving batches, sums over all of them.
Knows: torch.distributed. Must not know: models, data, options.
"""
from __future__ import annotations

import atexit
import gc
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, TypeVar, Union

import torch
import torch.distributed as dist
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.devices import check_device

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The data parallel processes of a job, as torchrun starts them.

    Args:
        rank: number of this one.
        world: how many there are.
        local_rank: number of this one on its machine, that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls, backend: str, **options: Any) -> Processes:
        """Return the processes of torchrun's environment; several join one process group.

        Args:
            backend: gloo or nccl.
            options: of torch.distributed.init_process_group.
        """
        made = cls.of_environment()
        if made.world > 1:
            _join(backend, **options)
        return made

    @classmethod
    def of_environment(cls) -> Processes:
        """Return the processes of torchrun's environment."""
        names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        return cls(*(int(os.environ.get(name, default)) for name, default in names))

    def device(self, name: str) -> str:
        """Return the device of this process: ``cuda`` without a number becomes that of its own GPU."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.world > 1 else name

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return every ``world``-th item."""
        return list(items[self.rank :: self.world])

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank; it waits for all."""
        return gather_over_processes(value) if self.world > 1 else [value]


def _join(backend: str, **options: Any) -> None:
    """Join the process group of torchrun's processes; leave it when this one ends.

    Without leaving, a process may abort at its exit while threads of the backend still run (seen with gloo),
    and torchrun takes that for a failure.

    Args:
        backend: gloo or nccl.
        options: of torch.distributed.init_process_group.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend, **options)
        atexit.register(_part)


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # what is left of it, e.g. in a data-parallel model, ends its threads now


def init_distributed(device: str = "auto") -> tuple[int, int, torch.device]:
    """Return (rank, world size, device); joins the process group when torchrun has set WORLD_SIZE > 1.

    Args:
        device: "auto" (CUDA when there is one), "cpu", "cuda" or "cuda:N".
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device, "device")
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", Processes.of_environment().local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    processes = Processes.join("nccl" if chosen.type == "cuda" else "gloo")
    return processes.rank, processes.world, chosen


def check_compiler(device: torch.device, option: str) -> None:
    """Raise ValueError if torch.compile has no C++ compiler for this device (CUDA brings its own).

    Args:
        device: that is trained on.
        option: its name for the message.
    """
    compilers = (os.environ.get("CXX", ""), "g++", "clang++")
    good = device.type != "cpu" or any(name and shutil.which(name) for name in compilers)
    check(good, option, "be false where there is no C++ compiler (CXX, g++ or clang++)", True)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a tensor, dict, list or tuple; leave everything else as it is. Nothing waits."""
    if isinstance(batch, Tensor):
        return _pinned(batch, device).to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def sum_over_processes(totals: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Sum every value (number or scalar tensor) over the processes; one message, no wait for the device.

    Returns:
        the same of one process; float64 scalar tensors on the device of several.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(totals)
    tensors = {name: value for name, value in totals.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in totals.items() if name not in tensors}
    values = upload(list(numbers.values()), device, torch.float64)
    if tensors:
        stacked = torch.stack([value.detach().double().reshape(()) for value in tensors.values()])
        values = torch.cat([values, stacked.to(device)])
    return dict(zip([*numbers, *tensors], sum_tensor(values).unbind()))


def upload(values: Any, device: Union[str, torch.device], dtype: Optional[torch.dtype] = None) -> Tensor:
    """Return a tensor of numbers (or lists of them) on a device, without waiting for that device."""
    return _pinned(torch.tensor(values, dtype=dtype), torch.device(device)).to(device, non_blocking=True)


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    """Return values that a GPU can copy by itself: from other memory a copy waits for all work before it."""
    return values.pin_memory() if device.type == "cuda" and values.device.type == "cpu" else values


def sum_tensor(values: Tensor) -> Tensor:
    """Return ``values`` (on the device of the process group) summed over the processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def merge_over_processes(totals: Mapping[str, Any]) -> dict[str, float]:
    """Sum every value over the processes that have it: some may have seen no batch, and so no names."""
    shares = gather_over_processes({name: float(value) for name, value in totals.items()})
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: sum(share.get(name, 0.0) for share in shares) for name in names}


def gather_over_processes(value: Any) -> list[Any]:
    """Return the values of all processes, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
