"""Work on many jobs by processes of their own.
Knows: the standard library. Must not know: what the work is.
"""
from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Optional, TypeVar

from icefall_fusion.common.checks import check

Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 2  # jobs a process that are taken from the iterable before their results are: memory stays bounded


def in_workers(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    in_order: bool = True,
    begin: Optional[Callable[[], Any]] = None,
) -> Iterator[Result]:
    """Yield what ``work`` returns for every job.

    Processes are started anew (spawn): none inherits threads or locks. They end with the caller, also when it
    is killed. Where one job fails, those that run are finished first, as they may write results.

    Args:
        work: a function that pickle can send. Each process gets it once and may keep state in it.
        jobs: what pickle can send, taken a few at a time.
        workers: the most processes, at least 1; with 1, or for one job, the caller does all itself.
        in_order: yield results in the order of jobs; else as they come.
        begin: what each of these processes calls first.

    Raises:
        ValueError: ``workers`` is below 1.
        RuntimeError: a process was killed.
        Exception: what a job raised.
    """
    check(workers >= 1, "workers", "be at least 1", workers)
    if workers == 1 or (isinstance(jobs, Sized) and len(jobs) < 2):
        yield from map(work, jobs)
        return
    # a multiprocessing.Pool would wait forever for the result of a process that was killed
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (work, begin))
    running: deque[Future] = deque()
    try:
        for job in jobs:
            running.append(pool.submit(_do, job))
            if len(running) >= AHEAD * workers:
                yield _next(running, in_order)
        while running:
            yield _next(running, in_order)
    except BrokenProcessPool as error:
        message = "a worker process was killed: run this again, with fewer workers if memory was short"
        raise RuntimeError(message) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _next(running: deque[Future], in_order: bool) -> Any:
    """Take the first future of all, or the first that is done, and return its result."""
    if in_order:
        return running.popleft().result()
    future = wait(running, return_when=FIRST_COMPLETED).done.pop()
    running.remove(future)
    return future.result()


_work: Callable[[Any], Any]  # of a worker process


def _begin(work: Callable[[Any], Any], begin: Optional[Callable[[], Any]]) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker process begins"
    parent.join()
    os._exit(1)


def _do(job: Any) -> Any:
    return _work(job)
