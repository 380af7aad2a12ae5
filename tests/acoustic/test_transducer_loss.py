"""The loss of the transducer head: in blocks and pruned against torchaudio's, the band, batch = single."""
from __future__ import annotations

import itertools

import pytest
import torch
from torchaudio.functional import rnnt_loss

from icefall_fusion.acoustic.models import TransducerHead, TransducerOptions
from icefall_fusion.acoustic.models.transducer_loss import band_starts, joined_cells, rnnt_loss_sum

PIECES = 9
LENS, TARGETS = [13, 8, 0, 5], [[3, 3, 1, 7, 2, 8], [4, 5], [1], []]


def head(prune_range: int = 3) -> TransducerHead:
    torch.manual_seed(2)
    options = TransducerOptions(predictor_size=12, joiner_size=10, prune_range=prune_range)
    made = TransducerHead(16, PIECES, 0, options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)
    return made


def plain_losses(model: TransducerHead, x: torch.Tensor) -> torch.Tensor:
    """Return torchaudio's losses of all logits at once, an utterance at a time; those without frames lack."""
    losses = []
    for row, (frames, target) in enumerate(zip(LENS, TARGETS)):
        if frames == 0:
            continue
        pieces = torch.tensor([target], dtype=torch.long).view(1, -1)
        states = model.joiner.decoder_proj(model.predictor(model.histories(pieces)))
        logits = model.joiner(model.project(x[row : row + 1, :frames])[:, :, None], states[:, None])
        sizes = torch.tensor([frames], dtype=torch.int32), torch.tensor([len(target)], dtype=torch.int32)
        losses.append(rnnt_loss(logits, pieces.int(), *sizes, blank=0, reduction="none")[0])
    return torch.stack(losses)


def gradients(model: TransducerHead, x: torch.Tensor, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = {n: p for n, p in model.named_parameters() if "simple" not in n}
    return dict(zip(["x", *parameters], torch.autograd.grad(loss, [x, *parameters.values()])))


@pytest.mark.parametrize("block", [1, 400, 1 << 24])
def test_loss_and_gradients_equal_those_of_all_logits_at_once(monkeypatch, block) -> None:
    monkeypatch.setattr("icefall_fusion.acoustic.models.transducer_loss.BLOCK", block)
    model, x = head(), torch.randn(4, 13, 16, requires_grad=True)
    wanted, found = plain_losses(model, x).sum(), rnnt_loss_sum(model, x, LENS, TARGETS, prune_range=0)
    assert found.impossible == 1 and found.simple is None
    torch.testing.assert_close(found.loss, wanted)
    ours, theirs = gradients(model, x, found.loss), gradients(model, x, wanted)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("prune_range", [0, 3])
def test_no_more_log_probs_than_a_block_are_made_at_once(monkeypatch, prune_range) -> None:
    """Neither forward nor backward, which makes them again."""
    monkeypatch.setattr("icefall_fusion.acoustic.models.transducer_loss.BLOCK", 700)
    model, x, sizes = head(), torch.randn(4, 13, 16, requires_grad=True), []
    join = model.join

    def counted(encoder, predictor):
        made = join(encoder, predictor)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(model, "join", counted)
    rnnt_loss_sum(model, x, LENS, TARGETS, prune_range).loss.backward()
    whole = 3 * 13 * (3 if prune_range else 7) * PIECES
    assert max(sizes) <= 700 < whole and sum(sizes) == 2 * whole


@pytest.mark.parametrize("block", [1, 300, 1 << 24])
def test_a_band_that_holds_everything_prunes_nothing(monkeypatch, block) -> None:
    monkeypatch.setattr("icefall_fusion.acoustic.models.transducer_loss.BLOCK", block)
    model = head()
    frames, states = torch.randn(2, 7, 10, requires_grad=True), torch.randn(2, 5, 10, requires_grad=True)
    targets, weights = torch.randint(1, PIECES, (2, 4)), torch.randn(2, 7, 5, 2)
    both = [joined_cells(model, frames, states, targets, starts, 5)
            for starts in (None, torch.zeros(2, 7, dtype=torch.long))]
    torch.testing.assert_close(*both)
    grads = [torch.autograd.grad((cells * weights).sum(), (frames, states)) for cells in both]
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_a_pruned_loss_counts_the_alignments_within_the_band() -> None:
    """Against a sum over all alignments one by one."""
    model, starts = head(), torch.tensor([[0, 0, 1, 2, 2]])
    frames, states, targets = torch.randn(1, 5, 10), torch.randn(1, 5, 10), torch.tensor([[4, 2, 2, 7]])
    cells = joined_cells(model, frames, states, targets, starts, 3)
    sizes = torch.tensor([5], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    found = rnnt_loss(cells, torch.ones(1, 4, dtype=torch.int32), *sizes, blank=0, reduction="none",
                      fused_log_softmax=False)
    scores = []
    for counts in itertools.product(range(5), repeat=5):  # tokens said in each frame
        if sum(counts) != 4:
            continue
        said, score, inside = 0, 0.0, True
        for frame, count in enumerate(counts):
            for place in range(said, said + count + 1):
                inside &= 0 <= place - int(starts[0, frame]) < 3
                piece = int(targets[0, place]) if place < said + count else 0
                score += float(model.join(frames[:, frame], states[:, place])[0, piece])
            said += count
        scores += [score] if inside else []
    assert 3 < len(scores) < 70
    torch.testing.assert_close(found, -torch.tensor(scores).logsumexp(0)[None])


@pytest.mark.parametrize("band", [2, 3, 4])
def test_bands_begin_at_the_start_go_on_without_gaps_and_hold_the_end(band) -> None:
    torch.manual_seed(band)
    lens, sizes = torch.tensor([12, 9, 6, 4]), torch.tensor([8, 3, 0, 5])
    if band == 2:
        sizes[3] = 3  # five tokens in four frames need a wider band
    starts = band_starts(torch.rand(4, 12, 9) ** 4, lens, sizes, band)
    assert (starts[:, 0] == 0).all()
    for row, (frames, tokens) in enumerate(zip(lens.tolist(), sizes.tolist())):
        steps = starts[row].diff()
        assert (steps >= 0).all() and (steps < band).all()
        assert int(starts[row, frames - 1]) == max(tokens + 1 - band, 0)
        assert int(starts[row].max()) + band <= 9


def test_the_pruned_loss_nears_the_exact_one_with_a_trained_simple_joiner() -> None:
    """The band must follow the alignments: the share of their probability in it grows to nearly all."""
    model = head()
    x = torch.zeros(1, 13, 16)
    targets = [[1, 2, 3, 4, 5, 6]]
    for place, piece in enumerate(targets[0]):
        x[0, 2 * place, piece] = 4.0  # each piece sounds in a frame of its own
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        found = rnnt_loss_sum(model, x, [13], targets)
        optimizer.zero_grad()
        (found.loss + found.simple).backward()
        optimizer.step()
    with torch.no_grad():
        pruned, exact = rnnt_loss_sum(model, x, [13], targets), rnnt_loss_sum(model, x, [13], targets, 0)
    assert float(exact.loss) < 1
    assert float(exact.loss) <= float(pruned.loss) < float(exact.loss) + 0.05
    assert model.greedy(model.project(x), torch.tensor([13])) == targets


@pytest.mark.parametrize("prune_range", [0, 3])
def test_a_batch_equals_its_utterances(prune_range) -> None:
    model, x = head(), torch.randn(4, 13, 16)
    for row, frames in enumerate(LENS):
        x[row, frames:] = 7.0
    whole = rnnt_loss_sum(model, x, LENS, TARGETS, prune_range)
    alone = [rnnt_loss_sum(model, x[r : r + 1], LENS[r : r + 1], TARGETS[r : r + 1], prune_range)
             for r in range(4)]
    torch.testing.assert_close(whole.loss, torch.stack([one.loss for one in alone]).sum())
    greedy = model.greedy(model.project(x), torch.tensor(LENS))
    assert sum(map(len, greedy)) > 3
    for row in range(4):
        one = model.greedy(model.project(x[row : row + 1]), torch.tensor(LENS[row : row + 1]))
        assert one == [greedy[row]]


def test_more_tokens_than_a_band_can_pass_widen_it() -> None:
    model, x, targets = head(2), torch.randn(1, 2, 16), [[3, 1, 4, 1, 5]]
    pruned, exact = rnnt_loss_sum(model, x, [2], targets), rnnt_loss_sum(model, x, [2], targets, 0)
    assert float(exact.loss) < float(pruned.loss) < float(exact.loss) + 10


def test_no_frames_at_all_count_zero() -> None:
    found = rnnt_loss_sum(head(), torch.zeros(2, 3, 16, requires_grad=True), [0, 0], [[1], []])
    assert float(found.loss) == 0 and found.impossible == 2
    found.loss.backward()
    only_blanks = rnnt_loss_sum(head(), torch.randn(1, 3, 16), [3], [[]])
    assert 0 < float(only_blanks.loss) < 30


@pytest.mark.parametrize("block", [400, 1 << 24])
def test_bf16_autocast_rounds_the_joiners_output_layer_alone(monkeypatch, block) -> None:
    monkeypatch.setattr("icefall_fusion.acoustic.models.transducer_loss.BLOCK", block)
    model, x, made = head(), torch.randn(4, 13, 16, requires_grad=True), []
    model.joiner.output_linear.register_forward_hook(lambda module, inputs, output: made.append(output.dtype))
    plain = rnnt_loss_sum(model, x, LENS, TARGETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rnnt_loss_sum(model, x, LENS, TARGETS)
    half = len(made) // 2
    assert made == [torch.float32] * half + [torch.bfloat16] * half and cast.loss.dtype == torch.float32
    assert torch.equal(plain.simple, cast.simple)
    torch.testing.assert_close(cast.loss, plain.loss, rtol=5e-3, atol=0)
    exact, rounded = gradients(model, x, plain.loss), gradients(model, x, cast.loss)
    for name, value in exact.items():
        torch.testing.assert_close(rounded[name], value, rtol=0, atol=0.02 * float(value.abs().max()))
