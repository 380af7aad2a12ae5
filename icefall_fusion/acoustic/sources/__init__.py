"""Sources of log-probs, one file each.
Knows: which there are. Must not know: search, fusion, manifests.

To add a source, write a class in a file of its own and name it in ``SOURCES``. For a model over log-mel
features ``base.FeatureSource`` does most. ``EmissionOptions`` holds the options of all sources. ``_kind_of``
recognizes a file or folder without ``--emissions.kind``.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from icefall_fusion.acoustic.loading import loading
from icefall_fusion.acoustic.prior import SourceWithPrior, read_prior
from icefall_fusion.acoustic.saved import SavedSource, read_vocabulary
from icefall_fusion.acoustic.sources.base import EmissionSource
from icefall_fusion.acoustic.sources.checkpoint import CheckpointSource
from icefall_fusion.acoustic.sources.huggingface import HuggingFaceSource
from icefall_fusion.acoustic.sources.icefall import IcefallSource
from icefall_fusion.acoustic.sources.onnx_files import OnnxSource
from icefall_fusion.acoustic.sources.torchscript import TorchScriptSource
from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.devices import check_device
from icefall_fusion.text.tokens import AcousticTokens

__all__ = ["SOURCES", "EmissionOptions", "EmissionSource", "open_source"]


@dataclass(frozen=True)
class EmissionOptions:
    """Which acoustic model, or which saved log-probs.

    Args:
        model: a folder of ours (config.json, model.safetensors, bpe.model), an icefall TorchScript file
            (.pt), icefall weights (pretrained.pt, with ``recipe``), a transducer of icefall or sherpa-onnx (a
            folder of encoder, decoder and joiner in .onnx, or the encoder's file), a Hugging Face CTC folder
            or hub name, or saved log-probs (a .npz or a folder of them).
        kind: one of auto, checkpoint, torchscript, huggingface, icefall, onnx, saved.
        tokens: bpe.model, tokens.txt (icefall), units.txt (WeNet), vocab.json (Hugging Face), or a folder
            that has one. Empty: the model's own, or the one beside the model.
        device: e.g. cpu or cuda.
        frame_shift: seconds an output frame; 0 takes the model's own.
        prior: file of the job internal-lm: the prior of labels is divided out (acoustic/prior.py).
        prior_scale: factor of the log prior; 0: none is divided out.
        recipe: folder of an icefall recipe (with train.py), whose code is run; for icefall.
        recipe_options: options of its train.py, as at its training, e.g. "--use-ctc 1".
    """

    model: str = ""
    kind: str = "auto"
    tokens: str = ""
    device: str = "cpu"
    frame_shift: float = 0.0
    prior: str = ""
    prior_scale: float = 0.3
    recipe: str = ""
    recipe_options: str = ""

    def __post_init__(self) -> None:
        check_choice(self.kind, ("auto", *SOURCES), "EmissionOptions.kind")
        check(self.frame_shift >= 0, "EmissionOptions.frame_shift", "be at least 0 s", self.frame_shift)
        good = math.isfinite(self.prior_scale) and self.prior_scale >= 0
        check(good, "EmissionOptions.prior_scale", "be at least 0", self.prior_scale)
        if self.kind not in ("auto", "icefall"):
            rule = f"be empty for kind {self.kind}"
            check(not self.recipe, "EmissionOptions.recipe", rule, self.recipe)
        if not self.recipe:
            rule = "be empty without recipe"
            check(not self.recipe_options, "EmissionOptions.recipe_options", rule, self.recipe_options)


def _open_saved(options: EmissionOptions) -> SavedSource:
    tokens = AcousticTokens.load(options.tokens) if options.tokens else read_vocabulary(options.model)
    return SavedSource(options.model, tokens, options.device, options.frame_shift)


#: By kind: what opens a source.
SOURCES: dict[str, Callable[[EmissionOptions], EmissionSource]] = {
    "checkpoint": CheckpointSource,
    "torchscript": TorchScriptSource,
    "huggingface": HuggingFaceSource,
    "icefall": IcefallSource,
    "onnx": OnnxSource,
    "saved": _open_saved,
}


def open_source(options: EmissionOptions) -> EmissionSource:
    """Open an acoustic model or saved log-probs.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the model is of no known kind, broken, or lacks a vocabulary or a CTC head; there is no
            such device.
    """
    check_device(options.device, "EmissionOptions.device")
    kind = options.kind
    if kind == "auto":
        kind = "icefall" if options.recipe else _kind_of(options.model)
    source = SOURCES[kind](options)
    if not options.prior or options.prior_scale == 0:
        return source
    return SourceWithPrior(source, read_prior(options.prior, source.tokens), options.prior_scale)


def _kind_of(model: str) -> str:
    check(bool(model), "EmissionOptions.model", "name a model folder or file", model)
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(
            f"EmissionOptions.model: there is no file or folder {model!r} (a Hugging Face hub name needs "
            f"--emissions.kind huggingface)"
        )
    if path.suffix == ".npz" or (path.is_dir() and any(path.glob("*.npz"))):
        return "saved"
    if path.is_file() and path.suffix in (".pt", ".ts", ".jit"):
        return "torchscript"
    if path.suffix == ".onnx" or (path.is_dir() and any(path.glob("encoder*.onnx"))):
        return "onnx"
    if (path / "config.json").is_file():
        with loading(path / "config.json", "a JSON object"):
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            ours = str(config.get("model_type", "")).startswith("icefall_fusion")
        return "checkpoint" if ours else "huggingface"
    raise ValueError(
        f"EmissionOptions.model must be a model folder (with config.json), a TorchScript .pt file, a folder "
        f"of encoder, decoder and joiner in .onnx or saved log-probs (.npz), but {model!r} is none of them"
    )
