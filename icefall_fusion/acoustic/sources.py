"""Where log-probs come from: our model folder, an icefall TorchScript export, any Hugging Face CTC model.
Knows: acoustic models and their vocabularies. Must not know: search, fusion, manifests.
"""
from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Optional, Protocol, Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor

from icefall_fusion.acoustic.emissions import Emissions, SavedSource, no_frames, pad_rows, scatter_rows
from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.devices import check_device
from icefall_fusion.common.files import PathLike
from icefall_fusion.text.tokens import AcousticTokens

KINDS = ("auto", "checkpoint", "torchscript", "huggingface", "saved")
SAMPLE_RATE = 16_000  # Hz, of all audio that sources are given
FEATURE_SHIFT = 0.01  # seconds between feature frames
_BINS = 80
_SILENCE = 1000  # feature frames
_BROKEN = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, torch.jit.Error,
)  # fmt: skip
_NOT_TRAINED = "masked_spec_embed"  # wav2vec 2.0 and its kin use it in training alone; many files lack it


@dataclass(frozen=True)
class EmissionOptions:
    """Which acoustic model, or which saved log-probs.

    Args:
        model: a folder of ours (config.json, model.safetensors, bpe.model), an icefall TorchScript file
            (.pt), a Hugging Face CTC folder or hub name, or saved log-probs (a .npz or a folder of them).
        kind: one of auto, checkpoint, torchscript, huggingface, saved.
        tokens: bpe.model or its folder; needed by torchscript and saved, else the model's own.
        device: e.g. cpu or cuda.
        frame_shift: seconds an output frame; 0 takes the model's own.
    """

    model: str = ""
    kind: str = "auto"
    tokens: str = ""
    device: str = "cpu"
    frame_shift: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.kind, KINDS, "EmissionOptions.kind")
        check(self.frame_shift >= 0, "EmissionOptions.frame_shift", "be at least 0 s", self.frame_shift)


class EmissionSource(Protocol):
    """Makes emissions of a batch.

    ``wants`` says of what: ``features`` [T,80] log-mel, ``audio`` [samples] at ``sample_rate`` Hz, or
    ``nothing`` (saved: ids are enough). ``model`` scores N-best lists by an attention decoder, or is None.
    ``network`` is what holds the weights, or None.
    """

    wants: str
    sample_rate: int
    tokens: AcousticTokens
    model: Any
    network: Optional[torch.nn.Module]

    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor]) -> Emissions:
        """Return the log-probs of a batch; an input that is too short for one frame gets none."""
        ...


def open_source(options: EmissionOptions) -> EmissionSource:
    """Open an acoustic model or saved log-probs.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is none of the known kinds, broken, or lacks a vocabulary or a CTC head;
            there is no such device.
    """
    check_device(options.device, "EmissionOptions.device")
    kind = options.kind if options.kind != "auto" else _kind_of(options.model)
    if kind == "saved":
        return SavedSource(options.model, _tokens_of(options), options.device, options.frame_shift)
    sources = {
        "checkpoint": CheckpointSource,
        "torchscript": TorchScriptSource,
        "huggingface": HuggingFaceSource,
    }
    return sources[kind](options)


@contextlib.contextmanager
def _loading(name: PathLike, what: str) -> Iterator[None]:
    """Turn what libraries say of broken files, or of a hub out of reach, into a ValueError with the name."""
    try:
        yield
    except _BROKEN as error:
        raise ValueError(f"{name} cannot be loaded as {what}: {error}") from error


def _kind_of(model: str) -> str:
    check(bool(model), "EmissionOptions.model", "name a model folder or file", model)
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(
            f"EmissionOptions.model: there is no file or folder {model!r} (a Hugging Face hub name needs "
            f"--kind huggingface)"
        )
    if path.suffix == ".npz" or (path.is_dir() and any(path.glob("*.npz"))):
        return "saved"
    if path.is_file() and path.suffix in (".pt", ".ts", ".jit"):
        return "torchscript"
    if (path / "config.json").is_file():
        with _loading(path / "config.json", "a JSON object"):
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            ours = str(config.get("model_type", "")).startswith("icefall_fusion")
        return "checkpoint" if ours else "huggingface"
    raise ValueError(
        f"EmissionOptions.model must be a model folder (with config.json), a TorchScript .pt file or saved "
        f"log-probs (.npz), but {model!r} is none of them"
    )


def _tokens_of(options: EmissionOptions) -> AcousticTokens:
    """Load the vocabulary that the options name, or that lies beside the model."""
    if options.tokens:
        return AcousticTokens.load(options.tokens)
    folder = Path(options.model) if Path(options.model).is_dir() else Path(options.model).parent
    if not (folder / "bpe.model").is_file():
        raise FileNotFoundError(
            f"EmissionOptions.tokens must name a bpe.model, for there is none beside {options.model!r}"
        )
    return AcousticTokens.load(folder)


class CheckpointSource:
    """Our CTC-AED from a folder that ``models.save`` wrote."""

    wants = "features"
    sample_rate = SAMPLE_RATE

    def __init__(self, options: EmissionOptions) -> None:
        from icefall_fusion.acoustic.models.ctc_aed import check_vocabulary, load

        self.model = self.network = load(options.model, options.device)
        own = self.model.tokens
        self.tokens = _tokens_of(options) if options.tokens or own is None else own
        what = f"the pieces of {options.tokens or options.model}"
        check_vocabulary(self.model.options, self.tokens.size, self.tokens.blank_id, what)
        same = own is None or own.fingerprint() == self.tokens.fingerprint()
        rule = f"have the pieces of the model ({options.model} has a bpe.model of its own)"
        check(same, "EmissionOptions.tokens", rule, options.tokens)
        self.device = torch.device(options.device)
        self.frame_shift = options.frame_shift or 0.04

    @torch.no_grad()
    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor]) -> Emissions:
        lens = torch.tensor([len(row) for row in inputs], dtype=torch.long)
        out_lens = self.model.encoder.out_lens(lens).clamp(min=0)
        rows = [row for row, frames in enumerate(out_lens.tolist()) if frames > 0]
        if not rows:
            return no_frames(ids, self.tokens, self.frame_shift)
        padded, kept = pad_rows([inputs[row] for row in rows])
        encoder_out, _ = self.model.encoder(padded.to(self.device), kept.to(self.device))
        log_probs = scatter_rows(rows, self.model.ctc_log_probs(encoder_out), len(ids))
        encoder_out = scatter_rows(rows, encoder_out, len(ids))
        return Emissions(list(ids), log_probs, out_lens, self.tokens, self.frame_shift, encoder_out)


class TorchScriptSource:
    """An icefall export: a TorchScript object with ``encoder(features, lens)`` and ``ctc_output(frames)``."""

    wants = "features"
    sample_rate = SAMPLE_RATE
    model = None
    least_frames = 9  # Conv2d and Zipformer subsampling of icefall yield nothing for fewer

    def __init__(self, options: EmissionOptions) -> None:
        self.tokens = _tokens_of(options)
        self.device = torch.device(options.device)
        with _loading(options.model, "a TorchScript model"):
            self.network = torch.jit.load(options.model, map_location=self.device).eval()
        missing = [name for name in ("encoder", "ctc_output") if not hasattr(self.network, name)]
        if missing:
            raise ValueError(f"EmissionOptions.model must have encoder and ctc_output, but {options.model!r} "
                             f"lacks {missing}")  # fmt: skip
        self.frame_shift = options.frame_shift or self._frame_shift(options.model)

    @torch.no_grad()
    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor]) -> Emissions:
        rows = [row for row, features in enumerate(inputs) if len(features) >= self.least_frames]
        if not rows:
            return no_frames(ids, self.tokens, self.frame_shift)
        padded, lens = pad_rows([inputs[row] for row in rows])
        encoder_out, kept = self.network.encoder(padded.to(self.device), lens.to(self.device))[:2]
        log_probs = self.network.ctc_output(encoder_out).float().log_softmax(dim=2)  # no change to log-probs
        out_lens = torch.zeros(len(ids), dtype=torch.long)
        out_lens[rows] = kept.cpu().long()
        log_probs = scatter_rows(rows, log_probs, len(ids))
        encoder_out = scatter_rows(rows, encoder_out, len(ids))
        return Emissions(list(ids), log_probs, out_lens, self.tokens, self.frame_shift, encoder_out)

    @torch.no_grad()
    def _frame_shift(self, name: str) -> float:
        """Return the seconds of an output frame; of ten seconds, as subsampling loses frames at the edges.

        Raises:
            ValueError: the encoder does not take features [B,T,80] and lengths.
        """
        silence = torch.zeros(1, _SILENCE, _BINS, device=self.device)
        with _loading(name, "an encoder of 80 features a frame"):
            encoder_out = self.network.encoder(silence, torch.tensor([_SILENCE], device=self.device))[0]
        return round(_SILENCE / max(1, encoder_out.shape[1])) * FEATURE_SHIFT


class HuggingFaceSource:
    """Any ``AutoModelForCTC`` with a feature extractor and a vocabulary (wav2vec 2.0, HuBERT, ...)."""

    wants = "audio"
    model = None

    def __init__(self, options: EmissionOptions) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

        self.device = torch.device(options.device)
        with _loading(options.model, "a CTC model"):
            network, info = AutoModelForCTC.from_pretrained(options.model, output_loading_info=True)
        with _loading(options.model, "a feature extractor"):
            self.extractor = AutoFeatureExtractor.from_pretrained(options.model)
            self.sample_rate = int(self.extractor.sampling_rate)
        missing = sorted(name for name in info["missing_keys"] if not name.endswith(_NOT_TRAINED))
        rule = "be complete, CTC head included, but these are missing"
        check(not missing, f"weights of {options.model}", rule, missing[:5])
        self.network = network.to(self.device).eval()
        rule = f"take audio of {SAMPLE_RATE} Hz ({options.model})"
        check(self.sample_rate == SAMPLE_RATE, "EmissionOptions.model", rule, self.sample_rate)
        if options.tokens:
            self.tokens = AcousticTokens.load(options.tokens)
        else:
            with _loading(options.model, "a tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(options.model)
            self.tokens = _hf_tokens(tokenizer, self.network.config)
        self.frame_shift = options.frame_shift
        # Models normalized over time (wav2vec 2.0 base) hear padding and take no mask: one at a time then.
        self.can_batch = bool(getattr(self.extractor, "return_attention_mask", False))

    @torch.no_grad()
    def emit(self, ids: Sequence[str], inputs: Sequence[Tensor]) -> Emissions:
        shift = self.frame_shift or self._frame_shift()
        rows = [row for row, audio in enumerate(inputs) if self._frames(len(audio)) > 0]
        outs: dict[int, Tensor] = {}
        step = max(1, len(rows)) if self.can_batch else 1
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            for row, log_probs in zip(part, self._forward([inputs[row] for row in part])):
                outs[row] = log_probs
        if not outs:
            return no_frames(ids, self.tokens, shift)
        nothing = next(iter(outs.values()))[:0]
        padded, lens = pad_rows([outs.get(row, nothing) for row in range(len(ids))])
        return Emissions(list(ids), padded, lens, self.tokens, shift)

    def _forward(self, audios: Sequence[Tensor]) -> list[Tensor]:
        batch = self.extractor(
            [audio.numpy() for audio in audios],
            sampling_rate=self.sample_rate,
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        logits = self.network(**batch).logits.float().log_softmax(dim=2)
        lens = [min(self._frames(len(audio)), logits.shape[1]) for audio in audios]
        if len(audios) == 1:
            lens = [logits.shape[1]]
        return [row[:frames] for row, frames in zip(logits, lens)]

    def _frames(self, samples: int) -> int:
        """Return the number of output frames of so many samples."""
        length = torch.tensor([samples])
        for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
            lengths = getattr(self.network, name, None)
            if lengths is not None:
                if self.extractor.model_input_names[0] != "input_values":  # it counts feature frames
                    hop = getattr(self.extractor, "hop_length", round(self.sample_rate * FEATURE_SHIFT))
                    length = length // hop // int(getattr(self.extractor, "stride", 1))
                return max(0, int(lengths(length)[0]))
        name = type(self.network).__name__
        raise ValueError(f"EmissionOptions.model: a {name} does not tell its number of frames")

    def _frame_shift(self) -> float:
        seconds = 100
        return round(seconds / max(1, self._frames(seconds * self.sample_rate)), 3)


def _hf_tokens(tokenizer: Any, config: Any) -> AcousticTokens:
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
