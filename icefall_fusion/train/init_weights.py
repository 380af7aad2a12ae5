"""What a training of the acoustic model starts from: weights of another one, and parts that stay as they are.
Knows: acoustic models and their folders. Must not know: the training loop, batches.
"""
from __future__ import annotations

import dataclasses
import logging
from typing import Any

from icefall_fusion.acoustic.models import CtcAed, TransducerOptions, load
from icefall_fusion.common.checks import check


def freeze_parts(model: CtcAed, names: str) -> None:
    """Freeze parts of a model, named with commas; see `CtcAed.freeze`."""
    model.freeze([part.strip() for part in names.split(",") if part.strip()])


def start_from(model: CtcAed, folder: str, encoder_only: bool = False) -> None:
    """Load the weights of a model folder into a new model; heads that the folder lacks stay as they are.

    Args:
        model: the new one.
        folder: of the other one.
        encoder_only: take no head: the folder's pieces may be others, as those of another language.

    Raises:
        FileNotFoundError, ValueError: the folder has no acoustic model, another shape or vocabulary, or lacks
            a head that is frozen.
    """
    source, name = load(folder), f"TrainOptions.init {folder}"
    heads = [head for head in model.options.heads if head in source.options.heads and not encoder_only]
    new = [head for head in model.options.heads if head not in heads]
    what = f"name heads that {folder} has, without init_encoder"
    check(not set(new) & set(model.frozen), "TrainOptions.freeze", what, new)
    if encoder_only:
        logging.info("the encoder alone is taken of %s", folder)
    elif new:
        logging.info("%s has no %s: new weights", folder, " and no ".join(new))
    shapes = [part for head, part in (("aed", "decoder"), ("transducer", "transducer")) if head in heads]
    others = () if encoder_only else ("vocab_size", "blank_id", "sos_eos_id", *shapes)
    for part in ("encoder", *others):
        wanted, actual = (_shape(getattr(m.options, part)) for m in (model, source))
        check(actual == wanted, f"{name}: {part}", f"be {wanted}", actual)
    if source.tokens is not None and model.tokens is not None and not encoder_only:
        same = source.tokens.fingerprint() == model.tokens.fingerprint()
        check(same, name, "have the pieces of TrainOptions.bpe", source.bpe)
    own, first = model.state_dict(), "encoder." if encoder_only else ""
    taken = {n: value for n, value in source.state_dict().items() if n in own and n.startswith(first)}
    model.load_state_dict({**own, **taken})


def _shape(value: Any) -> Any:
    """Return what of some options must be equal for weights to fit."""
    if isinstance(value, TransducerOptions):
        return value.predictor_size, value.joiner_size, value.context_size
    return dataclasses.replace(value, dropout=0.0) if hasattr(value, "dropout") else value
