"""Log-probs and transducers of an icefall export.
Knows: TorchScript files. Must not know: the recipe they were made with, search, fusion, manifests.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icefall_fusion.acoustic.loading import loading
from icefall_fusion.acoustic.sources.base import FeatureSource, tokens_of
from icefall_fusion.acoustic.sources.chunked import ChunkedEncoder
from icefall_fusion.acoustic.sources.stateless import ModuleTransducer

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources import EmissionOptions


class TorchScriptSource(FeatureSource):
    """A TorchScript object with ``encoder(features, lens)``, and ``ctc_output(frames)`` or a transducer.

    icefall's ``export.py --jit 1`` writes one. A transducer is ``decoder`` (the predictor) and ``joiner``; a
    model may have both. A streaming encoder (``--causal 1``) works chunk by chunk, as in a stream.

    It has no attention decoder: TorchScript does not compile the one of icefall's Zipformer (its
    ``subsequent_mask`` has arguments without types), and its ``nll`` is not exported. The source
    ``icefall`` reads the attention decoder from ``pretrained.pt``.
    """

    least_frames = 9  # the subsampling of icefall's Zipformer and Conformer yields nothing for fewer

    def __init__(self, options: EmissionOptions) -> None:
        self.tokens = tokens_of(options)
        self.device = torch.device(options.device)
        what = "a TorchScript model (weights alone, pretrained.pt, need --emissions.recipe)"
        with loading(options.model, what):
            self.network = torch.jit.load(options.model, map_location=self.device).eval()
        self.has_ctc = hasattr(self.network, "ctc_output")
        parts = [name for name in ("decoder", "joiner") if hasattr(self.network, name)]
        missing = [] if hasattr(self.network, "encoder") else ["encoder"]
        missing += [] if self.has_ctc or len(parts) == 2 else ["ctc_output"]
        missing += [name for name in ("decoder", "joiner") if parts and name not in parts]
        if missing:
            rule = "EmissionOptions.model must have encoder, and ctc_output or decoder and joiner"
            raise ValueError(f"{rule}, but {options.model!r} lacks {missing}")
        self._encoder = self.network.encoder
        if hasattr(self._encoder, "get_init_states"):
            with loading(options.model, "a streaming encoder of icefall (with chunk_size and pad_length)"):
                hop = 2 * int(self._encoder.chunk_size)  # of 20 ms
                self.chunked = ChunkedEncoder(self._encoder, hop, hop + int(self._encoder.pad_length))
            self._encoder = self.chunked
        if parts:
            with loading(options.model, "a transducer of icefall"):
                self.transducer = ModuleTransducer(self, options.model)
        measured = self.measured_frame_shift(options.model)
        self.frame_shift = options.frame_shift or measured

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        return self._encoder(features, lens)[:2]

    def log_probs(self, encoder_out: Tensor) -> Tensor:
        if not self.has_ctc:
            return super().log_probs(encoder_out)
        return self.network.ctc_output(encoder_out).float().log_softmax(dim=2)  # no change to log-probs
