"""The start of an acoustic training: feature statistics, and short utterances before all others.
Knows: batches. Must not know: models, the training loop.
"""
from __future__ import annotations

from typing import Any, Iterable, Iterator, Union

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.processes import sum_tensor
from icefall_fusion.data.datamodule import Batch, TrainBatches


def feature_statistics(
    batches: Iterable[Batch], seconds: float, device: Union[str, torch.device] = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [bins] over the first ``seconds`` of features of 10 ms.

    Args:
        batches: each process has its own share.
        seconds: of each share.
        device: of the process group, if there is one.

    Raises:
        ValueError: there is no frame.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        real = torch.arange(batch["features"].shape[1], device=batch["lens"].device) < batch["lens"][:, None]
        frames = batch["features"][real].double()
        count, total, squares = count + len(frames), total + frames.sum(0), squares + frames.square().sum(0)
        if count >= seconds * 100:
            break
    check(count > 0, "the training data", "hold at least one feature frame", count)
    sums = torch.stack((torch.full_like(total, count), total, squares)).double().to(device)
    count, total, squares = sum_tensor(sums).cpu()
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=1e-6).sqrt().float()


class Curriculum:
    """Some batches of an easy source, then all of a full one; a BatchSource.

    Args:
        easy: starts anew as often as needed.
        full: what follows.
        batches: number of easy ones.
    """

    def __init__(self, easy: TrainBatches, full: TrainBatches, batches: int) -> None:
        self.easy, self.full, self.batches = easy, full, batches
        self.used = 0  # easy batches so far

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The utterances that could not be read so far."""
        return [*self.easy.skipped, *self.full.skipped]

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the easy batches and of the full source's epoch."""
        while self.used < self.batches:
            before = self.used
            for batch in self.easy:
                self.used += 1
                yield batch
                if self.used >= self.batches:
                    break
            if self.used == before:
                raise ValueError("TrainOptions.easy_seconds must leave some utterance, but leaves none")
        yield from self.full

    def batches_in(self, epochs: float) -> int:
        """Return the number of batches: the easy ones, and those of ``epochs`` of the full source."""
        return self.batches + self.full.batches_in(epochs)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the batch that was yielded last."""
        return {"given": self.used, "easy": self.easy.state_dict(), "full": self.full.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.used = state["given"]
        self.easy.load_state_dict(state["easy"])
        self.full.load_state_dict(state["full"])
