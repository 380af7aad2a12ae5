"""Helpers of the transducer tests: our transducer head, tiny and random, and searches with it.
Knows: the transducer search, torch. Must not know: large language models, what is tested.
"""
from __future__ import annotations

import torch

from icefall_fusion.acoustic.models.transducer import TransducerHead, TransducerOptions
from icefall_fusion.search import PrefixSearchOptions
from icefall_fusion.search.transducer import transducer_search
from tests.search_tools import ENGINE, each_engine  # noqa: F401 (a fixture of tests here)


class TinyTransducer(TransducerHead):
    """A head with random weights of its seed; `rows` is what the slow twins ask."""

    def __init__(self, pieces=6, context_size=2, width=8, seed=0, sharpness=1.0, blank_bias=0.0, blank_id=0):
        options = TransducerOptions(predictor_size=width, joiner_size=width, context_size=context_size)
        super().__init__(width, pieces, blank_id, options)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.joiner.output_linear.weight.data *= sharpness
        self.joiner.output_linear.bias.data[blank_id] += blank_bias
        self.asked, self.joined = [], []
        self.requires_grad_(False)

    def predict(self, contexts):
        self.asked += map(tuple, contexts.tolist())
        return super().predict(contexts)

    def join(self, encoder, predictor):
        self.joined.append(len(encoder))
        return super().join(encoder, predictor)

    def rows(self, encoder):
        """Return a function of an utterance [T, J]: log-probs of a frame after a prefix."""
        known = {}

        def log_probs(frame, prefix):
            context = (*self.start, *prefix)[-self.context_size :]
            if (frame, context) not in known:
                predicted = super(TinyTransducer, self).predict(torch.tensor([context]))
                row = super(TinyTransducer, self).join(encoder[frame : frame + 1], predicted)[0]
                known[frame, context] = row.tolist()
            return known[frame, context]

        return log_probs


def encodings(seed, batch, frames, width=8, scale=1.5):
    return scale * torch.randn(batch, frames, width, generator=torch.Generator().manual_seed(seed))


def search(model, encoder, lens=None, tokens=None, fusions=(), ids=None, **options):
    if lens is None:
        lens = torch.full((len(encoder),), encoder.shape[1])
    options = PrefixSearchOptions(**{**ENGINE, **options})
    return transducer_search(encoder, lens, model, options, tokens, fusions, ids)


def listing(nbest):
    return [(tuple(h.tokens), h.scores["rnnt"]) for h in nbest]
