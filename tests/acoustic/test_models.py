"""Acoustic models: shapes, invariances, losses against torch, folders.
Knows: models and tokens. Must not know: data, search, fusion.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional as F

from icefall_fusion.acoustic.models import (
    ChunkOptions,
    CtcAed,
    DecoderOptions,
    EncoderOptions,
    ModelOptions,
    greedy_pieces,
    join_states,
    load,
    save,
)
from icefall_fusion.acoustic.models.attention import attend, masked_bias, rotary_table, rotate
from icefall_fusion.acoustic.models.ctc import ctc_loss_sum, frames_needed
from icefall_fusion.text.tokens import AcousticTokens

BINS, VOCAB = 8, 11
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def tiny_options(**changes) -> ModelOptions:
    encoder = EncoderOptions(bins=BINS, size=16, heads=2, feedforward=24, layers=(1, 2, 1), kernel=5)
    decoder = DecoderOptions(heads=2, feedforward=24, layers=2)
    return dataclasses.replace(ModelOptions(vocab_size=VOCAB, encoder=encoder, decoder=decoder), **changes)


@pytest.fixture
def model() -> CtcAed:
    torch.manual_seed(0)
    model = CtcAed(tiny_options()).eval()
    model.encoder.mean.normal_()
    model.encoder.deviation.uniform_(0.5, 2)
    return model


def features(*lens: int) -> tuple:
    torch.manual_seed(1)
    return torch.randn(len(lens), max(lens, default=0), BINS), torch.tensor(lens, dtype=torch.long)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 7, 8, 9, 41])
def test_encoder_shapes_for_short_and_long_input(model: CtcAed, length: int) -> None:
    x, lens = features(length, 0)
    out, out_lens = model.encoder(x, lens)
    assert out.shape == (2, (length + 3) // 4, 16)
    assert out_lens.tolist() == [(length + 3) // 4, 0]
    assert model.encoder.out_lens(lens).tolist() == out_lens.tolist()
    assert torch.isfinite(out).all() and (out[1] == 0).all()
    assert model.ctc_log_probs(out).shape == (2, (length + 3) // 4, VOCAB)


@pytest.mark.parametrize("chunk", [None, ChunkOptions(4, 1), ChunkOptions(6, None)])
def test_encoder_ignores_batch_and_padding(model: CtcAed, chunk: ChunkOptions) -> None:
    x, lens = features(37, 90, 1, 64)
    for row, length in enumerate(lens.tolist()):
        x[row, length:] = float("nan")
    out, out_lens = model.encoder(x, lens, chunk)
    for row, length in enumerate(lens.tolist()):
        alone, alone_lens = model.encoder(x[row : row + 1, :length], lens[row : row + 1], chunk)
        assert alone_lens[0] == out_lens[row]
        torch.testing.assert_close(out[row, : alone.shape[1]], alone[0], **CLOSE)
        assert (out[row, alone.shape[1] :] == 0).all()


@pytest.mark.parametrize(
    "chunk", [ChunkOptions(2, 0), ChunkOptions(4, 1), ChunkOptions(4, 3), ChunkOptions(8, None)]
)
def test_chunk_by_chunk_equals_masked_whole(model: CtcAed, chunk: ChunkOptions) -> None:
    x, lens = features(101, 50, 3, 96)
    whole, whole_lens = model.encoder(x, lens, chunk)
    state = model.encoder.start(len(x), chunk)
    step, outs, out_lens = 4 * chunk.size, [], torch.zeros(len(x), dtype=torch.long)
    for start in range(0, x.shape[1], step):
        piece = x[:, start : start + step]
        out, n = model.encoder.forward_chunk(piece, (lens - start).clamp(0, piece.shape[1]), state)
        assert out.shape[1] == chunk.size
        outs.append(out)
        out_lens += n
    joined = torch.cat(outs, dim=1)[:, : whole.shape[1]]
    assert out_lens.tolist() == whole_lens.tolist()
    torch.testing.assert_close(joined, whole, **CLOSE)
    if chunk.left_chunks is not None:
        assert all(cache.keys.shape[2] <= chunk.left_chunks * chunk.size for cache in state.layers)


@pytest.mark.parametrize("chunk", [ChunkOptions(4, 2), ChunkOptions(4, None), ChunkOptions(2, 0)])
def test_streams_at_different_places_share_a_batch(model: CtcAed, chunk: ChunkOptions) -> None:
    x, lens = features(150, 96, 61)
    whole, whole_lens = model.encoder(x, lens, chunk)
    begins, step = [0, 3, 5], 4 * chunk.size  # the round in which each stream starts
    states = [model.encoder.start(1, chunk) for _ in begins]
    outs: list[list[torch.Tensor]] = [[], [], []]
    for number in range(5 + -(-150 // step)):
        places = [(number - begin) * step for begin in begins]
        rows = [row for row, at in enumerate(places) if 0 <= at < int(lens[row])]
        if not rows:
            continue
        counts = torch.tensor([min(step, int(lens[row]) - places[row]) for row in rows])
        chunks = torch.full((len(rows), step, BINS), float("nan"))
        for at, (row, count) in enumerate(zip(rows, counts.tolist())):
            chunks[at, :count] = x[row, places[row] : places[row] + count]
        joined = join_states([states[row] for row in rows])
        out, out_lens = model.encoder.forward_chunk(chunks, counts, joined)
        for at, (row, state) in enumerate(zip(rows, joined.rows())):
            states[row] = state
            outs[row].append(out[at, : int(out_lens[at])])
    for row, length in enumerate(whole_lens.tolist()):
        torch.testing.assert_close(torch.cat(outs[row]), whole[row, :length], **CLOSE)


def test_chunk_mask_hides_the_future_and_one_big_chunk_is_whole(model: CtcAed) -> None:
    x, lens = features(64)
    chunk = ChunkOptions(4, None)
    before, _ = model.encoder(x, lens, chunk)
    changed = x.clone()
    changed[:, 32:] += 1
    after, _ = model.encoder(changed, lens, chunk)
    assert torch.equal(before[:, :8], after[:, :8]) and not torch.allclose(before[:, 8:], after[:, 8:])
    whole, _ = model.encoder(x, lens)
    assert not torch.allclose(before, whole, atol=1e-3)
    torch.testing.assert_close(model.encoder(x, lens, ChunkOptions(16, 0))[0], whole, **CLOSE)


def test_plain_attention_equals_the_fused_one() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(3, 2, 7, 4) for _ in range(3))
    bias = masked_bias(torch.rand(3, 1, 7, 7) > 0.3, torch.float32)
    fused = attend(q, k, v, bias)
    plain = attend(q.requires_grad_(), k, v, bias)
    torch.testing.assert_close(plain, fused, **CLOSE)


def test_rotary_scores_depend_on_distance_only() -> None:
    torch.manual_seed(3)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(at: int, to: int) -> torch.Tensor:
        return (rotate(q, *rotary_table(at, 1, 8, q)) * rotate(k, *rotary_table(to, 1, 8, k))).sum()

    torch.testing.assert_close(score(5, 2), score(905, 902), atol=1e-4, rtol=1e-4)


def test_ctc_loss_is_torchs_and_counts_impossible_utterances() -> None:
    torch.manual_seed(4)
    log_probs = torch.randn(3, 12, VOCAB).log_softmax(-1)
    lens = torch.tensor([12, 7, 3])
    targets = [[3, 4, 4], [5], [6, 6, 7]]
    flat, sizes = torch.tensor([3, 4, 4, 5]), torch.tensor([3, 1])
    wanted = F.ctc_loss(log_probs[:2].transpose(0, 1), flat, lens[:2], sizes, reduction="none")
    loss, impossible = ctc_loss_sum(log_probs, lens, targets, 0)
    assert impossible == 1 and frames_needed([6, 6, 7]) == 4
    torch.testing.assert_close(loss, wanted.sum())
    assert ctc_loss_sum(log_probs, torch.zeros(3, dtype=torch.long), targets, 0)[1] == 3


@pytest.mark.parametrize("weights", [{}, {"ctc_weight": 1.0}, {"ctc_weight": 0.0, "middle_weight": 0.0}])
def test_loss_has_finite_gradients_even_when_nothing_fits(weights: dict) -> None:
    torch.manual_seed(5)
    model = CtcAed(tiny_options(chunk_probability=0.5, chunk_sizes=(2, 4), **weights)).train()
    for lens, targets in (((40, 9, 0), [[3, 4, 5], [6, 6, 6, 6], []]), ((2, 1), [[3, 4, 5], [7] * 9])):
        loss, info = model.loss(*features(*lens), targets)
        loss.backward()
        assert torch.isfinite(loss) and info["impossible"] == (1 if len(lens) == 3 else 2)
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_score_tokens_equals_step_by_step_and_ignores_the_batch(model: CtcAed) -> None:
    x, lens = features(60, 33, 1)
    frames, out_lens = model.encoder(x, lens)
    lists = [[[3, 4, 5, 6], [3], []], [[7, 7, 8]], []]
    scores = model.score_tokens(frames, out_lens, lists)
    assert [len(s) for s in scores] == [3, 1, 0]
    for row, token_lists in enumerate(lists):
        own = frames[row : row + 1, : out_lens[row]]
        alone = model.score_tokens(own, out_lens[row : row + 1], [token_lists])
        torch.testing.assert_close(alone[0], scores[row], **CLOSE)
        for tokens, score in zip(token_lists, scores[row]):
            wanted, text = 0.0, [1]
            for piece in [*tokens, 1]:
                logits = model.decoder(torch.tensor([[text]]), frames[row : row + 1], out_lens[row : row + 1])
                wanted += float(logits[0, 0, -1].log_softmax(-1)[piece].detach())
                text.append(piece)
            assert float(score) == pytest.approx(wanted, abs=1e-4)


def test_score_tokens_of_an_utterance_without_frames_is_finite(model: CtcAed) -> None:
    frames, lens = model.encoder(*features(0))
    assert torch.isfinite(model.score_tokens(frames, lens, [[[3], []]])[0]).all()


def test_greedy_pieces_merge_repeats() -> None:
    path = torch.tensor([[3, 3, 0, 3, 4, 4, 5]])
    assert greedy_pieces(F.one_hot(path, VOCAB).float(), torch.tensor([6]), 0) == [[3, 3, 4]]


def test_save_and_load_give_the_same_model(model: CtcAed, tmp_path: Path) -> None:
    save(model, tmp_path / "exact")
    again = load(tmp_path / "exact")
    assert again.options == model.options and not again.training
    x, lens = features(40, 20)
    assert torch.equal(again.encoder(x, lens)[0], model.encoder(x, lens)[0])
    save(model, tmp_path / "small", torch.bfloat16)
    small = load(tmp_path / "small")
    torch.testing.assert_close(small.encoder(x, lens)[0], model.encoder(x, lens)[0], atol=0.1, rtol=0.1)
    assert torch.equal(small.encoder.mean, model.encoder.mean)


def test_bpe_model_travels_along_and_must_fit(tmp_path: Path) -> None:
    tiny.write_bpe(tmp_path, ["the cat sat on the mat", "the dog ate the cat"] * 20, 30)
    size = AcousticTokens.load(tmp_path).size
    with pytest.raises(ValueError, match=f"have {size} pieces, but the acoustic model has 11 outputs"):
        CtcAed(tiny_options(), tmp_path)
    save(CtcAed(tiny_options(vocab_size=size), tmp_path), tmp_path / "model")
    assert load(tmp_path / "model").tokens.size == size
    (tmp_path / "model" / "bpe.model").unlink()
    with pytest.raises(ValueError, match="missing or differs"):
        load(tmp_path / "model")


def test_load_refuses_what_is_no_model_folder(model: CtcAed, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load(tmp_path)
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type must be .* but is 'llama'"):
        load(tmp_path)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: EncoderOptions(kernel=4), "EncoderOptions.kernel must be odd, but is 4"),
        (lambda: EncoderOptions(size=30), "EncoderOptions.size must be a multiple of 8"),
        (lambda: ChunkOptions(3), "ChunkOptions.size must be even"),
        (lambda: ModelOptions(ctc_weight=1.5), "ModelOptions.ctc_weight must be in"),
        (lambda: ModelOptions(blank_id=500), "ModelOptions.blank_id must be in 0..499, but is 500"),
    ],
)
def test_bad_options_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_encoder_refuses_wrong_shapes(model: CtcAed) -> None:
    with pytest.raises(ValueError, match=r"features must be \[B,T,8\]"):
        model.encoder(torch.zeros(1, 5, 80), torch.tensor([5]))
    with pytest.raises(ValueError, match="lens must be in 0..5"):
        model.encoder(torch.zeros(1, 5, BINS), torch.tensor([6]))


def test_weights_in_several_files_are_the_same_model(model: CtcAed, tmp_path: Path) -> None:
    """Each below the size; one of them missing is named; another split or a single file replaces them."""
    save(model, tmp_path / "one", torch.float16)
    save(model, tmp_path / "parts", torch.float16, "5KB")
    parts = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 2 and parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    one, several = (load(tmp_path / name).state_dict() for name in ("one", "parts"))
    assert all(torch.equal(value, several[name]) for name, value in one.items())
    (tmp_path / "parts" / parts[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{parts[1]} is missing"):
        load(tmp_path / "parts")
    save(model, tmp_path / "parts", torch.float16)
    assert [path.name for path in (tmp_path / "parts").glob("*.safetensors")] == ["model.safetensors"]
    save(model, tmp_path / "parts", torch.float16, "5KB")
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors")) == parts
