"""Losses and figures of the acoustic model's training and validation, by torch's CTC or k2's.
Knows: the acoustic model, batches. Must not know: the training loop, files.
"""
from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from icefall_fusion.acoustic.models import CtcAed, greedy_pieces
from icefall_fusion.acoustic.models.ctc import ctc_loss_sum
from icefall_fusion.common.checks import check
from icefall_fusion.data.datamodule import Batch
from icefall_fusion.lattice.k2_fsas import ctc_loss_rows, load_k2
from icefall_fusion.scoring.wer import count_errors


def compute_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Any]]:
    """Return the loss summed over tokens, the number of tokens, and summed parts (a LossFunction)."""
    core: CtcAed = getattr(model, "module", model)
    targets = batch["tokens"]
    tokens = max(sum(map(len, targets)), 1)
    if not core.training:
        return validation_loss(core, batch, tokens)
    loss, info = model(batch["features"], batch["lens"], targets, batch.get("frames"))
    parts = {name: info[name] * tokens for name in ("ctc", "ctc_middle", "attention") if name in info}
    more = {"impossible": info["impossible"], "seconds": sum(batch["seconds"])}
    return loss * tokens, tokens, {**parts, **more}


def validation_loss(model: CtcAed, batch: Batch, tokens: int) -> tuple[Tensor, int, dict[str, Any]]:
    """As ``compute_loss``, without the auxiliary loss; with word errors of greedy CTC decoding."""
    frames, lens = model.encoder(batch["features"], batch["lens"])
    log_probs = model.ctc_log_probs(frames)
    blank, weight = model.options.blank_id, model.options.ctc_weight
    losses = model.ctc.row_losses
    ctc, impossible = ctc_loss_sum(log_probs, lens, batch["tokens"], blank, losses)
    attention = model.decoder_loss(frames, lens, batch["tokens"]) * tokens
    hypotheses = [model.tokens.decode(pieces) for pieces in greedy_pieces(log_probs, lens, blank)]
    errors = [count_errors(text, hypothesis) for text, hypothesis in zip(batch["texts"], hypotheses)]
    parts = {
        "ctc": ctc,
        "attention": attention,
        "impossible": impossible,
        "word_errors": sum(e.errors for e in errors),
        "words": sum(e.words for e in errors),
    }
    return weight * ctc + (1 - weight) * attention, tokens, parts


def describe(means: dict[str, float]) -> dict[str, float]:
    """Add the word error rate (%) of greedy CTC decoding to validation means a token."""
    return {"greedy_wer": 100 * means["word_errors"] / max(means["words"], 1e-9)}


def use_k2_loss(model: CtcAed) -> None:
    """Let k2 compute the CTC losses of a model.

    Raises:
        Unavailable: k2 is missing or does not work; with the remedy.
        ValueError: the blank is not piece 0, as k2 has it.
    """
    load_k2()
    blank = model.options.blank_id
    check(blank == 0, "ModelOptions.blank_id", "be 0 for TrainOptions.ctc_loss k2", blank)
    model.ctc.row_losses = model.middle_ctc.row_losses = ctc_loss_rows
