"""A training step of the acoustic model asks a GPU for nothing that the host would have to wait for.
Knows: the job train. Must not know: the training loop.

There is no GPU here: the step runs on fake CUDA tensors, which have shapes and no numbers. Whatever needs a
number on the host (item, bool, tolist, nonzero, a mask as index) is an error there, and copies to the device
are seen with their flag. What runs inside of torch's own kernels is not seen: its CTC loss copies lengths,
which the host must have.
"""
from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from icefall_fusion.acoustic.models import ChunkOptions, CtcAed, DecoderOptions, EncoderOptions, ModelOptions
from icefall_fusion.train.acoustic_loss import compute_loss
from icefall_fusion.train.ema import Ema
from icefall_fusion.train.options import TrainerOptions
from icefall_fusion.train.step import TrainingStep

MODEL = ModelOptions(
    vocab_size=30,
    encoder=EncoderOptions(size=16, heads=2, feedforward=16, layers=(1, 1, 1), kernel=5),
    decoder=DecoderOptions(layers=1, heads=2, feedforward=16),
)
FRAMES, TOKENS = [60, 48, 4], [[5, 6, 6], [7], [8, 9, 9, 9]]  # the last has no path


class Copies(TorchDispatchMode):
    """Counts calls, and the copies between host and device that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if source.device.type != target.device.type and waits and source.dim():
                self.waiting.append(f"{name} {tuple(source.shape)} {source.device} to {target.device}")
        return out


def _nothing() -> None:
    return None


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no fake form: pinned memory and number types need a driver, torch's CTC loss asks cuDNN."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, device=None: self.clone())

    def ctc_loss(log_probs: Tensor, targets: Tensor, lens: Tensor, sizes: Tensor, **more: Any) -> Tensor:
        assert (targets.device.type, lens.device.type, sizes.device.type) == ("cuda", "cpu", "cpu")
        return log_probs.sum()

    monkeypatch.setattr(torch.nn.functional, "ctc_loss", ctc_loss)


def batch_on(device: str) -> dict[str, Any]:
    return {
        "features": torch.randn(3, 60, 80).to(device), "lens": torch.tensor(FRAMES).to(device),
        "frames": FRAMES, "tokens": TOKENS, "texts": [""] * 3, "seconds": [0.6, 0.48, 0.04],
    }


def step_of(optimizer: str, device: str) -> TrainingStep:
    options = TrainerOptions(optimizer=optimizer, max_steps=9, grad_clip=1.0)
    with torch.device(device):  # fake parameters cannot be moved
        model = CtcAed(MODEL).train()
    return TrainingStep(options, model, compute_loss, torch.device(device))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_on_a_gpu_waits_for_nothing(optimizer: str, no_gpu: None) -> None:
    """Forward with and without a chunk mask, scaling, clipping, skipping, the optimizer, averages."""
    with FakeTensorMode():
        step = step_of(optimizer, "cuda")
        ema = Ema(step.model, 0.9)
        assert step.deferred
        batch = batch_on("cuda")
        with Copies() as copies:
            for masked in (False, True):
                # drawn on the host, where fake tensors have no numbers
                step.model._random_chunk = functools.partial(ChunkOptions, 4, None) if masked else _nothing
                loss, sums = step.loss_of(step.model, batch)
                for p in step.parameters:  # autograd has no fake GPU
                    p.grad = torch.ones_like(p)
                norm, finite = step._update(sums["weight"], sums["loss"], 1e-3)
                ema.update()
        assert all(value.device.type == "cuda" for value in (loss, norm, finite))
        products = copies.calls["baddbmm"]  # two steps of five iterations, three shapes of matrices
        assert copies.calls["_fused_adamw_"] > 0 and products == (60 if optimizer == "muon" else 0)
        assert copies.waiting == []


def test_what_would_wait_is_seen(no_gpu: None) -> None:
    """The test above can fail: lengths that are only on the device, and a plain copy."""
    with FakeTensorMode():
        step = step_of("adamw", "cuda")
        batch = batch_on("cuda")
        del batch["frames"]
        with pytest.raises(DataDependentOutputException):
            step.loss_of(step.model, batch)
        with Copies() as copies:
            torch.tensor(FRAMES).to("cuda")
        assert len(copies.waiting) == 1


def test_frames_on_the_host_change_nothing() -> None:
    """Loss and gradients are those without them; too many frames are refused either way."""
    made = []
    for frames in (FRAMES, None):
        torch.manual_seed(0)
        model = CtcAed(MODEL).train()
        batch = batch_on("cpu")
        loss, info = model(batch["features"], batch["lens"], TOKENS, frames)
        loss.backward()
        made.append((loss, info["impossible"], info["frames"], [p.grad for p in model.parameters()]))
    assert torch.equal(made[0][0], made[1][0]) and made[0][1:3] == made[1][1:3] == (1, 112)
    assert all(torch.equal(a, b) for a, b in zip(made[0][3], made[1][3]))
    for frames in ([61, 48, 4], None):
        with pytest.raises(ValueError, match=r"lens must be in 0..60, but is \[61, 48, 4\]"):
            model(batch["features"], torch.tensor([61, 48, 4]), TOKENS, frames)
