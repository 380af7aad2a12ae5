"""Decoding: methods, test sets, files of a run, tuning, transcription, the demo.
Knows: all other folders. Must not know: how a search or a fusion works.
"""
from __future__ import annotations
