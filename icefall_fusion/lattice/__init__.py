"""Lattices: all that needs k2, and what is made of it.
Knows: graphs, lattices, fusions. Must not know: test sets, files of a run.
"""
from __future__ import annotations
