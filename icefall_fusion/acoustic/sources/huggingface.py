"""Log-probs of Hugging Face CTC models.
Knows: transformers' CTC models and their tokenizers. Must not know: search, fusion, manifests.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch
from torch import Tensor

from icefall_fusion.acoustic.emissions import Emissions, no_frames, pad_rows
from icefall_fusion.acoustic.loading import loading
from icefall_fusion.common.checks import check
from icefall_fusion.data.audio import SAMPLE_RATE
from icefall_fusion.data.features import FRAME_SHIFT
from icefall_fusion.text.tokens import AcousticTokens

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources import EmissionOptions

_NOT_TRAINED = "masked_spec_embed"  # wav2vec 2.0 and its kin use it in training alone; many files lack it


class HuggingFaceSource:
    """Any ``AutoModelForCTC`` with a feature extractor and a vocabulary (wav2vec 2.0, HuBERT, ...).

    Raises:
        ValueError: the model is broken, out of reach, without a CTC head, or not of 16 kHz audio.
    """

    wants = "audio"
    model = transducer = None
    has_ctc = True

    def __init__(self, options: EmissionOptions) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

        self.device = torch.device(options.device)
        with loading(options.model, "a CTC model"):
            network, info = AutoModelForCTC.from_pretrained(options.model, output_loading_info=True)
        with loading(options.model, "a feature extractor"):
            self.extractor = AutoFeatureExtractor.from_pretrained(options.model)
            rate = int(self.extractor.sampling_rate)
        missing = sorted(name for name in info["missing_keys"] if not name.endswith(_NOT_TRAINED))
        rule = "be complete, CTC head included, but these are missing"
        check(not missing, f"weights of {options.model}", rule, missing[:5])
        self.network = network.to(self.device).eval()
        rule = f"take audio of {SAMPLE_RATE} Hz ({options.model})"
        check(rate == SAMPLE_RATE, "EmissionOptions.model", rule, rate)
        if options.tokens:
            self.tokens = AcousticTokens.load(options.tokens)
        else:
            with loading(options.model, "a tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(options.model)
            self.tokens = _tokens_of(tokenizer, self.network.config)
        self.frame_shift = options.frame_shift
        # Models normalized over time (wav2vec 2.0 base) take no mask, so padding would change results.
        self.can_batch = bool(getattr(self.extractor, "return_attention_mask", False))

    @torch.no_grad()
    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor]) -> Emissions:
        shift = self.frame_shift or self._frame_shift()
        rows = [row for row, audio in enumerate(inputs) if self._frames(len(audio)) > 0]
        if not rows:
            return no_frames(ids, self.tokens, shift)
        outs: dict[int, Tensor] = {}
        for group in [rows] if self.can_batch else [[row] for row in rows]:
            outs.update(zip(group, self._forward([inputs[row] for row in group])))
        nothing = outs[rows[0]][:0]
        padded, lens = pad_rows([outs.get(row, nothing) for row in range(len(ids))])
        return Emissions(list(ids), padded, lens, self.tokens, shift)

    def _forward(self, audios: Sequence[Tensor]) -> list[Tensor]:
        batch = self.extractor(
            [audio.numpy() for audio in audios],
            sampling_rate=SAMPLE_RATE,
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        logits = self.network(**batch).logits.float().log_softmax(dim=2)
        lens = [min(self._frames(len(audio)), logits.shape[1]) for audio in audios]
        if len(audios) == 1:
            lens = [logits.shape[1]]
        return [row[:frames] for row, frames in zip(logits, lens)]

    def _frames(self, samples: int) -> int:
        """Return the number of output frames for a number of samples."""
        length = torch.tensor([samples])
        for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
            lengths = getattr(self.network, name, None)
            if lengths is not None:
                if self.extractor.model_input_names[0] != "input_values":  # its input is feature frames
                    hop = getattr(self.extractor, "hop_length", round(SAMPLE_RATE * FRAME_SHIFT))
                    length = length // hop // int(getattr(self.extractor, "stride", 1))
                return max(0, int(lengths(length)[0]))
        name = type(self.network).__name__
        raise ValueError(f"EmissionOptions.model: a {name} has no method for its number of frames")

    def _frame_shift(self) -> float:
        seconds = 100
        return round(seconds / max(1, self._frames(seconds * SAMPLE_RATE)), 3)


def _tokens_of(tokenizer: Any, config: Any) -> AcousticTokens:
    """Return the vocabulary of a Hugging Face CTC model; ids that the tokenizer lacks get a name."""
    size = int(config.vocab_size)
    by_id = {index: piece for piece, index in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= size:
        raise ValueError(f"the tokenizer has ids up to {max(by_id)}, but the model has {size} outputs")
    pieces = [by_id.get(index, f"<unused{index}>") for index in range(size)]
    blank = config.pad_token_id
    good = blank is not None and 0 <= blank < size
    check(good, "config.pad_token_id (the blank)", f"be in 0..{size - 1}", blank)
    delimiter = getattr(tokenizer, "word_delimiter_token", None)
    delimiter = delimiter if delimiter in pieces else None
    return AcousticTokens.from_pieces(pieces, blank_id=blank, delimiter=delimiter)
