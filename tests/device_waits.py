"""A CPU that passes for a GPU: tensors that say they are on ``cuda``, and a count of where a host would wait.
Knows: PyTorch's dispatcher. Must not know: what is run on it.

Every operation on such a tensor is done by the CPU on the tensor inside. Counted are those in which PyTorch
waits for a real GPU: values read on the host, sizes that depend on values, and copies between host and device
that are not both pinned and ``non_blocking``.
"""
from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

torch._C._ensureCUDADeviceGuardSet()
_GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_BY_VALUE = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
             "unique_consecutive", "equal", "repeat_interleave", "bincount"}
_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_"}


class OnDevice(torch.Tensor):
    """A tensor of the host that says it is on ``cuda:0``."""

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(),
            dtype=inside.dtype, device=_GPU,
        )

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside

    def __repr__(self) -> str:
        return f"OnDevice({self.inside})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("such a tensor serves within `Waits` alone")


def inside(value: Any) -> Any:
    """Return the host's tensors of all that pass for the device's."""
    return tree_map(lambda x: x.inside if isinstance(x, OnDevice) else x, value)


class Waits(TorchDispatchMode):
    """While it is active there is a GPU that none has seen.

    Attributes:
        found: the operations that would have waited, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # PyTorch does not ask for a driver then
        self.found: list[str] = []
        self._pinned: dict[int, torch.Tensor] = {}

    def synchronize(self, *_: Any) -> Waits:
        """Stand for a stream, and for waiting for it."""
        self.found.append("synchronize")
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), dict(kwargs or {})
        flat = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = any(isinstance(x, OnDevice) for x in flat)
        wanted = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        pin = kwargs.pop("pin_memory", False)
        if wanted is not None and wanted.type == "cuda":
            kwargs["device"] = _CPU
        self._count(name, args, kwargs, given, wanted)
        result = func(*inside(args), **inside(kwargs))
        if pin:
            return self._pin(result)
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], torch.Tensor):
            return args[0]
        to_device = wanted.type == "cuda" if wanted is not None else given and name != "_local_scalar_dense"
        if not to_device:
            return result
        return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, result)

    def _count(self, name: str, args: Any, kwargs: dict[str, Any], given: bool, wanted: Any) -> None:
        if name == "copy_":
            target, source = args[0], args[1]
            free = len(args) > 2 and args[2] or kwargs.get("non_blocking", False)
            self._count_copy(name, isinstance(source, OnDevice), isinstance(target, OnDevice), free, args[:2])
        elif name == "_to_copy" and wanted is not None:
            free = kwargs.get("non_blocking", False)
            self._count_copy(name, given, wanted.type == "cuda", free, args[:1])
        elif given and name in _BY_VALUE:
            self.found.append(name)
        elif given and name in _INDEXING:
            if any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.found.append(name)

    def _count_copy(self, name: str, source: bool, target: bool, free: bool, tensors: Any) -> None:
        if source != target and not (free and any(self._is_pinned(x) for x in tensors)):
            self.found.append(f"{name} to the {'device' if target else 'host'}")

    def _pin(self, values: torch.Tensor) -> torch.Tensor:
        self._pinned[values.untyped_storage().data_ptr()] = values  # kept, so that no other has its address
        return values

    def _is_pinned(self, values: torch.Tensor) -> bool:
        return not isinstance(values, OnDevice) and values.untyped_storage().data_ptr() in self._pinned
