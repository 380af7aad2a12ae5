"""Features of packets are those of the whole.
Knows: samples and features. Must not know: models, search.
"""
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.data.fbank import extract
from icefall_fusion.data.fbank_stream import StreamingFbank


@settings(deadline=None, max_examples=60)
@given(
    samples=st.one_of(st.integers(0, 900), st.integers(900, 30_000)),
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=8),
    takes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
)
def test_packets_have_the_features_of_the_whole(samples, sizes, takes) -> None:
    audio = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
    stream, start, number, found = StreamingFbank(), 0, 0, []
    sizes = [*sizes, 1000]
    while start < samples:
        size = sizes[number % len(sizes)]
        stream.accept(audio[start : start + size])
        found.append(stream.take(min(stream.ready, takes[number % len(takes)])))
        start, number = start + size, number + 1
    stream.end()
    found.append(stream.take(stream.ready))
    torch.testing.assert_close(torch.cat(found), extract(audio), atol=1e-5, rtol=1e-5)  # but for rounding
    assert stream.ready == 0


def test_it_holds_no_more_than_it_needs() -> None:
    stream = StreamingFbank()
    for _ in range(50):
        stream.accept(np.zeros(8000, np.float32))
        stream.take(stream.ready)
        assert sum(map(len, stream._held)) < 2000


@pytest.mark.parametrize(("samples", "message"), [
    (np.zeros((2, 5), np.float32), "one channel"),
    (np.zeros(5, np.int16), "floating point"),
    (np.array([0.0, np.nan], np.float32), "finite"),
])
def test_bad_samples_are_refused(samples, message) -> None:
    stream = StreamingFbank()
    with pytest.raises(ValueError, match=message):
        stream.accept(samples)
    stream.end()
    with pytest.raises(ValueError, match="end of the stream"):
        stream.accept(np.zeros(1, np.float32))
