"""A training that ends by the clock; averages of its weights; steps that the device may skip by itself.
Knows: train/. Must not know: language models, audio.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from icefall_fusion.train.checkpoints import checkpoint_path, load_checkpoint, newest_checkpoint
from icefall_fusion.train.ema import Ema
from icefall_fusion.train.loop import Trainer
from icefall_fusion.train.options import TrainerOptions
from icefall_fusion.train.schedule import learning_rate
from icefall_fusion.train.step import TrainingStep
from tests.train.test_training_loop import (
    Lines,
    assert_same,
    make_model,
    options,
    run_two_processes,
    squared_error,
)


class Steps(Lines):
    """Every batch takes a second of a clock that stands still otherwise."""

    def __init__(self, seconds: float = 1.0, **more: Any) -> None:
        super().__init__(**more)
        self.length, self.time = seconds, 1000.0

    def now(self) -> float:
        return self.time

    def __iter__(self):
        for batch in super().__iter__():
            self.time += self.length
            yield batch


def by_time(**changes: Any) -> TrainerOptions:
    return options(**{"max_steps": None, "progress": "time", "max_minutes": 0.2, "save_every_steps": 5,
                      "valid_every_steps": 0, **changes})


def run(folder: Path, settings: TrainerOptions, source: Steps, loss: Any = squared_error) -> Any:
    trainer = Trainer(settings, make_model(), loss, source, list(Lines()), folder, now=source.now)
    return trainer, trainer.run()


class Rates:
    """A loss function that notes the learning rate each step was given, one step late."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def watch(self, step: TrainingStep) -> None:
        call = step.__class__.__call__

        class Watched(step.__class__):
            def __call__(this, batches: Any, lr: float, ask: Any) -> Any:
                self.seen.append(lr)
                return call(this, batches, lr, ask)

        step.__class__ = Watched


@pytest.mark.parametrize("schedule", ["cosine", "inverse-sqrt"])
def test_the_clock_gives_the_rates_of_as_many_steps(tmp_path: Path, schedule: str) -> None:
    """Twelve steps of a second: rates, length and model are those of a training of 12 steps."""
    rates = Rates()
    source = Steps()
    trainer = Trainer(by_time(schedule=schedule), make_model(), squared_error, source, list(Lines()),
                      tmp_path / "time", now=source.now)
    rates.watch(trainer.train_step)
    result = trainer.run()
    assert (result["reason"], result["step"], trainer.total_steps) == ("finished", 12, 0)
    wanted = [learning_rate(step, schedule, 0.01, 2, 12, 1e-5) for step in range(12)]
    if schedule == "inverse-sqrt":  # 1/sqrt(seconds so far) in place of 1/sqrt(step + 1)
        wanted = wanted[:2] + [0.01 * (2 / step) ** 0.5 for step in range(2, 12)]
    assert rates.seen == pytest.approx(wanted)


def test_a_run_that_goes_on_keeps_its_clock(tmp_path: Path) -> None:
    """Killed after seven seconds, with checkpoints every five: five more seconds and all is as in one run."""
    whole, _ = run(tmp_path / "whole", by_time(), Steps())

    class Killed(Exception):
        pass

    calls = 0

    def killing(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += model.training
        if calls == 8:
            raise Killed
        return squared_error(model, batch)

    with pytest.raises(Killed):
        run(tmp_path / "cut", by_time(), Steps(), killing)
    assert load_checkpoint(newest_checkpoint(tmp_path / "cut"))["seconds"] == 5.0
    resumed, result = run(tmp_path / "cut", by_time(), Steps())
    assert (result["step"], result["reason"], result["minutes"]) == (12, "finished", pytest.approx(0.2))
    assert_same(whole.model, resumed.model)
    _, again = run(tmp_path / "cut", by_time(), Steps())
    assert again["step"] == 12  # its time is over


def test_of_the_clock_a_checkpoint_has_the_seconds_alone_where_steps_rule(tmp_path: Path) -> None:
    run(tmp_path, options(max_steps=4, warmup_steps=2), Steps())
    assert load_checkpoint(newest_checkpoint(tmp_path))["warmed"] is None


def test_slower_steps_are_fewer_and_end_at_the_same_rate(tmp_path: Path) -> None:
    rates = Rates()
    source = Steps(2.0)
    trainer = Trainer(by_time(), make_model(), squared_error, source, [], tmp_path, now=source.now)
    rates.watch(trainer.train_step)
    assert trainer.run()["step"] == 6
    wanted = [learning_rate(step, "cosine", 0.01, 2, 6, 1e-5) for step in range(2, 6)]
    assert rates.seen[2:] == pytest.approx(wanted)


def test_what_a_clock_needs_is_asked_for() -> None:
    for changes, name in (({"max_minutes": 0.0}, "max_minutes"), ({"max_epochs": 2.0}, "max_epochs"),
                          ({"schedule": "inverse-sqrt", "warmup_steps": 0}, "warmup_steps")):
        with pytest.raises(ValueError, match=rf"TrainerOptions.{name} must .*TrainerOptions.progress time"):
            by_time(**changes)
    with pytest.raises(ValueError, match="TrainerOptions.progress must"):
        options(progress="clock")


def run_as_process(folder: str, clocks: list[float]) -> None:
    """One of two data parallel processes, whose clocks run at other speeds; each leaves its rates."""
    from icefall_fusion.common.processes import init_distributed

    rank, world, device = init_distributed("cpu")
    source = Steps(clocks[rank], rank=rank, world=world)
    trainer = Trainer(by_time(), make_model(), squared_error, source, list(Lines()), folder, device,
                      now=source.now)
    rates = Rates()
    rates.watch(trainer.train_step)
    trainer.run()
    torch.save(rates.seen, Path(folder) / f"rates-{rank}.pt")


def test_processes_go_by_the_clock_of_the_first(tmp_path: Path) -> None:
    run_two_processes("from tests.train.test_clock_and_averages import run_as_process as run; "
                      f"run({str(tmp_path)!r}, [1.0, 3.0])")
    first, second = (torch.load(tmp_path / f"rates-{rank}.pt") for rank in range(2))
    assert first == second and len(first) == 12


# Averages of the weights.


def test_averages_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Float64 arithmetic over the checkpoints of all steps; what is not trained is left out."""
    settings = options(save_every_steps=1, keep_checkpoints=9, ema_decay=0.7)
    model = make_model()
    model[0].bias.requires_grad_(False)
    start = {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(settings, model, squared_error, Lines(), list(Lines()), tmp_path)
    trainer.run()
    for step in range(8):
        weights = load_checkpoint(checkpoint_path(tmp_path, step + 1))["model"]
        decay = min(0.7, (1 + step) / (10 + step))
        start = {name: decay * mean + (1 - decay) * weights[name].double() for name, mean in start.items()}
    state = load_checkpoint(checkpoint_path(tmp_path, 8))["ema"]
    assert state["updates"] == 8 and set(state["weights"]) == set(start)
    for name, mean in state["weights"].items():
        torch.testing.assert_close(mean.double(), start[name], rtol=1e-5, atol=1e-6)
    assert trainer.ema.decay == 0.7


def test_validation_and_exports_see_the_averages_and_training_does_not(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    plain = make_model()
    Trainer(options(), plain, squared_error, Lines(), list(Lines()), tmp_path / "plain").run()
    model = make_model()
    trainer = Trainer(
        options(ema_decay=0.9), model, squared_error, Lines(), list(Lines()), tmp_path / "ema",
        on_save=lambda step: seen.update({name: p.clone() for name, p in model.state_dict().items()}),
    )
    trainer.run()
    assert_same(plain, model)  # averages change nothing in the training
    assert all(torch.equal(seen[name], mean) for name, mean in trainer.ema.state_dict()["weights"].items())
    averaged = make_model()
    averaged.load_state_dict(seen)
    with torch.no_grad():
        errors = [squared_error(averaged.eval(), batch)[0] for batch in Lines()]
    assert trainer.last_valid["loss"] == pytest.approx(float(sum(errors)) / 20, rel=1e-5)


def test_averages_go_on_after_a_stop_and_may_begin_late(tmp_path: Path, capsys: Any) -> None:
    whole = Trainer(options(ema_decay=0.9), make_model(), squared_error, Lines(), [], tmp_path / "whole")
    whole.run()
    for steps in (3, 8):
        part = Trainer(options(ema_decay=0.9, max_minutes=0.0, save_every_steps=3), make_model(),
                       squared_error, Lines(), [], tmp_path / "parts")
        part.total_steps = steps
        part.run()
    for mean, other in zip(whole.ema.means, part.ema.means):
        assert torch.equal(mean, other)
    Trainer(options(save_every_steps=3), make_model(), squared_error, Lines(), [], tmp_path / "none").run()
    late = Trainer(options(ema_decay=0.9, max_steps=9), make_model(), squared_error, Lines(), [],
                   tmp_path / "none")
    assert "holds no averages" in capsys.readouterr().err
    assert all(torch.equal(p, mean) for p, mean in zip(late.ema.parameters, late.ema.means))
    other = {"updates": 1, "weights": {"other": torch.zeros(1)}}
    with pytest.raises(ValueError, match="averages of the checkpoint must be of the parameters"):
        Ema(make_model(), 0.5).load_state_dict(other)


def test_an_average_is_a_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: list[str] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(function.name())
            return function(*args, **(kwargs or {}))

    ema = Ema(make_model(), 0.9)
    with Counting():
        ema.update()
    assert [name for name in calls if "detach" not in name] == ["aten::_foreach_lerp_.Scalar"]


# Steps without waiting, as on a GPU.


def train_deferred(folder: Path, deferred: bool, loss: Any, **changes: Any) -> tuple[Trainer, Any]:
    model = make_model()
    trainer = Trainer(options(**changes), model, loss, Lines(), list(Lines()), folder)
    trainer.train_step.deferred = deferred
    return trainer, trainer.run()


class NanAt:
    """A loss that is not finite in some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int, dict[str, Any]]:
        loss, weight, metrics = squared_error(model, batch)
        self.calls += model.training
        bad = model.training and self.calls in self.steps
        return loss * float("nan") if bad else loss, weight, metrics


@pytest.mark.parametrize("steps", [(), (3,), (2, 5), (8,)])
def test_a_step_that_the_device_skips_is_one_that_the_host_skips(tmp_path: Path, steps: tuple) -> None:
    """The path of GPUs on a CPU: the same model, figures and checkpoints, also where steps are skipped."""
    (now, plain), (late, result) = (
        train_deferred(tmp_path / str(deferred), deferred, NanAt(*steps), nan_limit=2, save_every_steps=4)
        for deferred in (False, True)
    )
    assert_same(now.model, late.model)
    assert result["skipped"] == plain["skipped"] == len(steps) and now.items_seen == late.items_seen
    assert result["valid"] == plain["valid"]
    states = [load_checkpoint(checkpoint_path(tmp_path / str(deferred), 4)) for deferred in (False, True)]
    assert states[0]["items_seen"] == states[1]["items_seen"]
    assert states[0]["skipped"] == states[1]["skipped"]


def test_too_many_skipped_steps_end_a_training_one_step_later(tmp_path: Path) -> None:
    loss = NanAt(*range(2, 9))
    with pytest.raises(RuntimeError, match=r"at step 3: .* not finite in 3 steps in a row \(nan_limit=3\)"):
        train_deferred(tmp_path, True, loss, nan_limit=3, valid_every_steps=0)
    assert loss.calls == 5  # steps 2, 3 and 4, counted from 1, and the one that was under way
