"""GGUF files, the format of llama.cpp, as model folders: each is converted once into the cache.
Knows: transformers, gguf, the cache folder. Must not know: trees, search, fusion.
"""
from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike, fingerprint, write_json
from icefall_fusion.common.native_build import cache_folder

#: In a converted folder: {"file", "sha256", "architecture", "name", "license"} of the GGUF file.
SOURCE_FILE = "gguf.json"
FORMAT = 1  # part of a converted folder's name: raise it when conversion changes
PACKAGE = "package:"
#: Byte-level BPE that splits words like GPT-2; transformers read others as if they did.
SPLIT_LIKE_GPT2 = ("default", "gpt-2", "smollm")


def resolve_package(name: str) -> Path:
    """Return the path of ``package:NAME/FILE``: a file or folder of an installed Python package.

    Raises:
        ValueError: it names no package, or no file.
        FileNotFoundError: the package is not installed, or has no such file.
    """
    package, _, file = name[len(PACKAGE) :].partition("/")
    good = package.isidentifier() and bool(file) and ".." not in Path(file).parts
    check(good, "model", "be package:NAME/FILE, with the name under which NAME is imported", name)
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise FileNotFoundError(f"model {name!r}: no package {package!r} is installed")
    for folder in folders:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    raise FileNotFoundError(f"model {name!r}: the package in {folders[0]} has no {file!r}")


def converted(path: PathLike) -> Path:
    """Return the model folder of a GGUF file, made in the cache on the first call.

    The folder's name tells the file (name, size, samples of its content) and the versions of transformers and
    gguf. The cache is ``$ICEFALL_FUSION_CACHE``, or ``icefall_fusion`` in the user's cache.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package gguf is not installed.
        ValueError: the file is truncated or no GGUF file, or transformers cannot read its architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"GGUF file {str(path)!r} does not exist")
    _need_gguf(path)
    made_by = f"{fingerprint(path)} {FORMAT} {version('transformers')} {version('gguf')}"
    key = hashlib.sha1(made_by.encode()).hexdigest()[:12]
    folder = cache_folder() / "gguf" / f"{path.stem}-{key}"
    convert(path, folder)
    return folder


def convert(path: PathLike, folder: PathLike) -> None:
    """Write the model folder of a GGUF file, unless it is there: weights, config, tokenizer, `SOURCE_FILE`.

    The folder appears as a whole or not at all. Of several processes one converts, the others wait for it.
    Weights are stored as float16, or as the file has them where it has float32 or bfloat16 matrices.

    Raises:
        ImportError, ValueError: see `converted`.
    """
    path, folder = Path(path), Path(folder)
    if folder.is_dir():
        return
    _need_gguf(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}."
    with open(folder.parent / f"{prefix}lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        for left in folder.parent.glob(f"{prefix}*.part"):  # of a conversion that was killed
            shutil.rmtree(left, ignore_errors=True)
        logging.warning("converting %s once into %s", path, folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix, suffix=".part") as temporary:
            made = Path(temporary) / folder.name
            _write(path, made)
            os.rename(made, folder)


def source_of(folder: PathLike) -> dict[str, Any]:
    """Return what `SOURCE_FILE` says of a converted folder; nothing for other folders and names."""
    file = Path(folder) / SOURCE_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _need_gguf(path: Path) -> None:
    if find_spec("gguf") is None:
        raise ImportError(f"{path} needs the package gguf: pip install gguf")


def _write(path: Path, folder: Path) -> None:
    """Convert to a folder that does not exist yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields, types = _read_header(path)
    where = {"pretrained_model_name_or_path": str(path.resolve().parent), "gguf_file": path.name}
    dense = {"quantization_config": _dense()} if _dense() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, **dense, dtype=_stored_dtype(types))
        if not all(bool(p.isfinite().all()) for p in model.parameters()):  # beyond float16
            model = AutoModelForCausalLM.from_pretrained(**where, **dense, dtype=torch.float32)
    except (AttributeError, ImportError, LookupError, NotImplementedError, OSError, RuntimeError, TypeError,
            ValueError) as error:
        kind, reader = fields["general.architecture"], f"transformers {version('transformers')}"
        raise ValueError(f"{path} (architecture {kind}) cannot be read by {reader}: {error}") from error
    _correct_tokenizer(path, tokenizer, fields)
    _plain(model).save_pretrained(folder)
    _save_tokenizer(tokenizer, len(fields["tokenizer.ggml.tokens"]), folder)
    digest = hashlib.sha256()
    with open(path, "rb") as content:
        while block := content.read(2**24):
            digest.update(block)
    names = ("architecture", "name", "license")
    more = {name: fields.get(f"general.{name}", "") for name in names}
    write_json(folder / SOURCE_FILE, {"file": path.name, "sha256": digest.hexdigest(), **more})
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes 0600; others may read the cache


def _read_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the fields of a GGUF file and the types of its matrices.

    Raises:
        ValueError: the file is truncated or no GGUF file.
    """
    import gguf

    size = path.stat().st_size
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (LookupError, OSError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path} ({size} bytes) is truncated, or no GGUF file: {error}") from error
    check(0 < end <= size, f"GGUF file {path}", f"have {end} bytes with at least one tensor", f"{size} bytes")
    rule = "name its architecture"
    check("general.architecture" in fields, f"GGUF file {path}", rule, sorted(fields)[:5])
    return fields, {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}


def _stored_dtype(types: set[str]) -> torch.dtype:
    if types & {"F32", "F64"}:
        return torch.float32
    return torch.bfloat16 if types == {"BF16"} else torch.float16


def _save_tokenizer(tokenizer: Any, size: int, folder: Path) -> None:
    """Save a tokenizer without tokens that the file does not have: transformers add ``<|endoftext|>``."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    if len(tokenizer) > size and file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
        write_json(file, content)


def _dense() -> Any:
    """Return what asks transformers for plain weights; None of versions that know nothing else."""
    from transformers.utils import quantization_config

    known = getattr(quantization_config, "GgufConfig", None)
    return None if known is None else known(dequantize=True)


def _plain(model: Any) -> Any:
    """Return the model as one that can be saved: transformers refuse to save what they read from GGUF."""
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    config.architectures = [type(model).__name__]
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _correct_tokenizer(path: Path, tokenizer: Any, fields: dict[str, Any]) -> None:
    """Give the tokenizer bos and eos of the file; raise ValueError unless tokens have the file's ids."""
    own = fields.get("tokenizer.ggml.tokens", [])
    check(len(own) > 0, f"GGUF file {path}", "have a tokenizer", "without tokens")
    read = tokenizer.convert_ids_to_tokens(list(range(len(own))))
    odd = [(index, token, other) for index, (token, other) in enumerate(zip(own, read)) if token != other]
    rule = "be read with its own ids, but transformers give other tokens (id, file's token, theirs)"
    check(not odd, f"tokenizer of {path}", rule, odd[:3])
    for name in ("bos", "eos"):  # transformers 5.17 take those of GPT-2
        token = fields.get(f"tokenizer.ggml.{name}_token_id")
        rule = f"lie between 0 and {len(own) - 1}"
        check(token is None or 0 <= token < len(own), f"{name} token of {path}", rule, token)
        if token is not None and getattr(tokenizer, f"{name}_token_id") != token:
            setattr(tokenizer, f"{name}_token", own[token])
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and split not in SPLIT_LIKE_GPT2:
        logging.warning("the tokenizer of %s splits words by rule %r, but transformers read it as GPT-2's: "
                        "words with digits or apostrophes may get other tokens", path, split)
