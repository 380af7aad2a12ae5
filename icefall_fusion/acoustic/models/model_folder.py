"""Folders of acoustic models: weights in one file or in several, options, vocabulary.
Knows: the model, files. Must not know: what the model computes, data, search, fusion.
"""
from __future__ import annotations

import dataclasses
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from icefall_fusion.acoustic.models.ctc_aed import CtcAed, ModelOptions
from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, atomic_path, write_json
from icefall_fusion.text.language import ENGLISH, Language, language_of

MODEL_TYPE = "icefall_fusion_ctc_aed"
_ONE = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")


def save(
    model: CtcAed, folder: PathLike, dtype: Optional[torch.dtype] = None, largest: Optional[str] = None
) -> None:
    """Write ``config.json``, the weights and ``bpe.model`` (if the model knows its pieces).

    The model's ``language`` goes into ``config.json`` if it is not English.

    Args:
        folder: made if missing.
        dtype: type of the stored weights; None keeps float32. Feature statistics stay float32.
        largest: size of a file of weights at most, e.g. "15MB" (of 10^6 bytes): larger weights are written to
            ``model-00001-of-N.safetensors`` and so on. None: one file, ``model.safetensors``.
    """
    folder = Path(folder)
    weights = {}
    for name, value in model.state_dict().items():
        keep = dtype is None or name in ("encoder.mean", "encoder.deviation")
        weights[name] = value.detach().cpu().to(value.dtype if keep else dtype).contiguous()
    config = {"model_type": MODEL_TYPE, "options": dataclasses.asdict(model.options)}
    if model.bpe is not None and model.tokens is not None:
        config["bpe_fingerprint"] = model.tokens.fingerprint()
        with atomic_path(folder / "bpe.model") as temporary:
            shutil.copyfile(model.bpe, temporary)
    config |= model_language(model).plain()  # empty for English
    _write(weights, folder, largest)
    write_json(folder / "config.json", config)


def load(folder: PathLike, device: str = "cpu") -> CtcAed:
    """Read a folder that ``save`` wrote; the model is in float32 and in eval mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds another kind of model, a vocabulary that does not fit, or broken files.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no acoustic model folder: config.json is missing")
    files = weight_files(folder)
    config = _read_config(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        kind = config.get("model_type")
        raise ValueError(f"{folder}/config.json: model_type must be {MODEL_TYPE!r}, but is {kind!r}")
    check("options" in config, f"{folder}/config.json", "have options", sorted(config))
    bpe = folder / "bpe.model"
    try:
        options = ModelOptions.from_dict(config["options"])
    except (ValueError, TypeError, AttributeError) as error:  # unknown names, values of another type
        raise ValueError(f"{folder} cannot be loaded as an acoustic model: {error}") from error
    model = CtcAed(options, bpe if bpe.is_file() else None)
    model.language = language_of(kept=config)
    wanted = config.get("bpe_fingerprint")
    if wanted is not None and (model.tokens is None or model.tokens.fingerprint() != wanted):
        raise ValueError(f"{bpe} must be the SentencePiece model of the training, but is missing or differs")
    try:
        weights = {name: value for path in files for name, value in load_file(path).items()}
        model.load_state_dict({name: value.float() for name, value in weights.items()})
    except (SafetensorError, RuntimeError, OSError) as error:  # cut short, or of another size
        what = textwrap.shorten(str(error), 400)
        raise ValueError(f"{folder} cannot be loaded as an acoustic model: {what}") from error
    return model.to(device).eval()


def model_language(model: Any) -> Language:
    """Return the language of an acoustic model's text: its attribute ``language``, else English."""
    return getattr(model, "language", ENGLISH)


def weight_files(folder: PathLike) -> list[Path]:
    """Return the files of a folder's weights: ``model.safetensors``, or all that it was split into.

    Raises:
        FileNotFoundError: there are none, or one of them is missing.
    """
    folder = Path(folder)
    if (folder / _ONE).is_file():
        return [folder / _ONE]
    counts = {int(match[2]) for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    count = max(counts, default=0)
    wanted = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    missing = [path.name for path in wanted or [folder / _ONE] if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} is no acoustic model folder: {missing[0]} is missing")
    return wanted


def _write(weights: dict[str, Tensor], folder: Path, largest: Optional[str]) -> None:
    """Write weights, in several files if one would be too large; files of another split are removed."""
    parts = {_ONE: list(weights)}
    if largest is not None:
        from huggingface_hub import split_torch_state_dict_into_shards

        pattern = "model{suffix}.safetensors"
        plan = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=largest)
        parts = plan.filename_to_tensors
    for name, tensors in parts.items():
        with atomic_path(folder / name) as temporary:
            save_file({tensor: weights[tensor] for tensor in tensors}, str(temporary))
    for path in folder.iterdir():
        if path.name not in parts and (path.name == _ONE or _SHARD.fullmatch(path.name)):
            path.unlink()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{path} cannot be loaded as JSON: {error}") from error
    check(isinstance(config, dict), str(path), "be a JSON object", config)
    return config
