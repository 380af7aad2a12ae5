"""Acoustic models and where log-probs come from.
Knows: features, audio, log-probs. Must not know: searches, language models.
"""
from __future__ import annotations
