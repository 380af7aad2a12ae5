"""Engines of the prefix search: compiled code, a GPU kernel, tensors; all find the same.
Knows: beams, frames. Must not know: which language model takes part.
"""
from __future__ import annotations
