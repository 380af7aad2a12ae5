"""Log-probs of our own models.
Knows: the models of `icefall_fusion.acoustic.models`. Must not know: search, fusion, manifests.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icefall_fusion.acoustic.models import CtcAed, load
from icefall_fusion.acoustic.models.ctc_aed import check_vocabulary
from icefall_fusion.acoustic.models.model_folder import model_language
from icefall_fusion.acoustic.sources.base import FeatureSource, tokens_of
from icefall_fusion.common.checks import check

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources import EmissionOptions


class CheckpointTransducer:
    """The transducer head of one of our models; see `Transducer`."""

    def __init__(self, model: CtcAed) -> None:
        head = model.transducer
        self.context_size, self.vocab_size = head.context_size, head.vocab_size
        self.blank_id, self.start = head.blank_id, head.start
        self.project, self.predict, self.join = head.project, head.predict, head.join


class CheckpointSource(FeatureSource):
    """Our acoustic model from a folder that ``models.save`` wrote (the job ``export``).

    Attributes:
        network: the model; ``model`` is the same if it has an attention decoder.
        language: of its text.
    """

    def __init__(self, options: EmissionOptions) -> None:
        self.network = load(options.model, options.device)
        own, heads = self.network.tokens, self.network.options.heads
        self.model = self.network if "aed" in heads else None
        self.has_ctc, self.language = "ctc" in heads, model_language(self.network)
        if "transducer" in heads:
            self.transducer = CheckpointTransducer(self.network)
        self.tokens = tokens_of(options) if options.tokens or own is None else own
        what = f"the pieces of {options.tokens or options.model}"
        check_vocabulary(self.network.options, self.tokens.size, self.tokens.blank_id, what)
        same = own is None or own.fingerprint() == self.tokens.fingerprint()
        rule = f"have the pieces of the model ({options.model} has a bpe.model of its own)"
        check(same, "EmissionOptions.tokens", rule, options.tokens)
        self.device = torch.device(options.device)
        self.frame_shift = options.frame_shift or 0.04

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.encoder(features, lens)

    def log_probs(self, encoder_out: Tensor) -> Tensor:
        return self.network.ctc_log_probs(encoder_out) if self.has_ctc else super().log_probs(encoder_out)
