"""Foundations: checks, files, devices, processes, counters, memory, the native build.
Knows: the standard library, torch. Must not know: speech.
"""
from __future__ import annotations
