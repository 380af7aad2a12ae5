"""Log-probs and transducers of an icefall export.
Knows: TorchScript files. Must not know: the recipe they were made with, search, fusion, manifests.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from icefall_fusion.acoustic.loading import loading
from icefall_fusion.acoustic.sources.base import FeatureSource, tokens_of
from icefall_fusion.acoustic.sources.chunked import ChunkedEncoder
from icefall_fusion.common.checks import check

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
                self._encoder = ChunkedEncoder(self._encoder, hop, hop + int(self._encoder.pad_length))
        if parts:
            with loading(options.model, "a transducer of icefall"):
                self.transducer = TorchScriptTransducer(self, options.model)
        measured = self.measured_frame_shift(options.model)
        self.frame_shift = options.frame_shift or measured

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        return self._encoder(features, lens)[:2]

    def log_probs(self, encoder_out: Tensor) -> Tensor:
        if not self.has_ctc:
            return super().log_probs(encoder_out)
        return self.network.ctc_output(encoder_out).float().log_softmax(dim=2)  # no change to log-probs

    def joiner_frames(self, encoder_out: Tensor) -> Optional[Tensor]:
        return None if self.transducer is None else self.network.joiner.encoder_proj(encoder_out).float()


class TorchScriptTransducer:
    """Predictor and joiner of a TorchScript export; see `Transducer`.

    Raises:
        ValueError: the joiner has no projections of its own, or the blank is not the vocabulary's.
    """

    def __init__(self, source: TorchScriptSource, name: str) -> None:
        network, tokens = source.network, source.tokens
        self._source, self._predictor, self._joiner = source, network.decoder, network.joiner
        for part in ("encoder_proj", "decoder_proj"):
            if not hasattr(self._joiner, part):
                raise ValueError(f"its joiner must have {part}, but has none")
        self.context_size, self.blank_id = int(self._predictor.context_size), int(self._predictor.blank_id)
        self.vocab_size = tokens.size
        check(self.blank_id == tokens.blank_id, f"blank of {name}", f"be {tokens.blank_id}", self.blank_id)
        self.start = start_of(self, source.device)

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        encoder_out, lens = self._source.encode(features, lens)
        return self._joiner.encoder_proj(encoder_out).float(), lens

    def predict(self, contexts: Tensor) -> Tensor:
        return self._joiner.decoder_proj(self._predictor(contexts, False)[:, 0]).float()

    def join(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        return self._joiner(encoder, predictor, False).float().log_softmax(dim=-1)


@torch.no_grad()
def start_of(transducer: Any, device: torch.device) -> tuple[int, ...]:
    """Return the context before the first piece that a model of icefall was trained with.

    It is "no piece" (-1) and the blank. Older models do not know -1: they refuse it, or read the last piece
    of the vocabulary. Their texts start with blanks, whose embedding is zero.

    Args:
        transducer: with ``predict``, ``context_size``, ``blank_id`` and ``vocab_size``.
        device: of its model.
    """
    rest = transducer.context_size - 1
    start, blanks = (-1,) * rest + (transducer.blank_id,), (transducer.blank_id,) * (rest + 1)
    if rest == 0:
        return start
    last = (transducer.vocab_size - 1,) * rest + (transducer.blank_id,)
    try:
        none, piece = (transducer.predict(torch.tensor([one], device=device)) for one in (start, last))
    except Exception as error:  # TorchScript and onnxruntime have types of their own for a wrong index
        if "index" not in str(error).lower() and "indices" not in str(error).lower():
            raise
        return blanks
    return blanks if torch.equal(none, piece) else start
