"""Kills stages of the LibriHeavy recipe at random moments, runs them again, compares with undisturbed runs.
Knows: the recipe's scripts, its stand-in. Must not know: how a stage works, what its files mean (compare.py).

Usage: see kill_resume.sh.
"""
from __future__ import annotations

import argparse
import dataclasses
import random
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, NamedTuple

import compare
from process_tree import ProcessTree
from report import describe, table

from icefall_fusion.common.checks import check, check_at_least, check_choice
from icefall_fusion.common.command_line import REFUSED, parse_options
from icefall_fusion.common.environment import describe_environment
from icefall_fusion.common.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RECIPE, MINIBOOKS = ROOT / "egs" / "libriheavy" / "ASR", ROOT / "egs" / "minibooks" / "ASR" / "pretrained"
STAGES = ("fbank", "train", "decode")
MISSES = 5  # tries to kill a run before it ends by itself
QUICK_METHODS = "attention-rescoring,ngram-shallow,llm-delayed-shortest"


@dataclass(frozen=True)
class KillResumeOptions:
    """Kill stages of the recipe, resume them and compare their files with those of undisturbed runs.

    Args:
        stages: of fbank, train and decode.
        trials: kills of each stage, each from a fresh start; their moments are spread over the stage's time
            (of processors: it does not depend on other jobs of the machine).
        kills: in each trial: this many times before the stage may end.
        seed: of the moments.
        earliest: part of a stage's time at whose beginning it is not killed: Python is loading there.
        world_size: processes that train and decode.
        download: folder with the stand-in; empty: it is made.
        work: folder of all runs; empty: a temporary one, removed when all is well.
        out: the report in JSON; empty: kill_resume.json of the folder of all runs.
        quick: features by one process, only the acoustic model, some utterances decoded by some methods with
            MiniBooks' weights.
    """

    stages: tuple[str, ...] = STAGES
    trials: int = 3
    kills: int = 1
    seed: int = 1
    earliest: float = 0.1
    world_size: int = 1
    download: str = ""
    work: str = ""
    out: str = ""
    quick: bool = False

    def __post_init__(self) -> None:
        check(len(self.stages) > 0, "KillResumeOptions.stages", "name at least one stage", self.stages)
        for stage in self.stages:
            check_choice(stage, STAGES, "KillResumeOptions.stages")
        check_at_least(1, self, "trials", "kills", "world_size")
        check(0 <= self.earliest < 1, "KillResumeOptions.earliest", "lie in 0..1", self.earliest)


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe.

    Args:
        name: one of STAGES.
        command: (folder) -> the command that is run, killed and run again.
        result: name of the part of the folder that it fills.
        begin: (folder) -> None; writes the input of the stage there.
        compare: (undisturbed result, resumed one) -> differences.
        progress: (result) -> how far it is.
    """

    name: str
    command: Callable[[Path], list[str]]
    result: str
    begin: Callable[[Path], None]
    compare: Callable[[Path, Path], list[str]]
    progress: Callable[[Path], str]


class Cost(NamedTuple):
    """What a command took: of the clock, and of all processors."""

    seconds: float
    cpu_seconds: float


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Chaos:
    """All stages and their runs in one folder.

    Args:
        options: see there.
        work: the folder.
    """

    def __init__(self, options: KillResumeOptions, work: Path) -> None:
        self.options, self.work = options, work
        self.download = Path(options.download).absolute() if options.download else work / "download"
        self.random = random.Random(options.seed)
        self.log = work / "runs.log"
        self.data = work / "fbank" / "undisturbed" / "data"  # of training and decoding

    def run(self) -> dict[str, Any]:
        """Run all stages; return the report."""
        environment = {**describe_environment("cpu"), "options": dataclasses.asdict(self.options)}
        report: dict[str, Any] = {"same": False, **environment, "stages": []}
        self._finish(self._prepare("0", "2", self.work / "prepared"))
        for stage in self._stages():
            if stage.name in self.options.stages:
                report["stages"].append(self._try_stage(stage))
            elif stage.name == "fbank":  # the others need its result
                self._undisturbed(stage)
            if stage.name == "fbank" and "train" in self.options.stages:
                self._finish(self._prepare("4", "4", self.data))
        trials = [trial for stage in report["stages"] for trial in stage["trials"]]
        report["same"] = all(not trial["differences"] for trial in trials)
        return report

    def _prepare(self, first: str, last: str, data: Path) -> list[str]:
        return [
            "bash", str(RECIPE / "prepare.sh"), "--config", "tiny", "--download", str(self.download),
            "--data-dir", str(data), "--stage", first, "--stop-stage", last, "--shard-size", "3",
            "--workers", "1" if self.options.quick else "2",
        ]

    def _train(self, folder: Path) -> list[str]:
        last = ["--stop-stage", "0"] if self.options.quick else []
        return [
            "bash", str(RECIPE / "train.sh"), "--config", "tiny", "--data-dir", str(self.data),
            "--exp-dir", str(folder / "exp"), "--world-size", str(self.options.world_size), *last,
            "--", "--trainer.save_every_steps", "4", "--trainer.valid_every_steps", "4",
        ]

    def _decode(self, folder: Path) -> list[str]:
        quick = []
        if self.options.quick:
            quick = ["--stage", "2", "--stop-stage", "2", "--limit", "4", "--methods", QUICK_METHODS]
        return [
            "bash", str(RECIPE / "decode.sh"), "--config", "tiny", "--data-dir", str(self.data),
            "--exp-dir", str(folder / "exp"), "--pretrained-dir", str(MINIBOOKS),
            "--llm", str(MINIBOOKS / "llm"), "--world-size", str(self.options.world_size), *quick,
        ]

    def _stages(self) -> list[Stage]:
        def copy_prepared(folder: Path) -> None:
            shutil.copytree(self.work / "prepared", folder / "data")

        def nothing(folder: Path) -> None:
            folder.mkdir(parents=True)

        def tuned(folder: Path) -> None:
            (folder / "exp").mkdir(parents=True)
            if self.options.quick:
                shutil.copy(MINIBOOKS / "weights.yaml", folder / "exp")

        return [
            Stage("fbank", lambda folder: self._prepare("3", "3", folder / "data"), "data", copy_prepared,
                  compare.fbank, compare.fbank_progress),
            Stage("train", self._train, "exp", nothing, compare.training, compare.training_progress),
            Stage("decode", self._decode, "exp", tuned, compare.decoding, compare.decoding_progress),
        ]

    # --- runs --------------------------------------------------------------------------------------------

    def _start(self, command: list[str]) -> ProcessTree:
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(command)}\n")
        return ProcessTree(command, {"PYTHON": sys.executable}, self.log)

    def _finish(self, command: list[str]) -> Cost:
        """Run a command to its end; return its cost."""
        begun, before, tree = time.monotonic(), _cpu_of_children(), self._start(command)
        try:
            code = tree.wait()
        finally:
            tree.kill()
        if code != 0:
            raise RuntimeError(f"{' '.join(command)} ended with code {code}, see {self.log}")
        return Cost(time.monotonic() - begun, _cpu_of_children() - before)

    def _undisturbed(self, stage: Stage) -> Cost:
        folder = self.work / stage.name / "undisturbed"
        stage.begin(folder)
        return self._finish(stage.command(folder))

    def _try_stage(self, stage: Stage) -> dict[str, Any]:
        cost = self._undisturbed(stage)
        print(f"{stage.name}: {cost.seconds:.1f} s undisturbed, {cost.cpu_seconds:.1f} s of CPU", flush=True)
        trials = [self._try_once(stage, cost.cpu_seconds, number) for number in range(self.options.trials)]
        command = stage.command(self.work / stage.name / "undisturbed")
        return {"stage": stage.name, "command": command, **cost._asdict(), "trials": trials}

    def _try_once(self, stage: Stage, cpu_seconds: float, number: int) -> dict[str, Any]:
        """Kill a fresh run of a stage, finish it, compare."""
        options, folder = self.options, self.work / stage.name / f"killed-{number}"
        trial: dict[str, Any] = {"kills": [], "missed": 0}
        while len(trial["kills"]) < options.kills:
            if not trial["kills"]:
                shutil.rmtree(folder, ignore_errors=True)
                stage.begin(folder)
            moment = self.random.random()
            if not trial["kills"]:
                moment = (number + moment) / options.trials
            share = options.earliest + (1 - options.earliest) * moment * 0.8 ** trial["missed"]
            tree = self._start(stage.command(folder))
            try:
                reached = tree.wait_for_cpu(share * cpu_seconds)
            finally:
                killed = tree.kill()
            if reached and killed:
                left = stage.progress(folder / stage.result)
                kill = {"cpu_seconds": share * cpu_seconds, "share": share, "processes": killed, "left": left}
                trial["kills"].append(kill)
            elif trial["kills"]:
                break  # the rest took less time than that
            elif trial["missed"] == MISSES:
                raise RuntimeError(f"{stage.name} ends before it can be killed, see {self.log}")
            else:
                trial["missed"] += 1
        trial["resumed"] = self._finish(stage.command(folder))._asdict()
        reference = self.work / stage.name / "undisturbed"
        try:
            trial["differences"] = stage.compare(reference / stage.result, folder / stage.result)
        except (OSError, ValueError, KeyError) as error:  # files that can no longer be read
            trial["differences"] = [f"{type(error).__name__}: {error}"]
        left_over = [path for path in folder.rglob(".*") if path.is_file() and path.suffix != ".done"]
        trial["left_over_files"], trial["left_over_bytes"] = len(left_over), sum(
            path.stat().st_size for path in left_over
        )
        print(describe(stage.name, number, trial), flush=True)
        return trial


def main() -> int:
    """Run from the command line; return 0, 1 where a resumed run differs or fails, or 2."""
    words = [f"--{word[2:].replace('-', '_')}" if word.startswith("--") else word for word in sys.argv[1:]]
    try:
        options = parse_options(KillResumeOptions, words, "bash tools/chaos/kill_resume.sh")
        if not Path("/proc/self/environ").is_file():
            raise FileNotFoundError("/proc must be there: it is how all processes of a stage are found")
    except (ValueError, TypeError, FileNotFoundError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    work = Path(options.work or tempfile.mkdtemp(prefix="kill-resume-")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    for name in ("prepared", *STAGES):  # of an earlier call; the stand-in stays
        shutil.rmtree(work / name, ignore_errors=True)
    try:
        report = Chaos(options, work).run()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    target = Path(options.out) if options.out else work / "kill_resume.json"
    write_json(target, report)
    print(table(report))
    if report["same"] and not options.work:
        shutil.rmtree(work)
    if not report["same"] or options.work or options.out:
        print(f"report: {target}, all runs: {work}" if work.exists() else f"report: {target}")
    return 0 if report["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
