"""Scoring: word errors, the table of methods, the plot.
Knows: texts, result rows. Must not know: models, searches.
"""
from __future__ import annotations
