"""The optimizers of the training loop: AdamW, or Muon and AdamW; steps that the device itself may skip.
Knows: parameters of a module. Must not know: data, what a model computes.
"""
from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from icefall_fusion.train.muon import BatchedMuon
from icefall_fusion.train.options import TrainerOptions


class Optimizers:
    """Several optimizers, each for its own parameters, that step as one.

    Args:
        parts: name -> optimizer; the names are keys of the state.
    """

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups of all parts; the learning rate is set in them."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self, found_inf: Optional[Tensor] = None) -> None:
        """Do a step of every part.

        Args:
            found_inf: scalar float tensor; above 0, nothing changes, and the host need not know (as for
                `torch.amp.GradScaler`; fused AdamW and BatchedMuon have it). None: the step counts.
        """
        for part in self.parts.values():
            if found_inf is not None:
                part.found_inf = found_inf  # type: ignore[attr-defined]
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return {name: state of that part}."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned.

        Raises:
            ValueError: the state belongs to other optimizers.
        """
        if set(state) != set(self.parts):
            raise ValueError(
                f"the checkpoint's optimizers must be {sorted(self.parts)} (TrainerOptions.optimizer), "
                f"but are {sorted(state)}"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def make_optimizer(model: nn.Module, options: TrainerOptions) -> Optimizers:
    """Return AdamW for everything, or Muon (Jordan et al. 2024) for hidden matrices and AdamW for the rest.

    AdamW decays matrices only and is fused (one pass over memory) on CPU and CUDA. Muon's updates are scaled
    to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so both can share
    learning rate and decay. It works on all matrices of a shape at once: on a GPU 77 matrices take 94
    kernels instead of torch's 1,773, and a CPU that is slow with bfloat16 need not compute in it.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = hidden_matrices(model) & set(trained) if options.optimizer == "muon" else set()
    rest = [p for name, p in trained.items() if name not in hidden]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (options.beta1, options.beta2)
    parts: dict[str, torch.optim.Optimizer] = {}
    if rest:
        groups = [group for group in groups if group["params"]]
        parts["adamw"] = torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    if hidden:
        matrices = [p for name, p in trained.items() if name in hidden]
        parts["muon"] = BatchedMuon(matrices, options.lr, options.weight_decay)
    return Optimizers(parts)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of linear layers inside repeated blocks (an ``nn.ModuleList``).

    Embeddings, the first layer and output layers are not among them: each of their rows is a symbol or a
    filter, and Muon's even spectrum of updates does harm there.
    """
    lists = {name + "." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(prefix) for prefix in lists)
    }
