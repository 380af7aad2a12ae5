"""Delayed LLM fusion in the first pass of end-to-end ASR decoding (Hori et al., ICASSP 2025)."""
from __future__ import annotations

__version__ = "0.1.0"
