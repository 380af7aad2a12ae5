"""The prepared day on a GPU: steps by themselves, results whole at any moment, imports, sizes, git's index.
Knows: tools/gpu, small commands as steps. Must not know: what steps measure.

The steps themselves have never run on a GPU; their rehearsal is ``tools/gpu_day.sh --device cpu``.
"""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "gpu"))
import day  # noqa: E402
import gpu_tests  # noqa: E402
import lean  # noqa: E402
import pack  # noqa: E402
import processes  # noqa: E402
import smoke  # noqa: E402
import steps  # noqa: E402
import wheels  # noqa: E402

#: What is imported only where it is there, or where it is asked for, and not by a step of the day.
NOT_ON_THE_DAY = {"bitsandbytes", "kaldifeat", "k2", "torchao", "kaldilm", "gguf", "kenlm", "onnx"}
NOT_ON_THE_DAY |= {"jieba", "onnxruntime", "sherpa_onnx", "sounddevice", "starlette", "uvicorn", "websockets"}
# benchmarks of word errors, of searches and servers there
OF_THE_CPU = {"compat", "context", "dialogue", "hotwords", "learning_curve", "quality", "retokenization",
              "serve_load", "transducer"}


# --- steps --------------------------------------------------------------------------------------------

WRITES = """
import json, os, sys, time
path, rows = sys.argv[1], []
for number in range(int(sys.argv[2])):
    rows.append(number)
    with open(path + ".new", "w") as file:
        json.dump({"rows": rows, "pad": "x" * 100_000}, file)
    os.replace(path + ".new", path)
    print("row", number, flush=True)
    time.sleep(0.05)
"""
HANGS = """
import subprocess, sys, time
code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", code])
print("child", child.pid, flush=True)
time.sleep(99)
"""
CRASHES = "import os; print('CUDA error: an illegal memory access was encountered', flush=True); os.abort()"


def make_step(name: str, code: str, more: str = "", limit: int = 20, **others: object) -> steps.Step:
    return steps.Step(name, limit, f"-c {shlex.quote(code)} {more}", **others)  # type: ignore[arg-type]


def make_day(tmp_path: Path, budget: float = 60.0) -> day.Day:
    args = SimpleNamespace(
        out=str(tmp_path / "out"), call=1, device="cuda", budget=budget, payload=str(tmp_path)
    )
    return day.Day(args, time.time())


def test_a_step_that_hangs_or_crashes_leaves_the_others_unharmed(tmp_path) -> None:
    run = make_day(tmp_path)
    for step in (
        make_step("hangs", HANGS, limit=3),
        make_step("crashes", CRASHES, small="small"),
        make_step("writes", WRITES, "{result} 3"),
        make_step("late", WRITES, "{result} 3"),
    ):
        if step.name == "late":
            run.budget = time.time() - run.begun + 2
        run.run(step)
    run.finish()
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]
    assert found["hangs"]["status"] == "cut off" and 2 < found["hangs"]["seconds"] < 14
    child = int(found["hangs"]["said"][0].split()[1])
    with pytest.raises(ProcessLookupError):  # the whole group is gone, though it would not be asked
        os.kill(child, 0)
    assert found["crashes"]["status"] == f"failed ({-signal.SIGABRT})"
    again = found["crashes"]["again_blocking"]
    assert again["command"].endswith("small") and "illegal memory access" in again["said"][0]
    assert found["writes"]["status"] == "done" and found["writes"]["result"]["rows"] == [0, 1, 2]
    assert found["late"]["status"] == "no time"
    assert "illegal memory access" in (tmp_path / "out" / "gpu.log").read_text()


def test_a_repetition_after_a_cuda_error_launches_one_by_one(tmp_path) -> None:
    run = make_day(tmp_path)
    code = "import os, sys; print(os.environ.get('CUDA_LAUNCH_BLOCKING')); sys.exit('CUDA error')"
    run.run(make_step("fails", code, small=""))
    entry = run.state["steps"]["fails"]
    assert entry["said"][0] == "None" and entry["again_blocking"]["said"][0] == "1"
    run.run(make_step("other", "import sys; sys.exit('no file')", small=""))
    assert "again_blocking" not in run.state["steps"]["other"]


RUNS = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import day, steps
args = SimpleNamespace(out=sys.argv[2], call=1, device="cuda", budget=60.0, payload=".")
step = steps.Step("writes", 50, f"{sys.argv[3]} {{result}} 900")
day.Day(args, time.time()).run(step)
"""


def test_the_results_are_whole_when_the_day_is_killed(tmp_path) -> None:
    (tmp_path / "writes.py").write_text(WRITES)
    command = [
        sys.executable,
        "-c",
        RUNS,
        str(ROOT / "tools/gpu"),
        str(tmp_path / "out"),
        str(tmp_path / "writes.py"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    path = tmp_path / "out" / "gpu.json"

    def rows() -> list[int]:
        entry = json.loads(path.read_text())["steps"].get("writes", {})
        return entry.get("result", {}).get("rows", [])

    while not path.exists() or len(rows()) < 5:
        assert process.poll() is None
        time.sleep(0.05)
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    os.killpg(int(child), signal.SIGKILL)
    assert len(rows()) >= 5 and not path.with_name("gpu.json.broken").exists()


def test_a_day_that_is_asked_to_end_ends_its_step_and_keeps_its_results(tmp_path) -> None:
    run = make_day(tmp_path)
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    processes.stop_on_signals()
    step = make_step(
        "asks", "import os, time; print(os.getpid(), flush=True); os.kill(os.getppid(), 15); time.sleep(99)"
    )
    try:
        with pytest.raises(SystemExit):
            run.run(step)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert run.log.close_source() and run.state["steps"]["asks"]["status"] == "runs"


def test_only_few_small_files_come_back_and_long_logs_lose_their_middle(tmp_path) -> None:
    out = tmp_path / "out"
    (out / "a/b/c").mkdir(parents=True)
    names = [
        "gpu.json",
        "gpu.log",
        *(f"weights-{number}" for number in range(6)),
        "zzz",
        "a/b/good",
        "a/b/c/deep",
    ]
    for name in names:
        (out / name).write_text("x")
    with open(out / "large", "wb") as file:
        file.truncate(day.MOST_BYTES)
    bad = {str(path.relative_to(out)) for path in day.too_much(out)}
    assert {"large", "a/b/c/deep"} < bad and not bad & {"gpu.json", "gpu.log"}
    assert len(names) + 1 - len(bad) == day.MOST_FILES
    run = make_day(tmp_path)
    run.run(make_step("talks", "print('begin'); print('x\\n' * 2_000_000); print('the end')", limit=30))
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert "begin" in log and "the end" in log and "bytes in all" in log
    assert len(log) < 3 * processes.MOST_LOGGED


def test_small_files_come_back_together_where_there_are_too_many(tmp_path) -> None:
    run = make_day(tmp_path)
    out = tmp_path / "out"
    (out / "model").mkdir()
    for name in ("model/config.json", "model/bpe.model", "card.json"):
        (out / name).write_text(name)
    for number in range(5):
        (out / f"large.{number}").write_bytes(b"x" * day.SMALL)
    run.finish()
    assert day.too_much(out) == []
    assert len([path for path in out.rglob("*") if path.is_file()]) == day.MOST_FILES
    with tarfile.open(out / "small.tar") as archive:
        names = ("card.json", "model/bpe.model", "model/config.json")
        assert {name: archive.extractfile(name).read().decode() for name in archive.getnames()} == {
            name: name for name in names
        }


def test_kernels_that_fail_in_the_first_step_are_switched_off_for_the_others(tmp_path) -> None:
    run = make_day(tmp_path)
    rows = [
        {"kernel": "a", "good": False, "switch": "module:form"},
        {"kernel": "b", "good": True, "switch": "c"},
        {"kernel": "native", "good": False, "switch": ""},
    ]
    code = f"import json, sys; json.dump({{'rows': {rows!r}}}, open(sys.argv[1], 'w'))"
    run.run(make_step("smoke", code, "{result}", trusts=False))
    tells = f"import os; print('off:', os.environ.get({day.SWITCH!r}))"
    for trusts, wanted in ((True, "off: module:form"), (False, "off: None")):
        name = f"later-{trusts}"
        run.run(make_step(name, f"{tells}; raise SystemExit(1)", trusts=trusts))
        assert run.state["steps"][name]["said"][0] == wanted
    assert run.state["switched_off"] == ["module:form"]


# --- the table ----------------------------------------------------------------------------------------


def test_the_table_fits_the_calls_and_unknown_names_are_refused() -> None:
    assert steps.STEPS[0].name == "smoke"
    names = [step.name for step in steps.STEPS]
    assert len(set(names)) == len(names)
    assert [step.name for step in steps.select(0, ["training", "smoke"])] == ["smoke", "training"]
    with pytest.raises(ValueError, match="--only must name steps .*, but has nothing"):
        steps.select(1, ["smoke", "nothing"])
    call = [sys.executable, str(ROOT / "tools/gpu/day.py")]
    listed = subprocess.run([*call, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(" ")[0] for line in listed] == names
    refused = subprocess.run([*call, "--only", "nothing"], capture_output=True, text=True)
    assert refused.returncode == 2 and "has nothing" in refused.stderr


def test_steps_call_programs_with_options_that_they_have(tmp_path) -> None:
    texts = {path: path.read_text() for path in [*ROOT.glob("tools/*/*.py"), *ROOT.glob("tools/*.sh")]}
    args = SimpleNamespace(out="out", payload=str(tmp_path), device="cuda")
    for step in steps.STEPS:
        if step.given is not None:
            (tmp_path / step.given[0]).parent.mkdir(exist_ok=True)
            (tmp_path / step.given[0]).touch()
    for step in steps.STEPS:
        for cpu in (False, True):
            program, *options = day.fill(step, args, Path("RESULT"), cpu)
            text = texts[ROOT / program]
            if program == "tools/gpu_train.sh":
                text = texts[ROOT / "tools/gpu/train.py"]
            if "speech.add_arguments" in text:
                text += texts[ROOT / "tools/bench/speech.py"]
            for option in [*options, *(step.small or "").split()]:
                if option.startswith("--"):
                    name = option[2:]
                    there = f'"{option}"' in text or re.search(rf"^    {name}: ", text, re.M)
                    assert there, (step.name, option)
            assert not any("{" in part for part in (program, *options)) 
            assert "RESULT" in options or program == "tools/gpu_train.sh"
    measured = {
        path.stem for path, text in texts.items() if path.parent.name == "bench" and '"--output"' in text
    }
    called = {Path(step.words()[0]).stem for step in steps.STEPS}
    assert len(measured) > 5 and measured - OF_THE_CPU <= called and OF_THE_CPU <= measured


def values_of(words: list[str], option: str) -> list[str]:
    if option not in words:
        return []
    rest = words[words.index(option) + 1 :]
    return list(itertools.takewhile(lambda word: not word.startswith("--"), rest))


def test_steps_name_ways_methods_and_trials_that_there_are(monkeypatch) -> None:
    from icefall_fusion.decode.method_names import parse_methods

    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    from llm_ways import WAYS
    from shapes import SHAPES

    named = set()
    for step in steps.STEPS:
        words = step.words()
        assert set(values_of(words, "--ways")) <= set(WAYS), step.name
        assert set(values_of(words, "--kernels")) <= set(smoke.TRIALS), step.name
        shapes = values_of(words, "--shape") + values_of(words, "--models") + values_of(words, "--shapes")
        assert set(shapes) <= set(SHAPES), step.name
        if methods := values_of(words, "--methods"):
            parse_methods(methods)
        named.update(values_of(words, "--ways"), methods, shapes)
    assert {"lazy tree", "llm-shallow", "mistral-7b"} <= named


def test_kernels_are_called_as_the_package_calls_them() -> None:
    from icefall_fusion.common.devices import WITHOUT_KERNELS
    from icefall_fusion.lm.fused import KERNELS
    from icefall_fusion.search.engines.gpu import KERNEL
    from icefall_fusion.search.engines.gpu_check import trials

    assert (smoke.WITHOUT, day.SWITCH) == (WITHOUT_KERNELS, WITHOUT_KERNELS)
    assert (smoke.LM, smoke.SEARCH, smoke.FORMS) == (KERNELS, KERNEL, trials())


def test_a_trial_runs_and_one_that_dies_is_told(tmp_path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    output = tmp_path / "smoke.json"
    device = "cuda" if __import__("torch").cuda.is_available() else "cpu"
    call = [sys.executable, str(ROOT / "tools/gpu/smoke.py"), "--device", device, "--output", str(output)]
    if device == "cuda":
        del environment["TRITON_INTERPRET"]
    subprocess.run([*call, "--kernels", "lm-gate"], env=environment, check=True, capture_output=True)
    [row] = json.loads(output.read_text())["rows"]
    assert row["good"] and row["worst"] < 0.3 and row["first_seconds"] > 0
    args = SimpleNamespace(under="env A=1", device="no-such-device", limit=60)
    row = smoke.in_process("lm-gate", args)
    assert not row["good"] and "no-such-device" in row["error"] and row["switch"] == smoke.LM
    assert "no-such-device" in row["tool"]
    args.under = "/no/such/program --option"
    assert "cannot be run" in smoke.in_process("lm-gate", args)["error"]


def test_every_file_with_gpu_tests_is_run(tmp_path) -> None:
    found = gpu_tests.marked(ROOT)
    assert "tests/search/test_gpu_engine.py" in found and len(found) >= 7
    (tmp_path / "test_one.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_good(): pass\n"
        "@pytest.mark.gpu\ndef test_bad(): assert 1 == 2, 'so it is'\ndef test_other(): assert False\n"
    )
    row = gpu_tests.run_file(str(tmp_path / "test_one.py"), 60)
    assert (row["good"], row["tests"], row["failures"]) == (False, 2, 1)
    assert row["failed"][0]["test"] == "test_bad" and "so it is" in row["failed"][0]["message"]


# --- imports ------------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """Return the first parts of all names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def test_every_import_of_the_day_is_served_by_a_wheel_or_by_the_image() -> None:
    programs = {part for step in steps.STEPS if step.call for part in step.words() if part.endswith(".py")}
    files = [
        *(ROOT / "icefall_fusion").rglob("*.py"),
        *(ROOT / "tools/gpu").glob("*.py"),
        *(ROOT / "tools/bench").glob("*.py"),
        *(ROOT / name for name in gpu_tests.marked(ROOT)),
    ]
    assert all(ROOT / name in files or (ROOT / name).is_file() for name in programs)
    local = {path.stem for folder in ("tools", "tests") for path in (ROOT / folder).rglob("*.py")} | {
        "reference"
    }
    owners = importlib.metadata.packages_distributions()
    served = {wheels.normalized(name) for name in wheels.wanted_wheels()} | wheels.image_packages()
    lacking = {}
    for path in files:
        for name in imported(path) - set(sys.stdlib_module_names) - local - {"icefall_fusion", "tests", ""}:
            packages = {wheels.normalized(owner) for owner in owners.get(name, [name])}
            if not packages & served and name not in NOT_ON_THE_DAY:
                lacking.setdefault(name, []).append(path.name)
    assert not lacking


def test_wheels_have_the_versions_of_the_requirements() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = dict(line.split("#")[0].split(";")[0].strip().split("==") for line in lines if "==" in line)
    wanted = {name: version for name, (version, _) in wheels.wanted_wheels().items()}
    assert len(set(wanted) & set(required)) >= 7
    assert {name: required[name] for name in wanted if name in required} == {
        name: version for name, version in wanted.items() if name in required
    }
    assert not set(wanted) & wheels.image_packages()


# --- what travels -------------------------------------------------------------------------------------


def test_each_call_is_small_and_can_be_written_down(tmp_path) -> None:
    for call, command in pack.COMMANDS.items():
        sizes = pack.parts(call, tmp_path)
        payload = 13 * 2**20 if call == 1 else 32 * 2**20  # what .gpu may have
        assert sum(sizes.values()) + payload <= pack.MOST, sizes
        assert len(command) <= pack.LONGEST_COMMAND and len(pack.CARRIED[call]) <= pack.MOST_CARRIED
        assert "$OUT" in command and pack.TIMEOUTS[call] - day.BUDGETS[call] >= 30
    assert any("is not in" in line for line in wheels.unserved(tmp_path))


def test_weights_leave_the_index_and_come_back(tmp_path) -> None:
    root, files = tmp_path / "clone", ["large/one.bin", "two.bin"]
    root.mkdir()
    (root / "large").mkdir()
    for name in (*files, "code.py"):
        (root / name).write_text(name)

    def git(*arguments: str, good: bool = True) -> str:
        names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, env={**os.environ, **names}
        )
        assert (done.returncode == 0) == good, done.stderr
        return done.stdout + done.stderr

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    whole = git("ls-files", "-s")
    lean.leave_out(root, files)
    assert lean.tracked(root) == ["code.py"] and all((root / name).read_text() == name for name in files)
    (root / "code.py").write_text("changed")
    assert "is left out for a call" in git("commit", "-qam", "would drop them", good=False)
    lean.leave_out(root, files)  # twice is as once
    (root / "code.py").write_text("code.py")
    git("add", "-A")
    lean.undo(root, files)
    lean.undo(root, files)
    assert git("ls-files", "-s") == whole and git("status", "--porcelain") == ""
    git("commit", "-q", "--allow-empty", "-m", "no hook is left")
    (root / "two.bin").write_text("mine")
    with pytest.raises(RuntimeError, match="two.bin is changed"):
        lean.leave_out(root, files)
    assert git("ls-files", "-s") == whole
