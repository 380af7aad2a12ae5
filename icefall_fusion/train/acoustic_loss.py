"""Losses and figures of the acoustic model's training and validation; those of CTC and transducer also by k2.
Knows: the acoustic model, batches. Must not know: the training loop, files.
"""
from __future__ import annotations

from typing import Any, Sequence

from torch import Tensor, nn

from icefall_fusion.acoustic.models import CtcAed, greedy_pieces
from icefall_fusion.acoustic.models.ctc import ctc_loss_sum
from icefall_fusion.acoustic.models.ctc_aed import join_losses
from icefall_fusion.acoustic.models.model_folder import model_language
from icefall_fusion.common.checks import check
from icefall_fusion.data.datamodule import Batch
from icefall_fusion.lattice.k2_fsas import ctc_loss_rows, load_k2, rnnt_loss_rows
from icefall_fusion.scoring.wer import count_errors

TERMS = ("ctc", "ctc_middle", "attention", "transducer", "transducer_simple")


def compute_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Any]]:
    """Return the loss summed over tokens, the number of tokens, and summed parts (a LossFunction)."""
    core: CtcAed = getattr(model, "module", model)
    targets = batch["tokens"]
    tokens = max(sum(map(len, targets)), 1)
    if not core.training:
        return validation_loss(core, batch, tokens)
    encoded = bool(batch.get("encoded"))
    loss, info = model(batch["features"], batch["lens"], targets, batch.get("frames"), encoded)
    parts = {name: info[name] * tokens for name in TERMS if name in info}
    more = {"impossible": info["impossible"], "seconds": sum(batch["seconds"])}
    return loss * tokens, tokens, {**parts, **more}


def validation_loss(model: CtcAed, batch: Batch, tokens: int) -> tuple[Tensor, int, dict[str, Any]]:
    """As ``compute_loss``, without the auxiliary loss; with word errors of greedy decoding.

    ``word_errors`` are those of CTC, ``transducer_word_errors`` those of the transducer head.
    """
    options, heads, targets = model.options, model.trained_heads, batch["tokens"]
    frames, lens = model.encoder(batch["features"], batch["lens"])
    parts: dict[str, Any] = {"impossible": 0}
    total = None
    if model.ctc is not None:
        log_probs, blank = model.ctc_log_probs(frames), options.blank_id
        parts["ctc"], parts["impossible"] = ctc_loss_sum(log_probs, lens, targets, blank,
                                                         model.ctc.row_losses)
        parts.update(_word_errors(model, batch["texts"], greedy_pieces(log_probs, lens, blank)))
        total = parts["ctc"] if "ctc" in heads else None
    if "aed" in heads:
        parts["attention"] = model.decoder_loss(frames, lens, targets) * tokens
        total = join_losses(total, parts["attention"], options.ctc_weight)
    if "transducer" in heads:
        found, lost = model.transducer_loss(frames, lens.tolist(), targets)
        parts.update(found)
        parts["impossible"] = max(parts["impossible"], lost)
        total = join_losses(total, found["transducer"], 1 - options.transducer.weight)
        pieces = model.transducer.greedy(model.transducer.project(frames), lens)
        parts.update(_word_errors(model, batch["texts"], pieces, "transducer_"))
    return total, tokens, parts


def _word_errors(
    model: CtcAed, texts: Sequence[str], pieces: Sequence[Sequence[int]], prefix: str = ""
) -> dict[str, int]:
    pairs = ((text, model.tokens.decode(row)) for text, row in zip(texts, pieces))
    errors = [count_errors(*pair, language=model_language(model)) for pair in pairs]
    return {f"{prefix}word_errors": sum(e.errors for e in errors), "words": sum(e.words for e in errors)}


def describe(means: dict[str, float]) -> dict[str, float]:
    """Add word error rates (%) of greedy decoding to validation means a token: ``greedy_wer`` is CTC's."""
    names = {"word_errors": "greedy_wer", "transducer_word_errors": "transducer_greedy_wer"}
    return {name: 100 * means[errors] / max(means["words"], 1e-9)
            for errors, name in names.items() if errors in means}


def use_k2_losses(model: CtcAed, ctc: bool, transducer: bool) -> None:
    """Let k2 compute the losses of CTC or of the transducer head of a model.

    Raises:
        Unavailable: k2 is missing or does not work; with the remedy.
        ValueError: the blank is not piece 0, as k2's CTC has it, or there is no such head.
    """
    if ctc or transducer:
        load_k2()
    if ctc:
        rule = "be torch for a model without a CTC head"
        check(model.ctc is not None, "TrainOptions.ctc_loss", rule, "k2")
        blank = model.options.blank_id
        check(blank == 0, "ModelOptions.blank_id", "be 0 for TrainOptions.ctc_loss k2", blank)
        model.ctc.row_losses = model.middle_ctc.row_losses = ctc_loss_rows
    if transducer:
        rule = "be torchaudio for a model without a transducer head"
        check(model.transducer is not None, "TrainOptions.transducer_loss", rule, "k2")
        model.transducer.lattice_loss = rnnt_loss_rows
