"""Runs the steps of a day on a GPU, each by itself, and keeps every figure in one file from the first row on.
Knows: steps, processes, files of results. Must not know: what a step measures.

    bash tools/gpu_day.sh --call 1 --out DIR      # sets up Python, then calls this

DIR gets gpu.json (rewritten whole while a step runs and after it) and gpu.log. A step that is cut off or
crashes leaves the next ones unharmed. After a CUDA error a step is run again in its smallest form, with
CUDA_LAUNCH_BLOCKING=1 and, where compute-sanitizer is, under it. It has never run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, Optional, Sequence

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from processes import Log, Outcome, run_command, stop_on_signals  # noqa: E402
from steps import STEPS, Step, select  # noqa: E402

BUDGETS = {1: 420, 2: 290}  # seconds of a call, from its start
LEAST = 8  # seconds with which a step is still begun
TO_END = 15  # seconds that a program has to end after the minutes that it is given
AGAIN = 70  # seconds for all repetitions after CUDA errors
SLACK_ON_CPU = 20  # a rehearsal's limits are that many times larger
SMALL = 2**19  # bytes of a file that may be put with others
MOST_FILES, MOST_BYTES, MOST_FOLDERS = 8, 16 * 2**20, 2  # that come back
SWITCH = "ICEFALL_FUSION_WITHOUT_KERNELS"
_CUDA_ERROR = re.compile(
    r"CUDA error|CUDA driver error|illegal memory access|misaligned address|device-side assert|"
    r"Triton Error \[CUDA\]|cudaError|CUBLAS_STATUS_|an illegal instruction"
)
_MACHINE = """
import json, platform, torch
there = torch.cuda.is_available()
found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": there}
if there:
    card = torch.cuda.get_device_properties(0)
    found.update(gpu=card.name, gpu_bytes=card.total_memory, multiprocessors=card.multi_processor_count,
                 capability=f"{card.major}.{card.minor}", cuda_version=torch.version.cuda)
for name in ("triton", "transformers", "numpy", "torchaudio", "lhotse", "kaldialign"):
    try:
        found[name] = __import__("importlib.metadata", fromlist=["version"]).version(name)
    except Exception:
        found[name] = "absent"
print(json.dumps(found))
"""


class Day:
    """The steps of one call, their state and their results.

    Args:
        args: of the command line.
        begun: seconds since the epoch when the call began.
    """

    def __init__(self, args: argparse.Namespace, begun: float) -> None:
        self.args, self.begun = args, begun
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-day-"))
        self.log = Log(self.out / "gpu.log")
        self.cpu = args.device == "cpu"
        self.budget = args.budget or (3600.0 if self.cpu else BUDGETS[args.call])
        self.again_left = float(AGAIN)
        self.off: list[str] = []
        self.state: dict[str, Any] = {
            "call": args.call,
            "device": args.device,
            "budget": self.budget,
            "steps": {},
            **_packed(args.payload),
        }

    def left(self) -> float:
        """Return the seconds of the budget that are left."""
        return self.budget - (time.time() - self.begun)

    def save(self) -> None:
        """Write all that is known, whole or not at all."""
        self.state["seconds"] = round(time.time() - self.begun, 1)
        temporary = self.out / "gpu.json.new"
        temporary.write_text(json.dumps(self.state, indent=1), encoding="utf-8")
        os.replace(temporary, self.out / "gpu.json")

    def find_machine(self) -> bool:
        """Note the machine and its versions; return whether what is asked for is there."""
        said = self.scratch / "machine"
        run_command([sys.executable, "-c", _MACHINE], 90, said, self.environment(True))
        lines = said.read_text(errors="replace").splitlines()
        try:
            self.state["machine"] = json.loads(lines[-1])
        except (IndexError, ValueError):
            self.state["machine"] = {"error": lines[-5:]}
        self.state["machine"]["cores"] = os.cpu_count()
        self.save()
        return self.cpu or bool(self.state["machine"].get("cuda"))

    def environment(self, trusts: bool, **more: str) -> dict[str, str]:
        """Return the environment of a step."""
        cache = Path(tempfile.gettempdir()) / "icefall-fusion-gpu"  # a second call on the machine finds it
        cache.mkdir(exist_ok=True, mode=0o755)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        made = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "ICEFALL_FUSION_CACHE": str(cache / "native"),
            "TOKENIZERS_PARALLELISM": "false",
            **more,
        }
        if trusts and self.off:
            made[SWITCH] = " ".join(self.off)
        return made

    def run(self, step: Step) -> bool:
        """Run one step as far as time allows; return whether all is well with it."""
        entry: dict[str, Any] = {"limit": step.limit}
        self.state["steps"][step.name] = entry
        if self.cpu and step.cpu is None:
            entry["status"] = "nothing to run on a CPU"
        elif self.left() < LEAST:
            entry["status"] = "no time"
        if "status" in entry:
            self.log.say(f"-- {step.name}: {entry['status']}")
            self.save()
            return not self.left() < LEAST
        limit = min(step.limit * (SLACK_ON_CPU if self.cpu else 1), self.left() - 3)
        lines = self._attempt(step, entry, step.name, limit, [], {})
        if step.name == "smoke":
            self._switch_off(entry)
        if entry["status"] != "done" and step.small is not None and _CUDA_ERROR.search("\n".join(lines)):
            self._again(step, entry)
        return entry["status"] == "done"

    def _attempt(
        self,
        step: Step,
        entry: dict[str, Any],
        name: str,
        limit: float,
        more: Sequence[str],
        environment: dict[str, str],
        before: Sequence[str] = (),
    ) -> list[str]:
        """Run a step's command, keep its outcome and rows in ``entry``; return the last lines it said."""
        result, said = self.scratch / f"{name}.json", self.scratch / f"{name}.log"
        words = fill(step, self.args, result, self.cpu, (limit - TO_END) / 60)
        command = [*before, "bash" if words[0].endswith(".sh") else sys.executable, *words, *more]
        entry.update(status="runs", command=" ".join(command[1:]))
        self.log.say(f"== {name}, at most {limit:.0f} s of {self.left():.0f} s left")
        self.log.follow(said)
        self.save()

        def keep() -> None:
            self.log.copy()
            if _read_result(result, entry):
                self.save()

        try:
            whole = {**self.environment(step.trusts), **environment}
            outcome = run_command(command, limit, said, whole, keep)
        finally:
            _read_result(result, entry)
        lines = self.log.close_source()
        entry.update(status=_status(outcome), exit_code=outcome.code, seconds=round(outcome.seconds, 1))
        if entry["status"] != "done":
            entry["said"] = lines[-25:]
        for line in lines[-7:]:
            print(f"   {line[:150]}", flush=True)
        self.log.say(f"-- {name}: {entry['status']} after {outcome.seconds:.1f} s")
        self.save()
        return lines

    def _switch_off(self, entry: dict[str, Any]) -> None:
        """Switch off for later steps what failed in the first one: the fallback is measured then."""
        rows = (entry.get("result") or {}).get("rows", [])
        self.off = sorted({row["switch"] for row in rows if not row["good"] and row.get("switch")})
        self.state["switched_off"] = self.off
        if self.off:
            self.log.say(f"!! switched off by {SWITCH}: {' '.join(self.off)}; their fallbacks are measured")
        self.save()

    def _again(self, step: Step, entry: dict[str, Any]) -> None:
        """Find where a CUDA error comes from: smallest form, launch by launch, then under the sanitizer."""
        sanitizer = shutil.which("compute-sanitizer")
        for name, before in (("blocking", []), ("sanitizer", [sanitizer, "--tool", "memcheck"])):
            limit = min(40.0, self.again_left, self.left() - 3)
            if limit < LEAST or before and sanitizer is None:
                continue
            found = entry[f"again_{name}"] = {}
            self._attempt(
                step,
                found,
                f"{step.name}-{name}",
                limit,
                shlex.split(step.small or ""),
                {"CUDA_LAUNCH_BLOCKING": "1"},
                before,
            )
            self.again_left -= found["seconds"]

    def finish(self) -> None:
        """Leave in the folder what can come back: few files, none too large, none too deep."""
        gather_small(self.out)
        for path in too_much(self.out):
            self.log.say(f"!! {path.relative_to(self.out)} cannot come back ({path.stat().st_size:,} bytes)")
        self.save()
        shutil.rmtree(self.scratch, ignore_errors=True)


def fill(
    step: Step, args: argparse.Namespace, result: Path, cpu: bool, minutes: float = 5.0
) -> list[str]:
    """Return a step's program and its arguments."""
    words = step.words(cpu)
    if step.given is not None and (Path(args.payload) / step.given[0]).exists():
        words += step.given[1].split()
    names = {"device": args.device, "payload": args.payload, "result": result, "out": args.out,
             "minutes": f"{minutes:.2f}"}
    for name, value in names.items():
        words = [word.replace(f"{{{name}}}", str(value)) for word in words]
    return words


def gather_small(out: Path) -> None:
    """Put small files into small.tar, which ``tar xf`` unpacks, if a folder has more than can come back."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    ours = ("gpu.json", "gpu.log")
    small = [path for path in files if path.stat().st_size < SMALL and path.name not in ours]
    if len(files) <= MOST_FILES or not small:
        return
    with tarfile.open(out / "small.tar", "w") as archive:
        for path in small:
            archive.add(path, str(path.relative_to(out)))
    for path in small:
        path.unlink()


def too_much(out: Path) -> list[Path]:
    """Return the files of a folder that would not come back: too large, too deep, or too many."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    ours = [path for path in files if path.name in ("gpu.json", "gpu.log")]
    rest = [path for path in files if path not in ours]

    def fits(path: Path) -> bool:
        return path.stat().st_size < MOST_BYTES and len(path.relative_to(out).parts) <= MOST_FOLDERS + 1

    bad = [path for path in files if not fits(path)]
    good = [path for path in [*ours, *rest] if path not in bad]
    return bad + good[MOST_FILES:]


def _read_result(path: Path, entry: dict[str, Any]) -> bool:
    """Take over a step's own file if it is new and whole; return whether it is."""
    try:
        stamp = path.stat().st_mtime_ns
        if stamp == entry.get("stamp"):
            return False
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    entry.update(result=result, stamp=stamp)
    return True


def _status(outcome: Outcome) -> str:
    if outcome.cut:
        return "cut off" if outcome.code is not None else "cut off, and it cannot be ended"
    return "done" if outcome.code == 0 else f"failed ({outcome.code})"


def _packed(payload: str) -> dict[str, Any]:
    """Return what the payload says of itself: the commit that was packed."""
    try:
        return {"packed": json.loads((Path(payload) / "pack.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError):
        return {"packed": None}


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Return the options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--call", type=int, default=1, choices=[1, 2], help="1: figures; 2: training")
    parser.add_argument("--out", default="bench/gpu", help="folder for gpu.json and gpu.log")
    parser.add_argument(
        "--budget", type=float, default=0, help=f"seconds from the start; 0: {BUDGETS}"
    )
    parser.add_argument("--only", nargs="+", default=[], help="steps, also such as are not of a call")
    parser.add_argument("--list", action="store_true", help="print all steps and their commands")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a tiny rehearsal")
    parser.add_argument("--payload", default=".gpu", help="folder that tools/gpu_pack.sh made")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the steps; return 0: all is well, 1: something is not, 2: wrong options, 3: there is no GPU."""
    args = parse()
    os.chdir(ROOT)
    if args.list:
        for step in STEPS:
            command = " ".join(fill(step, args, Path("RESULT"), args.device == "cpu"))
            print(f"{step.name} (call {step.call or '-'}, {step.limit} s): {command}")
        return 0
    try:
        steps = select(args.call, args.only)
    except ValueError as error:
        print(f"gpu_day.sh: {error}", file=sys.stderr)
        return 2
    stop_on_signals()
    day = Day(args, float(os.environ.get("GPU_DAY_BEGUN") or time.time()))
    good = False
    try:
        if not day.find_machine():
            day.log.say("gpu_day.sh: PyTorch sees no CUDA device here, so nothing was checked")
            return 3
        results = [day.run(step) for step in steps]
        good = all(results)
    finally:
        day.finish()
    failed = [name for name, entry in day.state["steps"].items() if entry["status"] != "done"]
    day.log.say(f"gpu_day.sh: {day.out / 'gpu.json'}; " + (f"not done: {failed}" if failed else "all done"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
