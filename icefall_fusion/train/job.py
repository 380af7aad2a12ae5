"""What every training job does: processes, threads, the loop, its result, the mark of an early stop.
Knows: the loop, exit codes. Must not know: what is trained.
"""
from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor, nn

from icefall_fusion.common.command_line import UNFINISHED
from icefall_fusion.common.files import write_text
from icefall_fusion.common.memory import keep_freed_memory
from icefall_fusion.common.processes import Processes, gather_over_processes, init_distributed
from icefall_fusion.train.checkpoints import DoesNotFit
from icefall_fusion.train.loop import FINISHED, Trainer
from icefall_fusion.train.options import TrainingOptions

#: Largest mean change of log-probabilities, in nats, by the dtype of exported weights. Float16: 0.005 to
#: 0.034 with acoustic models of MiniBooks; single pieces that are all but impossible move by up to 0.15.
EXPORT_TOLERANCE = 0.1


def run_training(
    options: TrainingOptions,
    make_trainer: Callable[[Any, torch.device, int, int], Trainer],
    finish: Optional[Callable[[Trainer], None]] = None,
) -> int:
    """Train (or go on training); return 0, or UNFINISHED when it ended before its last step.

    Under torchrun any exit code but 0 becomes 1. So an early stop also leaves a file ``stopped`` in
    ``options.exp`` that holds the reason; the next start removes it.

    Args:
        options: of the job.
        make_trainer: (options, device, rank, world) -> the loop with its model and batches.
        finish: called by every process when the loop has ended.

    Raises:
        RuntimeError: the loss was not finite too often.
    """
    mark = Path(options.exp) / "stopped"
    if Processes.of_environment().rank == 0:
        mark.unlink(missing_ok=True)
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    rank, world, device = init_distributed(options.device)
    trainer = make_trainer(options, device, rank, world)
    result = trainer.run()
    if finish is not None:
        finish(trainer)
    if rank == 0:
        print(result, file=sys.stderr)
        if result["reason"] != FINISHED:
            write_text(mark, f"{result['reason']} at step {result['step']} of {trainer.total_steps}\n")
    gather_over_processes(None)  # torchrun ends all processes as soon as one has left with UNFINISHED
    return 0 if result["reason"] == FINISHED else UNFINISHED


def report_size(model: nn.Module, more: str, rank: int) -> None:
    """Print the number of parameters (first process only), followed by ``more``."""
    if rank == 0:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{size:.2f}M parameters{more}", file=sys.stderr, flush=True)


@torch.inference_mode()
def check_export(model: nn.Module, dtype: str, log_probs: Callable[[nn.Module], Sequence[Tensor]]) -> None:
    """Raise `DoesNotFit` if storing the weights of a model as ``dtype`` changes its log-probs too much.

    A change counts by its probability: what a model holds for all but impossible may move further.

    Args:
        model: on the CPU, in eval mode, with float32 weights.
        dtype: of the exported weights.
        log_probs: computes natural-log probabilities by a model on some fixed input: of each of its outputs,
            [...,V], all V of a place a distribution.
    """
    rounded = copy.deepcopy(model)
    for tensor in rounded.state_dict().values():
        tensor.copy_(tensor.to(getattr(torch, dtype)))
    changes = [(trained.exp() * (trained - stored).abs()).sum(dim=-1).max()
               for trained, stored in zip(log_probs(model), log_probs(rounded))]
    change = float(torch.stack(changes).max())
    if not change <= EXPORT_TOLERANCE:  # also if it is no number
        rule = f"keep log-probs, on average, within {EXPORT_TOLERANCE} nats of the trained model's"
        raise DoesNotFit(f"export_dtype {dtype} must {rule} (float32 does), but is {change!r}")
