"""Muon for all matrices of a shape at once: torch's own as slow twin, launches, skipped steps.
Knows: train/. Must not know: data, training loops.
"""
from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from icefall_fusion.acoustic.models import CtcAed, ModelOptions
from icefall_fusion.train.muon import BatchedMuon, orthogonalized
from icefall_fusion.train.optimizers import hidden_matrices

SHAPES = [(24, 8), (8, 24), (16, 16), (24, 8), (16, 16), (8, 8), (8, 24), (12, 20)]


def matrices(shapes: list[tuple[int, int]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def torchs_own(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def test_it_is_torchs_muon_and_takes_over_its_state() -> None:
    """Three steps each and then three by the other one, wide, square and tall matrices; bfloat16 products."""
    ours, theirs = matrices(), matrices()
    begun = [p.detach().clone() for p in ours]
    fast, slow = BatchedMuon(ours, 0.02, 0.1), torchs_own(theirs)
    for step in range(6):
        if step == 3:
            states = fast.state_dict(), slow.state_dict()
            fast, slow = BatchedMuon(theirs, 0.02, 0.1), torchs_own(ours)
            fast.load_state_dict(states[1])
            slow.load_state_dict(states[0])
            ours, theirs = theirs, ours
        for params, optimizer in ((ours, fast), (theirs, slow)):
            give_gradients(params, step)
            optimizer.step()
    for p, q, start in zip(ours, theirs, begun):
        moved = (q - start).norm()
        assert moved > 0.1 and (p - q).norm() < 0.01 * moved
        mine, other = fast.state[p]["momentum_buffer"], slow.state[q]["momentum_buffer"]
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        assert mine.shape == p.shape and mine.is_contiguous()


def test_newton_schulz_makes_all_directions_about_equal() -> None:
    made = orthogonalized(torch.randn(5, 8, 24), (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(made.float())
    assert 0.4 < float(values.min()) and float(values.max()) < 1.4


@pytest.mark.parametrize("found, changes", [(0.0, True), (1.0, False)])
def test_found_inf_skips_a_step_whatever_the_gradients_are(found: float, changes: bool) -> None:
    params, plain = matrices(), matrices()
    fast, twin = BatchedMuon(params, 0.02, 0.1), BatchedMuon(plain, 0.02, 0.1)
    for chosen, optimizer in ((params, fast), (plain, twin)):
        give_gradients(chosen, 0)
        optimizer.step()
    give_gradients(params, 1)
    give_gradients(plain, 1)
    if not changes:
        params[2].grad[0, 0], params[3].grad[1, 1] = float("nan"), float("inf")
    before = [p.detach().clone() for p in params]
    fast.found_inf = torch.tensor(found)
    fast.step()
    if changes:
        twin.step()
    for p, q, old in zip(params, plain, before):
        assert torch.equal(p, q) and torch.equal(p, old) != changes
        assert torch.equal(fast.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"])


class Launches(TorchDispatchMode):
    """Counts calls that are kernels on a GPU: all but views and allocations."""

    FREE = ("detach", "unbind", "transpose", "slice", "view", "empty", "t", "select", "permute",
            "unsafe_view", "alias", "as_strided")

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name.strip("_") not in self.FREE:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


def test_a_step_of_the_acoustic_model_is_a_hundred_launches() -> None:
    """The 77 matrices of MiniBooks' model, made narrow: 1,773 launches by torch's own, 94 in batches."""
    recipe = ModelOptions.from_dict({
        "encoder": {"size": 64, "heads": 4, "feedforward": 192, "layers": [2, 4, 1], "kernel": 15},
        "decoder": {"heads": 4, "feedforward": 192, "layers": 3},
    })
    model = CtcAed(recipe)
    names = hidden_matrices(model)
    params = [p for name, p in model.named_parameters() if name in names]
    assert len(params) == 77
    counts = []
    for optimizer in (torchs_own(params), BatchedMuon(params, 0.02, 0.1)):
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()  # makes its state
        with Launches() as launches:
            optimizer.step()
        counts.append(sum(launches.calls.values()))
    assert counts[0] > 1700 and counts[1] <= 100
