"""Log-probs of an icefall export.
Knows: TorchScript files. Must not know: the recipe they were made with, search, fusion, manifests.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icefall_fusion.acoustic.loading import loading
from icefall_fusion.acoustic.sources.base import FeatureSource, tokens_of

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources import EmissionOptions


class TorchScriptSource(FeatureSource):
    """A TorchScript object with ``encoder(features, lens)`` and ``ctc_output(frames)``.

    icefall's ``export.py --jit 1`` writes one. It has no attention decoder: TorchScript does not compile the
    one of icefall's Zipformer (its ``subsequent_mask`` has arguments without types), and its ``nll`` is not
    exported. The source ``icefall`` reads the attention decoder from ``pretrained.pt``.
    """

    least_frames = 9  # the subsampling of icefall's Zipformer and Conformer yields nothing for fewer

    def __init__(self, options: EmissionOptions) -> None:
        self.tokens = tokens_of(options)
        self.device = torch.device(options.device)
        what = "a TorchScript model (weights alone, pretrained.pt, need --emissions.recipe)"
        with loading(options.model, what):
            self.network = torch.jit.load(options.model, map_location=self.device).eval()
        missing = [name for name in ("encoder", "ctc_output") if not hasattr(self.network, name)]
        if missing:
            rule = "EmissionOptions.model must have encoder and ctc_output"
            raise ValueError(f"{rule}, but {options.model!r} lacks {missing}")
        measured = self.measured_frame_shift(options.model)
        self.frame_shift = options.frame_shift or measured

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.encoder(features, lens)[:2]

    def log_probs(self, encoder_out: Tensor) -> Tensor:
        return self.network.ctc_output(encoder_out).float().log_softmax(dim=2)  # no change to log-probs
