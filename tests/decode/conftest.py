"""Models that all tests of decoding share.
Knows: tiny models. Must not know: any job.
"""
from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> dict[str, str]:
    """Tiny models and a manifest of noise, by name."""
    return tiny.everything(tmp_path_factory.mktemp("tiny"))

