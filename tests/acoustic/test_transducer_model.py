"""The transducer head against icefall's shape: a plain loop over pieces, contexts, batches."""
from __future__ import annotations

import torch
from torch.nn import functional as F

from icefall_fusion.acoustic.models import TransducerHead, TransducerOptions

PIECES = 11


def head(context_size: int = 2) -> TransducerHead:
    torch.manual_seed(3)
    options = TransducerOptions(predictor_size=12, joiner_size=10, context_size=context_size)
    return TransducerHead(16, PIECES, 0, options).eval()


@torch.no_grad()
def plain_state(model: TransducerHead, context: list[int]) -> torch.Tensor:
    """Return the projected predictor state of one context, written out: three channels of four a group."""
    weight = model.predictor.conv.weight  # [P,4,context]
    rows = [model.predictor.embedding.weight[p] if p >= 0 else torch.zeros(12) for p in context]
    out = torch.zeros(12)
    for channel in range(12):
        group = channel // 4 * 4
        for place, row in enumerate(rows):
            out[channel] += weight[channel, :, place] @ row[group : group + 4]
    return model.joiner.decoder_proj(F.relu(out))


def test_predictor_states_equal_those_of_a_plain_loop() -> None:
    for context_size in (1, 2, 3):
        model = head(context_size)
        targets = torch.tensor([[4, 4, 7, 1], [2, 10, 9, 0]])
        states = model.joiner.decoder_proj(model.predictor(model.histories(targets)))
        assert states.shape == (2, 5, 10)
        for row, pieces in enumerate(targets.tolist()):
            history = [*model.start, *pieces]
            for place in range(5):
                context = history[place : place + context_size]
                wanted = plain_state(model, context)
                torch.testing.assert_close(states[row, place], wanted)
                torch.testing.assert_close(model.predict(torch.tensor([context]))[0], wanted)


@torch.no_grad()
def test_no_piece_is_none_of_the_pieces() -> None:
    model = head()
    none = model.predict(torch.tensor([[-1, 0]]))
    others = model.predict(torch.tensor([[piece, 0] for piece in range(PIECES)]))
    assert float((others - none).abs().amax(1).min()) > 1e-4


@torch.no_grad()
def test_a_joined_batch_equals_its_pairs_and_sums_to_one() -> None:
    model = head()
    frames, contexts = torch.randn(2, 5, 16), torch.tensor([[-1, 0], [0, 3], [3, 3]])
    projected, states = model.project(frames), model.predict(contexts)
    joined = model.join(projected[:, :, None], states)
    assert joined.shape == (2, 5, 3, PIECES) and joined.dtype == torch.float32
    torch.testing.assert_close(joined.exp().sum(-1), torch.ones(2, 5, 3))
    for row in range(2):
        for frame in range(5):
            for place in range(3):
                one = model.join(projected[row, frame][None], states[place][None])[0]
                torch.testing.assert_close(joined[row, frame, place], one)
