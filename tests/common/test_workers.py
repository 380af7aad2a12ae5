"""Work by processes: order, what they keep, and what happens when one fails or is killed."""
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icefall_fusion.common.workers import AHEAD, in_workers

FIRST = 3


def square(number: int) -> int:
    return number * number


def fail(folder: Path, number: int) -> int:
    """Fail on FIRST; other jobs take longer and leave a file when they are whole."""
    if number == FIRST:
        raise ValueError(f"job {number}")
    (folder / f"{number}.begun").touch()
    time.sleep(0.5)
    (folder / f"{number}.whole").touch()
    return number


def die(number: int) -> int:
    if number == FIRST:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def late_for_even(number: int) -> int:
    time.sleep(0.3 * (number % 2 == 0))
    return number


class Counting:
    """Counts its jobs, in each process by itself."""

    def __init__(self) -> None:
        self.begun = 0

    def __call__(self, number: int) -> tuple[int, int]:
        self.begun += 1
        return os.getpid(), self.begun


def note(path: Path) -> None:
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")


def wait_beside(path: Path, number: int) -> None:
    note(path)
    time.sleep(600)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("jobs", [0, 1, 2, 20])
def test_results_come_in_the_order_of_jobs(workers, jobs) -> None:
    assert list(in_workers(square, range(jobs), workers)) == [one * one for one in range(jobs)]


def test_results_may_come_as_they_are_done() -> None:
    done = list(in_workers(late_for_even, range(6), 2, in_order=False))
    assert sorted(done) == list(range(6)) and done != list(range(6))


def test_jobs_are_taken_a_few_at_a_time() -> None:
    taken = []

    def jobs():
        for number in range(40):
            taken.append(number)
            yield number

    for count, _ in enumerate(in_workers(square, jobs(), 2), 1):
        assert len(taken) <= count + AHEAD * 2


def test_a_process_keeps_its_work_and_begins_once(tmp_path) -> None:
    done = list(in_workers(Counting(), list(range(12)), 2, begin=functools.partial(note, tmp_path / "begun")))
    processes = {process for process, _ in done}
    assert os.getpid() not in processes
    assert sum(max(begun for one, begun in done if one == process) for process in processes) == 12
    begun = (tmp_path / "begun").read_text().split()
    assert len(begun) == len(set(begun)) and processes <= {int(process) for process in begun}


def test_the_error_of_a_job_is_raised_and_what_runs_is_finished(tmp_path) -> None:
    with pytest.raises(ValueError, match="^job 3$"):
        list(in_workers(functools.partial(fail, tmp_path), range(40), 2))
    begun, whole = ({path.stem for path in tmp_path.glob(f"*.{kind}")} for kind in ("begun", "whole"))
    assert begun == whole and len(begun) < 20


def test_a_killed_process_is_an_error_and_no_endless_wait() -> None:
    with pytest.raises(RuntimeError, match="a worker process was killed: run this again, with fewer workers"):
        list(in_workers(die, range(20), 2))


def test_at_least_one_worker() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, but is 0"):
        list(in_workers(square, [1, 2], 0))


def test_workers_end_with_a_caller_that_is_killed(tmp_path) -> None:
    path = tmp_path / "processes"
    program = (
        "import functools, pathlib\n"
        "import test_workers\n"
        "from icefall_fusion.common.workers import in_workers\n"
        f"work = functools.partial(test_workers.wait_beside, pathlib.Path({str(path)!r}))\n"
        "if __name__ == '__main__': list(in_workers(work, [1, 2], 2))\n"
    )
    (tmp_path / "caller.py").write_text(program)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    caller = subprocess.Popen([sys.executable, str(tmp_path / "caller.py")], env=environment)
    while not path.exists() or len(path.read_text().split()) < 2:
        assert caller.poll() is None, "the caller ended by itself"
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    left = {int(process) for process in path.read_text().split()}
    while left:  # a process that stays would let the test wait until it is ended from outside
        left = {process for process in left if _runs(process)}
        time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
