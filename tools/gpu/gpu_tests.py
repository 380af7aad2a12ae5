"""The GPU tests, a process for each file, several at once; a row for each file as soon as it is done.
Knows: pytest and its XML. Must not know: what the tests check.

    python tools/gpu/gpu_tests.py --output tests.json
    python tools/gpu/gpu_tests.py --device cpu --files tests/ngram/test_ngram.py   # all are skipped

An illegal access on a GPU breaks its process: the tests of other files do not suffer. Never run on a GPU yet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from smoke import write  # noqa: E402

_NONE_SELECTED = 5  # pytest's exit code


def marked(root: Path) -> list[str]:
    """Return the test files that have GPU tests, the largest first."""
    files = [
        path for path in sorted(root.glob("tests/**/test_*.py")) if "pytest.mark.gpu" in path.read_text()
    ]
    return [str(path.relative_to(root)) for path in sorted(files, key=lambda path: -path.stat().st_size)]


def run_file(name: str, limit: float) -> dict[str, Any]:
    """Run the GPU tests of one file; return its row."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            f"--junitxml={report}",
            name,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        begun = time.perf_counter()
        row: dict[str, Any] = {"file": name, "good": False, "exit_code": None}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=limit, capture_output=True, text=True
            )
            row.update(exit_code=done.returncode, good=done.returncode in (0, _NONE_SELECTED))
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            said = f"not done after {limit:g} s\n{(error.stdout or b'').decode(errors='replace')}"
        row["seconds"] = round(time.perf_counter() - begun, 1)
        row.update(_counts(report))
        if not row["good"]:
            row["said"] = said[-6000:]
        return row


def _counts(report: Path) -> dict[str, Any]:
    """Return what pytest's report says: counts, failures with their messages, the slowest tests."""
    try:
        suite = xml.etree.ElementTree.parse(report).getroot()[0]
    except (OSError, xml.etree.ElementTree.ParseError, IndexError):
        return {}
    failures = [
        {"test": case.get("name"), "message": (part.get("message") or "")[:600]}
        for case in suite.iter("testcase")
        for part in case
        if part.tag in ("failure", "error")
    ]
    times = sorted(((float(case.get("time") or 0), case.get("name")) for case in suite.iter("testcase")))[
        ::-1
    ]
    counts = {key: int(suite.get(key) or 0) for key in ("tests", "failures", "errors", "skipped")}
    return {**counts, "failed": failures, "slowest": times[:3]}


def main() -> int:
    """Run the files; return 1 if a test fails or a file is not done."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cuda", help="tests find it out by themselves; for the results")
    parser.add_argument("--files", nargs="+", default=[], help="none: all with GPU tests")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="files at once")
    parser.add_argument("--limit", type=float, default=80.0, help="seconds of one file")
    parser.add_argument("--output", default="bench/gpu-tests.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed(
            [pool.submit(run_file, name, args.limit) for name in args.files or marked(ROOT)]
        ):
            row = done.result()
            rows.append(row)
            write(Path(args.output), rows)
            passed = row.get("tests", 0) - sum(row.get(key, 0) for key in ("failures", "errors", "skipped"))
            verdict = "good" if row["good"] else "BAD"
            print(
                f"{row['file']:36}{verdict:5}{row['seconds']:6.1f} s{passed:4} good, "
                f"{row.get('skipped', 0)} skipped {[entry['test'] for entry in row.get('failed', [])]}",
                flush=True,
            )
    return 0 if rows and all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
