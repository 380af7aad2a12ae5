"""Foundations: what all folders need and what knows nothing of speech.
Knows: the standard library, torch. Must not know: speech.

    checks.py         checks of arguments, with one form of message
    unavailable.py    the exception for what is missing on a machine (a compiler, Triton)
    files.py          files that are whole or absent; fingerprints
    devices.py        devices, Triton kernels, bytes of a model's weights
    precision.py      the number type in which a device computes best
    processes.py      data parallel processes
    workers.py        work on many jobs by processes of their own
    memory.py         memory in use, peaks, the allocator
    environment.py    versions, commit and device of a run
    counters.py       how counters of batches add up
    command_line.py   command lines from dataclasses
    native_build.py   the C++ code of all folders: built once, loaded; guarded.h keeps its exceptions in
"""
from __future__ import annotations
