"""Fixtures of the tests of other decoders' calls."""
from __future__ import annotations

import pytest

from tests.compat.compat_tools import ARPA


@pytest.fixture
def arpa(tmp_path):
    """An n-gram over a few words."""
    path = tmp_path / "words.arpa"
    path.write_text(ARPA)
    return path
