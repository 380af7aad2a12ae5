"""The predictor's outputs that are kept from search to search: whole, small, and of one search at a time.
Knows: the transducer search, the table of contexts. Must not know: language models.
"""
from __future__ import annotations

import threading

import pytest
import torch
from transducer_tools import (
    TinyTransducer,
    each_engine,  # noqa: F401 (a fixture of all tests here)
    encodings,
    search,
)

from icefall_fusion.search.engines import predictor


class Disturbed(TinyTransducer):
    """In its third call of the predictor something else happens first."""

    event = None

    def predict(self, contexts):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3 and self.event is not None:
            self.event()
        return super().predict(contexts)


def made(kind=TinyTransducer):
    return kind(20, blank_bias=2.0)


def test_a_search_after_an_interrupted_one_finds_the_same():
    model, encoder = made(Disturbed), encodings(8, 3, 30)

    def interrupt():
        raise KeyboardInterrupt

    model.event = interrupt
    with pytest.raises(KeyboardInterrupt):
        search(model, encoder, beam=5)
    assert search(model, encoder, beam=5) == search(made(), encoder, beam=5)


def test_a_table_enters_no_context_whose_values_could_not_be_made():
    table, contexts = predictor.ContextTable(), torch.tensor([[1, 2], [3, 4], [1, 2]])

    def fail(asked):
        raise MemoryError

    with pytest.raises(MemoryError):
        table.find(contexts, fail)
    rows = table.find(contexts, lambda asked: asked.float())
    assert rows.tolist() == [0, 1, 0] and table.values[rows].tolist() == contexts.tolist()


def test_searches_of_two_threads_do_not_share_a_table():
    """The second runs from start to end while the first waits for the predictor."""
    encoder, other = encodings(8, 3, 30), encodings(9, 3, 30)
    expected, expected_other = search(made(), encoder, beam=5), search(made(), other, beam=5)
    model, found = made(Disturbed), []
    search(model, encodings(7, 1, 1))  # there is a table to share
    model.calls = 0

    def beside():
        thread = threading.Thread(target=lambda: found.append(search(model, other, beam=5)))
        thread.start()
        thread.join()

    model.event = beside
    assert search(model, encoder, beam=5) == expected
    assert found == [expected_other]
    assert search(model, encoder, beam=5) == expected


def test_a_table_made_in_inference_mode_serves_outside_of_it():
    model, encoder = made(), encodings(8, 1, 5)
    with torch.inference_mode():
        search(model, encoder, beam=2)
    more = encodings(9, 3, 30)
    assert search(model, more, beam=5) == search(made(), more, beam=5)


@pytest.mark.parametrize("changed", ["embedding", "conv"])
def test_a_table_is_made_anew_though_the_start_says_the_same(changed):
    """The blank's embedding is zero, as in models of icefall with padding_idx: the start tells nothing."""
    model, encoder = made(), encodings(8, 3, 30)
    model.predictor.embedding.weight.data[0] = 0.0
    first = search(model, encoder, beam=5)
    fresh = made()
    for one in (model, fresh):
        getattr(one.predictor, changed).weight.data.neg_()
        one.predictor.embedding.weight.data[0] = 0.0
    assert search(model, encoder, beam=5) == search(fresh, encoder, beam=5) != first


def test_a_table_that_has_grown_too_large_is_not_kept(monkeypatch):
    monkeypatch.setattr(predictor, "_MOST", 20)
    model = made()
    search(model, encodings(8, 1, 2), beam=2)
    assert model in predictor._TABLES
    search(model, encodings(8, 3, 30), beam=5)
    assert model not in predictor._TABLES
