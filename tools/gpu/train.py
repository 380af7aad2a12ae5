"""Text to trained models and a card within some minutes; a sequence of the package's own jobs.
Knows: jobs and their folders, the clock. Must not know: how a job does its work.

    bash tools/gpu_train.sh --minutes 9.5 --out DIR --text BOOKS   # sets up Python, then calls this

It has never run on a GPU; a test runs all of it on a CPU with the smallest sizes.
"""
from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import card  # noqa: E402
from carried import STORIES, held_out_books, in_pieces, shorten, unpack  # noqa: E402
from processes import at_once, end_group, run_command, stop_on_signals  # noqa: E402

RECIPE = ROOT / "egs/minibooks/ASR"
SETS = ("dev", "test-clean", "test-other")
METHODS = "ctc-greedy,ctc-prefix"
LM_SHARE, LM_FROM = 0.15, 7.0  # in fewer minutes the acoustic model needs them all
CHARACTERS = 14.5  # that a voice reads in a second
LLM_TOKENS = 8192  # of the LLM that is trained here
TO_START = 20.0  # seconds of a training before its clock begins: imports, features into the GPU's memory


class Run:
    """The stages of one call.

    Args:
        args: of the command line.
        begun: seconds since the epoch when the call began.
    """

    def __init__(self, args: argparse.Namespace, begun: float) -> None:
        self.args, self.begun = args, begun
        self.out, self.work = Path(args.out).resolve(), Path(args.work).resolve()
        if not args.resume:
            shutil.rmtree(self.work, ignore_errors=True)
        self.data, self.exp = self.work / "data", self.work / "ctc_aed"
        for folder in (self.out, self.work / "said", self.data):
            folder.mkdir(parents=True, exist_ok=True)
        self.conf = RECIPE / ("conf/tiny" if args.tiny else "conf")
        self.facts: dict[str, Any] = {"stages": {}}
        if (self.work / "facts.json").is_file():  # of the call that this one goes on from
            self.facts = json.loads((self.work / "facts.json").read_text(encoding="utf-8"))
        self.facts.update(options=vars(args), error=None)
        self.copied = 0.0
        self.workers = str(args.workers or os.cpu_count() or 1)
        self.environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor")}

    def left(self) -> float:
        """Return the seconds of the minutes that are left."""
        return self.begun + self.args.minutes * 60 - time.time()

    def job(self, stage: str, name: str, *options: str, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Run a job of the package; return whether it ended by itself.

        Raises:
            RuntimeError: it failed; with what it said last.
        """
        said = self.work / "said" / f"{stage}.txt"
        command = [sys.executable, "-m", "icefall_fusion", name, *options]
        outcome = run_command(command, max(1.0, self.left()), said, self.environment, meanwhile)
        self.facts["stages"][stage] = {"seconds": round(outcome.seconds, 1), "code": outcome.code}
        left = max(0.0, self.left())
        print(f"gpu_train.sh: {stage}: {outcome.seconds:.0f} s, {left:.0f} s are left", flush=True)
        if outcome.code not in (0, 3, 4) and not outcome.cut:  # 3: some input was skipped, 4: time was over
            end = "\n".join(said.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{stage} failed with exit code {outcome.code}:\n{end}")
        return not outcome.cut

    def config(self, name: str) -> list[str]:
        """Return the option that names a file of the configuration, if there is that file."""
        path = self.conf / f"{name}.yaml"
        return ["--config", str(path)] if path.is_file() else []

    # Stages.

    def prepare(self) -> None:
        """Books to utterances, which are spoken, vocabularies; the pieces are those of the shipped model."""
        if (self.data / "text/selected_train.jsonl").is_file():
            return
        books = self.work / "books"
        unpack([Path(text) for text in self.args.text], books)
        self.facts["books"] = len(list(books.glob("*.txt")))
        self.facts["dev and test are the recipe's"] = held_out_books(books) == held_out_books(None)
        if self.args.lm_share == 0:  # an LLM reads it all
            shorten(books, 2 * self.args.hours * 3600 * CHARACTERS)
        data = ("--data_dir", str(self.data))
        text = [*self.config("prepare-text"), "--text", str(books), "--workers", self.workers]
        self.job("text", "prepare-text", *text, *data)
        hours = [] if self.args.tiny else ["--train_hours", str(self.args.hours)]
        chosen = [*self.config("select-utterances"), *hours, "--at_most", "true"]
        self.job("selection", "select-utterances", *chosen, *data)
        llm = 0 if self.args.lm_share == 0 else LLM_TOKENS
        self.job("vocabularies", "train-tokenizers", *self.config("train-tokenizers"), *data,
                 "--llm_tokens", str(llm), "--pieces_from", str(RECIPE / "pretrained/ctc_aed"))

    def speak(self) -> None:
        """Dev, both tests and, until its share of the minutes is over, training speech: all at once.

        A job starts for some seconds, and none but that of training has much to say.
        """
        few = str(max(1, int(self.workers) // 4))
        small = [] if self.args.tiny else ["--shard_size", "50"]
        jobs = [self.speech(name, few, *small) for name in SETS if not self.manifest(name).is_file()]
        warm = None
        if not self.manifest("train").is_file():
            if self.args.compile:
                at_once(jobs)
                jobs, warm = [], self.begin_compiling()
            limits = ["--max_minutes", f"{self.args.minutes * self.args.speak_share:.3f}"]
            limits += [] if self.args.tiny else ["--shard_size", "200"]
            jobs.append(self.speech("train", self.workers, *limits))
        try:
            at_once(jobs)
        except BaseException:
            if warm is not None:
                end_group(warm)
            raise
        if warm is not None:
            self.facts["compiled"] = self.end_compiling(warm)

    def speech(self, split: str, workers: str, *options: str) -> Callable[..., bool]:
        """Return the job that speaks a split."""
        common = [*self.config("synthesize"), "--data_dir", str(self.data), "--joined", "true"]
        common += ["--workers", workers, *options]
        return functools.partial(self.job, f"speech of {split}", "synthesize", "--split", split, *common)

    def manifest(self, split: str) -> Path:
        """Return the manifest of a split's audio."""
        return self.data / "manifests" / f"minibooks_cuts_{split}.jsonl.gz"

    def train_options(self, exp: Path) -> list[str]:
        """Return the options of a training of the acoustic model."""
        return [
            *self.config("ctc_aed_gpu"), "--data_dir", str(self.data), "--exp", str(exp),
            "--device", self.args.device, "--trainer.seed", str(self.args.seed),
        ]

    def begin_compiling(self) -> subprocess.Popen:
        """Train some compiled steps on dev, beside the speech: what they compile stays in the cache."""
        command = [sys.executable, "-m", "icefall_fusion", "train"]
        command += [*self.train_options(self.work / "compiling"), "--train_split", "dev"]
        command += ["--compile", "true", "--trainer.max_steps", "40"]
        with open(self.work / "said/compiling.txt", "wb") as said:
            return subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, env=self.environment, process_group=0
            )

    def end_compiling(self, process: subprocess.Popen) -> bool:
        """Wait a little for the compiled steps; return whether they went well, else say so."""
        try:
            good = process.wait(max(0.0, min(20.0, self.left() - 60))) == 0
        except subprocess.TimeoutExpired:
            good = False
        end_group(process)
        if not good:
            print("gpu_train.sh: compiling failed or took too long: training runs eager", flush=True)
        return good

    def minutes_to_train(self) -> float:
        """Return what its start, the decodes and the LLM leave for the acoustic model, by its own clock."""
        kept = TO_START + self.args.evaluation + self.args.lm_share * self.args.minutes * 60
        return self.args.train_minutes or max(0.05, (self.left() - kept) / 60)

    def train(self, minutes: float) -> None:
        """The acoustic model, for its minutes by the clock; every export is copied to the results at once."""
        options = [*self.train_options(self.exp), "--trainer.max_minutes", f"{minutes:.3f}"]
        if self.facts.get("compiled"):
            options += ["--compile", "true"]
        try:
            self.job("training", "train", *options, meanwhile=self.copy_export)
        finally:
            self.copy_export()

    def copy_export(self) -> None:
        """Copy a new export and the log to the results, whole; what fails here must end no training."""
        fresh = self.out / ".ctc_aed"
        try:
            self._copy_export(fresh)
        except (OSError, RuntimeError, ValueError) as error:  # a file vanished, for a newer export was begun
            print(f"gpu_train.sh: an export was not copied, or not its card: {error}", flush=True)
        shutil.rmtree(fresh, ignore_errors=True)

    def _copy_export(self, fresh: Path) -> None:
        config, target, old = self.exp / "export/config.json", self.out / "ctc_aed", self.out / ".old"
        written = config.stat().st_mtime if config.is_file() else 0.0
        if written <= self.copied:
            return
        shutil.copytree(self.exp / "export", fresh)
        if config.stat().st_mtime == written:  # else a newer one was begun meanwhile
            if target.is_dir():
                os.replace(target, old)
            os.replace(fresh, target)
            shutil.rmtree(old, ignore_errors=True)
            if (self.exp / "log.jsonl").is_file():  # there is none before the first validation
                shutil.copy(self.exp / "log.jsonl", self.out / "log.jsonl")
            self.copied = written
            self.write_card()

    def evaluate(self) -> bool:
        """Word error rates of dev and both tests, by greedy and by prefix search; whether there was time."""
        options = [word for split in SETS for word in (f"--test_sets.{split}", str(self.manifest(split)))]
        options += ["--emissions.model", str(self.exp / "export"), "--emissions.device", self.args.device]
        options += ["--methods", METHODS, "--out", str(self.work / "decode"), "--restart", "true"]
        whole = self.job("evaluation", "decode", *options)
        self.facts["results"] = card.word_errors(self.work / "decode/results.json")
        return whole

    def train_lm(self) -> None:
        """An LLM on the same books in what is left; it comes back in pieces, in place of the log."""
        streams, exp = self.data / "lm/llm", self.work / "llm"
        if not (streams / "train.npy").is_file():
            text = ["--data_dir", str(self.data), "--streams", "[llm]", "--workers", self.workers]
            self.job("lm text", "prepare-lm-text", *text)
        minutes = self.args.lm_minutes or max(0.02, (self.left() - (1 if self.args.tiny else 15)) / 60)
        options = [*self.config("llm_gpu"), "--data", str(streams), "--exp", str(exp)]
        options += ["--tokenizer", str(self.data / "llm_tokenizer"), "--device", self.args.device]
        self.job("llm", "train-lm", *options, "--trainer.max_minutes", f"{minutes:.3f}")
        self.facts["llm"] = card.curve(exp / "log.jsonl")
        self.carry_lm(exp / "export")

    def carry_lm(self, export: Path) -> bool:
        """Put the LLM into the results, in place of the log; return whether there is one."""
        if not (export / "config.json").is_file():
            print("gpu_train.sh: the minutes were too few for an LLM", flush=True)
            return False
        (self.out / "log.jsonl").unlink(missing_ok=True)
        in_pieces(export, self.out / "llm.tar")
        return True

    def write_card(self) -> None:
        """Write ``card.json``: all that is known now."""
        self.facts["seconds"] = round(time.time() - self.begun, 1)
        (self.work / "facts.json").write_text(json.dumps(self.facts), encoding="utf-8")
        card.write(self.out / "card.json", self.facts, self.data, self.exp)


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return the options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--minutes", type=float, default=9.5, help="of the whole call, from its start")
    add("--out", required=True, help="folder for what comes back")
    add("--text", nargs="+", default=[], help="books: .txt files, folders, tar archives")
    add("--work", default="/tmp/icefall-fusion-train", help="folder for speech and checkpoints")
    add("--resume", action="store_true", help="go on with what lies in --work")
    add("--hours", type=float, default=150.0, help="speech for training at most")
    add("--speak-share", type=float, default=0.2, help="of the minutes, for training speech")
    share = f"of the minutes, for the LLM: {LM_SHARE}, but 0 (none) below {LM_FROM:g} minutes"
    add("--lm-share", type=float, help=share)
    add("--evaluation", type=float, default=40.0, help="seconds kept for decoding")
    add("--train-minutes", type=float, default=0, help="of the acoustic model; 0: what is left")
    add("--lm-minutes", type=float, default=0, help="of the LLM; 0: what is left")
    add("--workers", type=int, default=0, help="processes; 0: one a core")
    add("--compile", action="store_true", help="compile layers while speech is made, and train with them")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--tiny", action="store_true", help="the smallest sizes, on the demo's stories")
    add("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.lm_share is None:
        args.lm_share = LM_SHARE if args.minutes >= LM_FROM or args.tiny else 0.0
    args.text = args.text or [str(STORIES if args.tiny else ROOT / ".gpu/call2/text")]
    return args


def main() -> int:
    """Run all stages; return 0, 1: a stage failed, 2: wrong options, 4: the minutes were too few."""
    args = parse()
    run = Run(args, float(os.environ.get("GPU_TRAIN_BEGUN") or time.time()))
    stop_on_signals()
    try:
        try:
            run.prepare()
        except FileNotFoundError as error:
            print(f"gpu_train.sh: {error}", file=sys.stderr)
            return 2
        run.speak()
        plan = run.work / "minutes"  # a resumed training keeps its length
        if not plan.is_file():
            plan.write_text(f"{run.minutes_to_train():.3f}")
        run.train(float(plan.read_text()))
        whole = run.evaluate()
        if args.lm_share > 0 and run.left() > 20:
            run.train_lm()
        return 0 if whole else 4
    except RuntimeError as error:
        run.facts["error"] = str(error)
        print(f"gpu_train.sh: {error}", file=sys.stderr)
        return 1
    finally:
        run.write_card()
        names = sorted(path.name for path in run.out.rglob("*") if path.is_file())
        print(f"gpu_train.sh: {run.out}: {', '.join(names)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
