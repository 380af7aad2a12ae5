"""Training state on disk: checkpoints that are whole or absent, random states, averages.
Knows: tensors and paths. Must not know: models, data, options of a job.
"""
from __future__ import annotations

import errno
import random
import re
from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path


class DoesNotFit(ValueError):
    """The weights of a model cannot be stored as the number type of its export."""


def checkpoint_path(folder: PathLike, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return Path(folder) / f"checkpoint-{step}.pt"


def list_checkpoints(folder: PathLike) -> list[Path]:
    """Return the checkpoints of a folder, oldest step first."""
    steps = []
    for path in Path(folder).glob("checkpoint-*.pt"):
        match = re.fullmatch(r"checkpoint-(\d+)\.pt", path.name)
        if match:
            steps.append((int(match.group(1)), path))
    return [path for _, path in sorted(steps)]


def newest_checkpoint(folder: PathLike) -> Optional[Path]:
    """Return the checkpoint with the highest step, or None."""
    return (list_checkpoints(folder) or [None])[-1]


def save_checkpoint(state: dict[str, Any], path: PathLike, keep: int) -> None:
    """Write a checkpoint and remove all but the ``keep`` newest of its folder.

    Unfinished checkpoints of a killed training are removed too.

    Raises:
        OSError: it cannot be written, e.g. as the disk is full; older ones stay.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's own writer hides the system's error
            raise OSError(errno.EIO, f"cannot be written (is the disk full?): {error}", str(path)) from error
    folder = Path(path).parent
    for old in [*list_checkpoints(folder)[:-keep], *folder.glob(".checkpoint-*.pt.*")]:
        old.unlink(missing_ok=True)


def load_checkpoint(path: PathLike, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU (tensors and plain values only).

    Args:
        path: of the file.
        mmap: read tensors when they are used, for a few of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of a training.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"{path} must be a training checkpoint with the key 'model', but is not")
    return state


def random_states() -> dict[str, Any]:
    """Return the states of all global random generators as values that ``weights_only`` loading allows."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states that ``random_states`` returned."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def average_checkpoints(paths: Sequence[PathLike]) -> dict[str, Tensor]:
    """Return the float32 mean of the models of several checkpoints (Vaswani et al. 2017, section 6.1).

    Args:
        paths: at least one checkpoint of the same model; integer tensors are taken from the last one.

    Raises:
        ValueError: no path, or checkpoints of different models.
    """
    check(len(paths) > 0, "paths", "name at least one checkpoint", list(paths))
    mean: dict[str, Tensor] = {}
    for path in paths:
        model = load_checkpoint(path)["model"]
        if mean and model.keys() != mean.keys():
            odd = sorted(model.keys() ^ mean.keys())[:3]
            raise ValueError(f"{path} must hold the same parameters as {paths[0]}, but differs in {odd}")
        for name, value in model.items():
            if not value.is_floating_point():
                mean[name] = value
            elif name in mean:
                mean[name] += value.float() / len(paths)
            else:
                mean[name] = value.float() / len(paths)
    return mean
