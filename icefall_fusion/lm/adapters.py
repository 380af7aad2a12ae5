"""LoRA adapters (Hu et al. 2022) in PEFT folders: made for a base, checked against it, merged into it.
Knows: peft, weights of a causal LM. Must not know: trees, search, fusion, training.
"""
from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, write_json
from icefall_fusion.lm.transplant import EMBEDDINGS_FILE, load_embeddings, save_embeddings
from icefall_fusion.text.tokens import AcousticTokens

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
#: Beside an adapter made here: {"name", "sha256", "sample"} of its base.
BASE_FILE = "base.json"
SAMPLES, SEED = 512, 5
SAME_VALUE = 0.01  # relative; bfloat16 rounds by 0.004
SAME_SHARE = 0.98  # fine-tuning moves far more of the values by more than `SAME_VALUE`


def sample_of(model: torch.nn.Module) -> list[float]:
    """Return weights at `SAMPLES` fixed places: they tell a base from its fine-tuned relatives, in any dtype.

    Raises:
        ValueError: weights are not in memory, or quantized.
    """
    matrices = [(name, p) for name, p in sorted(model.named_parameters()) if p.dim() > 1]
    odd = [name for name, p in matrices if p.device.type == "meta" or not p.is_floating_point()]
    check(not odd, "weights of an adapter's base", "be in memory and not quantized", odd[:3])
    generator = np.random.default_rng(SEED)
    values = []
    for index in range(SAMPLES):
        flat = matrices[index % len(matrices)][1].detach().view(-1)
        values.append(float(flat[int(generator.integers(0, len(flat)))]))
    return values


def weights_sha256(folder: PathLike) -> str:
    """Return the SHA-256 of a base: of the GGUF file that its folder was made of, else of its weight files.

    A name on the hub gives an empty string.
    """
    from icefall_fusion.lm.gguf_files import source_of

    known = source_of(folder).get("sha256")
    if known:
        return str(known)
    files = sorted(f for f in Path(folder).glob("*") if f.suffix in (".safetensors", ".bin"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while block := content.read(2**24):
                digest.update(block)
    return digest.hexdigest() if files else ""


def base_of(folder: PathLike) -> str:
    """Return the name of an adapter's base: a folder, a hub name or package:NAME/FILE.

    Raises:
        ValueError: the adapter does not name it.
    """
    name = _read_json(Path(folder) / CONFIG_FILE).get("base_model_name_or_path")
    check(isinstance(name, str) and bool(name), f"{CONFIG_FILE} of {folder}", "name the base", name)
    return str(name)


def has_pieces(folder: PathLike) -> bool:
    """Return whether an adapter brings a vocabulary of acoustic pieces with it."""
    return (Path(folder) / EMBEDDINGS_FILE).is_file()


def check_base(folder: PathLike, model: torch.nn.Module, name: str) -> None:
    """Raise ValueError, with both names, unless an adapter was made for this base.

    An adapter made here is known by its base's weights; another one by the last part of the base's name.
    """
    folder = Path(folder)
    rule = "have been made for the model {!r}"
    if (folder / BASE_FILE).is_file():
        base = _read_json(folder / BASE_FILE)
        theirs, ours = np.array(base.get("sample", []), float), np.array(sample_of(model))
        close = theirs.shape == ours.shape and np.isclose(theirs, ours, rtol=SAME_VALUE, atol=1e-6).mean()
        check(close >= SAME_SHARE, f"adapter {folder}", rule.format(name), base.get("name"))
        return
    made_for = _read_json(folder / CONFIG_FILE).get("base_model_name_or_path") or ""
    known = (name, str(getattr(model.config, "_name_or_path", "")))
    same = not made_for or any(_last(made_for) == _last(one) for one in known)
    more = f" (if it is the same model, say so in {CONFIG_FILE}: base_model_name_or_path)"
    check(same, f"adapter {folder}", rule.format(name) + more, made_for)


def merge(model: Any, folder: PathLike, name: str) -> Any:
    """Return a causal LM with an adapter added to its weights.

    Args:
        model: transformers model, changed in place.
        folder: PEFT folder of a LoRA adapter; with the embeddings of acoustic pieces if `has_pieces`.
        name: of the model, for messages.

    Raises:
        FileNotFoundError: the folder is no PEFT folder.
        ImportError: peft is not installed.
        ValueError: the adapter is for another base, is no LoRA adapter, or does not fit the model.
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"adapter must be a folder with {file}, but {str(folder)!r} has none")
    if find_spec("peft") is None:
        raise ImportError(f"adapter {folder} needs the package peft: pip install peft")
    check_base(folder, model, name)
    peft = _peft()
    if has_pieces(folder):
        load_embeddings(model, folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        check(config.peft_type == "LORA", f"adapter {folder}", "be of type LORA", str(config.peft_type))
        config.inference_mode = True
        weights = peft.load_peft_weights(str(folder), device="cpu")
        finite = all(bool(weight.isfinite().all()) for weight in weights.values())
        check(finite, f"weights of adapter {folder}", "be finite", "nan or inf")
        adapted = _with_adapter(model, config)
        result = peft.set_peft_model_state_dict(adapted, weights)
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split("\n")[:2])  # peft names every tensor
        raise ValueError(f"adapter {folder} does not fit the model {name}: {reason}") from error
    absent = [key for key in result.missing_keys if "lora_" in key]
    odd = [*absent, *result.unexpected_keys]
    check(not odd, f"weights of adapter {folder}", f"be those that {CONFIG_FILE} names for {name}", odd[:3])
    merged = adapted.merge_and_unload()
    merged.requires_grad_(False)
    return merged


def add_adapter(
    model: Any, rank: int, alpha: float, dropout: float, targets: Union[str, Sequence[str]], name: str
) -> Any:
    """Return the PEFT model of a new adapter: the base is frozen, the adapter's weights are float32.

    Args:
        model: transformers model.
        rank: r of the two factors.
        alpha: the factors' product counts ``alpha / rank``.
        dropout: of the adapter's input, in training.
        targets: names of linear layers, e.g. q_proj; or "all-linear".
        name: of the model, which the adapter will say.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has no such layers.
    """
    if find_spec("peft") is None:
        raise ImportError("training an adapter needs the package peft: pip install peft")
    peft = _peft()
    wanted = targets if isinstance(targets, str) else list(targets)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted,
                             task_type="CAUSAL_LM", base_model_name_or_path=name)
    try:
        adapted = _with_adapter(model, config)
    except ValueError as error:
        raise ValueError(f"targets of an adapter must be linear layers of {name}, but are {wanted!r}: {error}"
                         ) from error
    return adapted


def start_from(adapted: Any, folder: PathLike) -> None:
    """Give a new adapter the weights of another one of the same base (see `check_base`), layers and rank.

    Raises:
        ValueError: it does not fit.
    """
    peft = _peft()
    try:
        result = peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(str(folder), device="cpu"))
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise ValueError(f"TrainLmOptions.init: {folder} has another rank: {reason}") from error
    odd = [*(key for key in result.missing_keys if "lora_" in key), *result.unexpected_keys]
    check(not odd, f"TrainLmOptions.init {folder}", "have the layers of TrainLmOptions.lora", odd[:3])


def save_adapter(
    adapted: Any, folder: PathLike, base: dict[str, Any], dtype: torch.dtype, card: str,
    pieces: Optional[AcousticTokens] = None,
) -> None:
    """Write an adapter as a PEFT folder with its card; no file is ever half written.

    Args:
        adapted: of `add_adapter`.
        folder: made if missing; files there are replaced.
        base: {"name", "sha256", "sample"} of the base.
        dtype: of the stored weights.
        card: text of README.md.
        pieces: vocabulary that the base was given (see `transplant`): it and the embeddings are stored too.

    Raises:
        ValueError: the weights do not fit ``dtype``; nothing is written.
    """
    peft = _peft()
    folder = Path(folder)
    state = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    state = {key: value.detach().to("cpu", dtype) for key, value in state.items()}
    finite = all(bool(value.isfinite().all()) for value in state.values())
    check(finite, "dtype", "be one in which the adapter's weights are finite", str(dtype))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary)
        config = adapted.peft_config["default"]
        training, config.inference_mode = config.inference_mode, True
        config.save_pretrained(temporary)
        config.inference_mode = training
        _save_tensors(state, made / WEIGHTS_FILE)
        write_json(made / BASE_FILE, base)
        if pieces is not None:
            save_embeddings(adapted, made, dtype)
            (made / "bpe.model").write_bytes(pieces.processor.serialized_model_proto())
        (made / "README.md").write_text(card, encoding="utf-8")
        for path in sorted(made.iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def _peft() -> Any:
    """Return the package peft. It imports bitsandbytes, which warns on CPUs of kernels nobody asked for."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import peft

    return peft


def _with_adapter(model: Any, config: Any) -> Any:
    """Return the PEFT model of a config, which keeps its base's name."""
    peft = _peft()
    name = config.base_model_name_or_path
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft asks by the old name
        adapted = peft.get_peft_model(model, config)
    config.base_model_name_or_path = name
    return adapted


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata={"format": "pt"})


def _last(name: str) -> str:
    return Path(name).name.lower()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, but is not: {error}") from error
    check(isinstance(content, dict), str(path), "hold one JSON object", type(content).__name__)
    return content
