"""The training loop: resume, skipped steps, averages, accumulation, data parallel.
Knows: train/. Must not know: language models, audio.
"""
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from icefall_fusion.train.checkpoints import (
    DoesNotFit,
    average_checkpoints,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from icefall_fusion.train.loop import Trainer
from icefall_fusion.train.optimizers import hidden_matrices, make_optimizer
from icefall_fusion.train.options import TrainerOptions
from icefall_fusion.train.schedule import learning_rate

ROWS, WIDTH, BATCHES = 4, 6, 5


class Lines:
    """Points of a noisy plane: ``BATCHES`` batches an epoch, shuffled; a BatchSource."""

    def __init__(self, rows: int = ROWS, rank: int = 0, world: int = 1) -> None:
        self.rows, self.rank, self.world, self.epoch, self.batch = rows, rank, world, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]

    def batches_in(self, epochs: float) -> int:
        return round(epochs * BATCHES)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.batch < BATCHES:
            generator = torch.Generator().manual_seed(100 * self.epoch + self.batch)
            points = torch.randn(self.rows * self.world, WIDTH, generator=generator)
            mine = points[self.rank * self.rows : (self.rank + 1) * self.rows]
            self.batch += 1
            yield mine, mine.sum(dim=1, keepdim=True)
        self.epoch, self.batch = self.epoch + 1, 0


class InTurn(nn.Module):
    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def make_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    blocks = nn.ModuleList([nn.Linear(8, 8)])  # what Muon takes
    return nn.Sequential(
        nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), InTurn(blocks), nn.Linear(8, 1)
    )


def squared_error(model: nn.Module, batch: Any) -> tuple[Tensor, int, dict[str, Any]]:
    points, targets = batch
    error = (model(points).float() - targets).square().sum()
    return error, len(points), {"doubled": 2 * error.detach()}


def options(**changes: Any) -> TrainerOptions:
    values = {"lr": 0.01, "warmup_steps": 2, "max_steps": 8, "precision": "float32", "tensorboard": False,
              "save_every_minutes": 0.0, "valid_every_steps": 4, **changes}
    return TrainerOptions(**values)


def train(folder: Path, model: nn.Module, loss: Any = squared_error, source: Any = None, **more: Any) -> Any:
    trainer = Trainer(options(**more), model, loss, source or Lines(), list(Lines()), folder)
    return trainer, trainer.run()


def assert_same(first: nn.Module, second: nn.Module, **tolerance: float) -> None:
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items()):
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance)
        else:
            assert torch.equal(a, b), name


class Killed(Exception):
    pass


@pytest.mark.parametrize("precision, optimizer", [("float32", "adamw"), ("bf16", "adamw"), ("bf16", "muon")])
def test_resume_after_a_kill_equals_one_run(tmp_path: Path, precision: str, optimizer: str) -> None:
    """Killed between checkpoints, across an epoch's end and with dropout: bit for bit the same model."""
    settings = {"save_every_steps": 3, "precision": precision, "optimizer": optimizer}
    whole = make_model(dropout=0.3)
    train(tmp_path / "whole", whole, **settings)

    calls = 0

    def killing(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += model.training
        if calls == 8:  # during step 8; the newest checkpoint is of step 6, in the second epoch
            raise Killed
        return squared_error(model, batch)

    with pytest.raises(Killed):
        train(tmp_path / "cut", make_model(dropout=0.3), killing, **settings)
    torch.manual_seed(99)
    resumed = make_model(dropout=0.3)
    trainer, result = train(tmp_path / "cut", resumed, **settings)
    assert (result["step"], result["reason"]) == (8, "finished")
    assert_same(whole, resumed)
    again, _ = train(tmp_path / "cut", make_model(dropout=0.3), **settings)
    assert again.step == 8  # nothing left to do
    assert_same(whole, again.model)


def test_a_kill_between_the_last_checkpoint_and_its_export_leaves_no_old_export(tmp_path: Path) -> None:
    exported: list[int] = []

    def export(step: int) -> None:
        exported.append(step)
        if exported == [4, 8]:
            raise Killed

    def run() -> None:
        settings = options(save_every_steps=4)
        Trainer(settings, make_model(), squared_error, Lines(), list(Lines()), tmp_path, on_save=export).run()

    with pytest.raises(Killed):
        run()
    assert exported == [4, 8] and list_checkpoints(tmp_path)[-1] == checkpoint_path(tmp_path, 8)
    run()
    assert exported == [4, 8, 8]


def test_weights_that_cannot_be_exported_end_a_training_after_its_last_step_alone(tmp_path, capfd) -> None:
    def export(step: int) -> None:
        if step >= fails_from:
            raise DoesNotFit("export_dtype float16 must keep log-probs")

    for fails_from in (4, 8):
        settings, folder, lines = options(save_every_steps=4), tmp_path / str(fails_from), Lines()
        trainer = Trainer(settings, make_model(), squared_error, lines, list(lines), folder, on_save=export)
        with pytest.raises(ValueError, match="export_dtype float16"):
            trainer.run()
        assert list_checkpoints(folder)[-1] == checkpoint_path(folder, 8)
        told = "warning: step 4 is not exported: export_dtype float16 must keep" in capfd.readouterr().err
        assert told == (fails_from == 4)


def test_muon_takes_the_matrices_of_blocks_alone() -> None:
    model = make_model()
    assert hidden_matrices(model) == {"3.blocks.0.weight"}
    muon = make_optimizer(model, options(optimizer="muon"))
    assert [p is model[3].blocks[0].weight for p in muon.parts["muon"].param_groups[0]["params"]] == [True]
    rest = [p for group in muon.parts["adamw"].param_groups for p in group["params"]]
    assert len(rest) == len(list(model.parameters())) - 1
    assert set(make_optimizer(model, options()).parts) == {"adamw"}
    with pytest.raises(ValueError, match=r"\['adamw'\].*TrainerOptions.optimizer.*\['adamw', 'muon'\]"):
        make_optimizer(model, options()).load_state_dict(muon.state_dict())


def test_muon_steps_are_as_large_as_adamw_steps_and_even_in_all_directions() -> None:
    """An update has singular values all about equal, and the root mean square 0.2 * lr of AdamW's."""
    model = make_model()
    weight = model[3].blocks[0].weight
    before = weight.detach().clone()
    weight.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    make_optimizer(model, options(optimizer="muon", weight_decay=0.0)).step()
    update = before - weight.detach()
    values = torch.linalg.svdvals(update) / (0.01 * 0.2 * 8**0.5)
    assert 0.4 < float(values.min()) and float(values.max()) < 1.5
    assert float((update * weight.grad).sum()) > 0  # downhill


def test_nonfinite_steps_are_skipped_and_counted(tmp_path: Path) -> None:
    calls = 0

    def sometimes_nan(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        loss, weight, metrics = squared_error(model, batch)
        if model.training:
            calls += 1
            if calls in (2, 5):
                loss = loss * float("nan") if calls == 2 else loss * float("inf")
        return loss, weight, metrics

    model = make_model()
    _, result = train(tmp_path, model, sometimes_nan, nan_limit=2)
    assert (result["skipped"], result["step"]) == (2, 8)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "skipped" in line] == [1, 2]
    valid = [line for line in lines if "valid_loss" in line]
    assert [line["step"] for line in valid] == [4, 8]
    assert valid[0]["valid_doubled"] == pytest.approx(2 * valid[0]["valid_loss"])


def test_waiting_for_data_is_told(tmp_path: Path) -> None:
    """A source that takes as long as the model makes half of the time waiting; a quick one nearly none."""

    class Slow(Lines):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in super().__iter__():
                time.sleep(0.02)
                yield batch

    def slow_model(model: nn.Module, batch: Any) -> Any:
        time.sleep(0.02)
        return squared_error(model, batch)

    _, quick = train(tmp_path / "quick", make_model(), slow_model)
    assert 0 <= quick["data_wait"] < 0.3
    slow = Trainer(options(), make_model(), slow_model, Slow(), [], tmp_path / "slow").run()
    assert 0.2 < slow["data_wait"] < 0.8
    line = json.loads((tmp_path / "slow" / "log.jsonl").read_text().splitlines()[-1])
    assert line["data_wait"] == pytest.approx(slow["data_wait"], abs=0.1)


def test_stops_with_an_error_after_too_many_nonfinite_steps(tmp_path: Path) -> None:
    def always_nan(model: nn.Module, batch: Any) -> Any:
        loss, weight, metrics = squared_error(model, batch)
        return loss * float("nan"), weight, metrics

    model, before = make_model(), make_model()
    with pytest.raises(RuntimeError, match=r"not finite in 3 steps in a row \(nan_limit=3\)"):
        train(tmp_path, model, always_nan, nan_limit=3)
    assert_same(model, before)


def test_accumulating_equals_a_larger_batch(tmp_path: Path) -> None:
    """Also when the parts are of unequal weight."""
    points = torch.randn(12, WIDTH)
    targets = points.sum(dim=1, keepdim=True)

    class Parts(Lines):
        def __init__(self, sizes: list[int]) -> None:
            super().__init__()
            self.sizes = sizes

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(points.split(self.sizes), targets.split(self.sizes))

    parts, one = make_model(), make_model()
    train(tmp_path / "parts", parts, source=Parts([3, 7, 2]), accumulate=3)
    train(tmp_path / "one", one, source=Parts([12]))
    assert_same(parts, one, rtol=1e-4, atol=1e-5)


def test_limits_and_empty_sources(tmp_path: Path) -> None:
    _, result = train(tmp_path / "time", make_model(), max_minutes=1e-9, keep_checkpoints=1)
    assert (result["reason"], result["step"]) == ("max_minutes", 1)
    assert [path.name for path in list_checkpoints(tmp_path / "time")] == ["checkpoint-1.pt"]

    class Empty(Lines):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ValueError, match="train_batches must yield at least one batch"):
        train(tmp_path / "empty", make_model(), source=Empty())


def test_a_length_in_epochs_is_that_number_of_steps(tmp_path: Path) -> None:
    """The same model as by steps: the source's batches, several in a step, make the schedule."""
    in_epochs = {"max_steps": None, "max_epochs": 3.0, "accumulate": 2}
    epochs, steps = make_model(), make_model()
    trainer, result = train(tmp_path / "epochs", epochs, **in_epochs)
    assert (trainer.total_steps, result["step"], result["reason"]) == (8, 8, "finished")
    train(tmp_path / "steps", steps, max_steps=8, accumulate=2)
    assert_same(epochs, steps)


def test_a_run_that_goes_on_keeps_its_schedule(tmp_path: Path) -> None:
    """Also when the source counts otherwise, as with other processes; another ``max_epochs`` counts anew."""

    class Longer(Lines):
        def batches_in(self, epochs: float) -> int:
            return 2 * super().batches_in(epochs)

    in_epochs = {"max_steps": None, "max_epochs": 2.0}
    trainer, result = train(tmp_path, make_model(), max_minutes=1e-9, **in_epochs)
    assert (trainer.total_steps, result["reason"]) == (10, "max_minutes")
    for epochs, steps in ((2.0, 10), (3.0, 30)):
        changed = options(**{**in_epochs, "max_epochs": epochs})
        assert Trainer(changed, make_model(), squared_error, Longer(), [], tmp_path).total_steps == steps


def test_a_training_has_one_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_epochs must not be set beside max_steps .* but is 2.0"):
        options(max_epochs=2.0)
    halves = options(max_steps=None, max_epochs=4.0, warmup_epochs=2.0)
    steps = options(max_steps=100, warmup_steps=50)
    assert [halves.rate(step, 100) for step in range(100)] == [steps.rate(step, 100) for step in range(100)]
    for changes in ({"max_steps": None, "max_epochs": 1.0}, {}):
        with pytest.raises(ValueError, match="warmup_epochs must be from 0 to max_epochs, which is"):
            options(warmup_epochs=1.5, **changes)
    with pytest.raises(ValueError, match="max_epochs must be above 0"):
        options(max_steps=None, max_epochs=0.0)
    with pytest.raises(ValueError, match="max_steps or TrainerOptions.max_epochs must be set"):
        train(tmp_path, make_model(), max_steps=None)


def test_sigterm_stops_with_a_checkpoint(tmp_path: Path) -> None:
    def terminating(model: nn.Module, batch: Any) -> Any:
        if model.training and not list_checkpoints(tmp_path):
            os.kill(os.getpid(), 15)
        return squared_error(model, batch)

    _, result = train(tmp_path, make_model(), terminating)
    assert (result["reason"], result["step"]) == ("signal", 1)
    assert load_checkpoint(checkpoint_path(tmp_path, 1))["step"] == 1


def test_averages_of_checkpoints(tmp_path: Path) -> None:
    weights = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([3.0, 5.0], dtype=torch.bfloat16)]
    paths = [checkpoint_path(tmp_path, step) for step in (9, 10)]
    for count, (path, weight) in enumerate(zip(paths, weights)):
        save_checkpoint({"model": {"w": weight, "n": torch.tensor(count)}}, path, keep=5)
    assert list_checkpoints(tmp_path) == paths  # by number, not by name
    mean = average_checkpoints(paths)
    assert mean["w"].dtype == torch.float32 and mean["w"].tolist() == [2.0, 3.5] and mean["n"] == 1

    save_checkpoint({"model": {"other": weights[0]}}, checkpoint_path(tmp_path, 11), keep=5)
    with pytest.raises(ValueError, match="must hold the same parameters"):
        average_checkpoints(list_checkpoints(tmp_path))
    with pytest.raises(ValueError, match="paths must name at least one checkpoint"):
        average_checkpoints([])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")


def test_schedules() -> None:
    cosine = [learning_rate(s, "cosine", 1.0, 10, 110, 0.1) for s in range(120)]
    assert cosine[0] == pytest.approx(0.1) and cosine[9] == cosine[10] == 1.0
    assert cosine[60] == pytest.approx(0.55) and cosine[110] == cosine[119] == pytest.approx(0.1)
    root = [learning_rate(s, "inverse-sqrt", 1.0, 100, 1000, 0.0) for s in (99, 399)]
    assert root == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("field, value", [("schedule", "cosin"), ("precision", "fp16"), ("lr", 0.0),
                                          ("max_steps", 0), ("min_lr", 1.0), ("beta1", 1.0)])
def test_options_name_what_is_wrong(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"TrainerOptions.{field} must"):
        options(**{field: value})


def run_as_process(folder: str) -> None:
    """What each of the data parallel processes does; rank 0 leaves ``done.pt``."""
    from icefall_fusion.common.processes import init_distributed

    rank, world, device = init_distributed("cpu")
    model = make_model()
    trainer = Trainer(options(accumulate=2, save_every_steps=4), model, squared_error,
                      Lines(rank=rank, world=world), list(Lines()), folder, device)
    trainer.run()
    if rank == 0:
        torch.save(model.state_dict(), Path(folder) / "done.pt")


def run_two_processes(code: str) -> None:
    """Run Python code in two processes, which know of each other as under torchrun; both must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {**os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=environment,
                                          cwd=Path(__file__).parents[2]))
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    folder = str(tmp_path / "two")
    code = f"from tests.train.test_training_loop import run_as_process; run_as_process({folder!r})"
    run_two_processes(code)
    one = make_model()
    train(tmp_path / "one", one, source=Lines(rows=2 * ROWS), accumulate=2, save_every_steps=4)
    two = make_model()
    two.load_state_dict(torch.load(tmp_path / "two" / "done.pt", weights_only=True))
    assert_same(one, two, rtol=1e-4, atol=1e-5)
    assert len(load_checkpoint(checkpoint_path(tmp_path / "two", 8))["processes"]) == 2
