"""Scoring: word errors, the table of methods, the plot, two methods compared word by word.
Knows: texts, result rows. Must not know: models, searches.
"""
from __future__ import annotations
