"""A batch from features in a GPU's memory asks the GPU for nothing that the host would have to wait for.
Knows: resident batches. Must not know: models.

There is no GPU here: batches are made of fake CUDA tensors, which have shapes and no numbers. Whatever needs
a number on the host is an error there, and a copy that waits is seen. The test marked gpu has never run.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resident import OPTIONS, _encode, assert_same
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from icefall_fusion.data.datamodule import TrainBatches
from icefall_fusion.data.device_augment import DeviceAugment
from icefall_fusion.data.features import PADDING
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.data.resident import FeatureStore

ALL = dataclasses.replace(OPTIONS, spec_augment=True, time_warp=10, frequency_warp=0.1, frame_masks=2)


class Copies(TorchDispatchMode):
    """Notes the copies between host and device, and those that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[int, ...]] = []
        self.waiting: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            if source.device.type != target.device.type:
                self.all.append(tuple(source.shape))
                self.waiting += [] if (kwargs or {}).get("non_blocking") else [tuple(source.shape)]
        return out


def on_fake_gpu(store: FeatureStore) -> None:
    store.device = torch.device("cuda")
    store.features = torch.empty(store.features.shape, dtype=torch.float16, device="cuda")


def test_a_batch_is_made_without_waiting_for_the_gpu(data: Path, monkeypatch) -> None:
    noise, manifest = str(cuts_path(data / "fbank", "train")), cuts_path(data / "fbank", "train")
    options = dataclasses.replace(ALL, noise=noise)
    store = FeatureStore.of(manifest, options, "cpu")
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor.clone())
    begin = DeviceAugment.__init__  # CUDA's generator cannot be made without a GPU
    on_host = lambda one, options, device, noise: begin(one, options, "cpu", noise)  # noqa: E731
    monkeypatch.setattr(DeviceAugment, "__init__", on_host)
    uniform = lambda one, *shape: torch.rand(*shape, device="cuda")  # noqa: E731
    monkeypatch.setattr(DeviceAugment, "_uniform", uniform)
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_fake_gpu(store)
        on_fake_gpu(store.noise)
        source = iter(TrainBatches(manifest, options, _encode, store))
        next(source)  # copies all tokens
        with Copies() as copies:
            batches = list(source)
    assert len(batches) > 5
    for batch in batches:
        size = (len(batch["ids"]), max(batch["frames"]), 80)
        assert batch["features"].device.type == "cuda" and batch["features"].shape == size
        assert batch["targets"].device.type == batch["lens"].device.type == "cuda"
    assert copies.waiting == []
    assert copies.all == [(6, len(batch["ids"])) for batch in batches]  # a few numbers of each utterance


def test_what_would_wait_is_seen() -> None:
    """The test above can fail: a number of the device, and a plain copy."""
    with FakeTensorMode():
        lens = torch.tensor([3, 4]).to("cuda")
        with pytest.raises(DataDependentOutputException):
            int(lens.max())
        with Copies() as copies:
            torch.zeros(2, 3).to("cuda")
    assert copies.waiting == [(2, 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["manifests", "fbank"])
def test_batches_on_a_gpu_are_those_of_the_cpu(data: Path, kind: str) -> None:
    manifest = cuts_path(data / kind, "train")
    pair = [FeatureStore.of(manifest, OPTIONS, device) for device in ("cpu", "cuda")]
    sources = [list(TrainBatches(manifest, OPTIONS, _encode, store)) for store in pair]
    for one, two in zip(*sources):
        moved = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in two.items()}
        assert_same(one, moved, 0.02)
    full = iter(TrainBatches(manifest, ALL, _encode, FeatureStore.of(manifest, ALL, "cuda")))
    next(full)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = list(full)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch in made:
        for row, length in zip(batch["features"].cpu(), batch["frames"]):
            assert torch.isfinite(row).all() and (row[length:] == torch.tensor(PADDING)).all()
