"""Log-probs of our own models.
Knows: the models of `icefall_fusion.acoustic.models`. Must not know: search, fusion, manifests.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icefall_fusion.acoustic.models import load
from icefall_fusion.acoustic.models.ctc_aed import check_vocabulary
from icefall_fusion.acoustic.sources.base import FeatureSource, tokens_of
from icefall_fusion.common.checks import check

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources import EmissionOptions


class CheckpointSource(FeatureSource):
    """Our CTC-AED from a folder that ``models.save`` wrote (the job ``export``)."""

    def __init__(self, options: EmissionOptions) -> None:
        self.model = load(options.model, options.device)
        own = self.model.tokens
        self.tokens = tokens_of(options) if options.tokens or own is None else own
        what = f"the pieces of {options.tokens or options.model}"
        check_vocabulary(self.model.options, self.tokens.size, self.tokens.blank_id, what)
        same = own is None or own.fingerprint() == self.tokens.fingerprint()
        rule = f"have the pieces of the model ({options.model} has a bpe.model of its own)"
        check(same, "EmissionOptions.tokens", rule, options.tokens)
        self.device = torch.device(options.device)
        self.frame_shift = options.frame_shift or 0.04

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encoder(features, lens)

    def log_probs(self, encoder_out: Tensor) -> Tensor:
        return self.model.ctc_log_probs(encoder_out)
