"""Tiny models for tests of streams, and the whole-utterance decoding that is their oracle.
Knows: tiny models, noise. Must not know: how a stream is decoded.
"""
from __future__ import annotations

import pytest
from stream_tools import make_models


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """An acoustic model, a language model, an n-gram."""
    return make_models(tmp_path_factory.mktemp("streaming"))
