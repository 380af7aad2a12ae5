"""Tiny models for tests of the server.
Knows: tiny models. Must not know: the server.
"""
from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "streaming"))
from stream_tools import make_models


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """An acoustic model, a language model, an n-gram."""
    return make_models(tmp_path_factory.mktemp("serve"))
