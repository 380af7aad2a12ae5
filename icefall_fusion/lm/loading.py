"""Load a language model: its weights, its vocabulary, what its config says, and a check of its tree scores.
Knows: transformers, files of a model folder, a model's tree. Must not know: search, fusion.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
import torch
from safetensors import SafetensorError

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.common.precision import FAST, fast_dtype
from icefall_fusion.lm.tree_forward import PACKED_ATTENTION
from icefall_fusion.text.tokens import AcousticTokens

if TYPE_CHECKING:
    from icefall_fusion.lm.causal_lm import CausalLm

QUANTIZATIONS = (None, "8bit", "4bit", "int8")
LAYER_TYPES = {"full_attention", "sliding_attention"}
PROBES = ("hello world", "the cat sat on the mat", "it's a long way", "Good morning, Mrs. Smith!")
SENTENCE_PIECE_FILES = ("tokenizer.model", "spiece.model")
TOKENIZER_FILES = (*SENTENCE_PIECE_FILES, "tokenizer.json", "tokenizer_config.json", "vocab.json")
CHECK_SEED = 7
CHECK_ROUNDS = 3
TOLERANCE_FLOAT32 = 2e-4  # natural log a token, of three quarters of the paths
TOLERANCE_STEEP = 0.01  # of the others; SmolLM2 after a few steps of an adapter: 0.0009
TOLERANCE_HALF = 0.25  # of the median; SmolLM2: up to 0.12, with wrong masks or positions from 0.6

# --- weights and what the config says -------------------------------------------------------------------


def model_source(path_or_name: PathLike) -> str:
    """Return the folder or hub name of a model; a GGUF file is converted, a package's file is found."""
    good = isinstance(path_or_name, (str, os.PathLike))
    check(good, "path_or_name", "be a folder or a hub name", path_or_name)
    name = str(path_or_name)
    if name.startswith("package:") or name.endswith(".gguf"):
        from icefall_fusion.lm import gguf_files

        name = str(gguf_files.resolve_package(name)) if name.startswith(gguf_files.PACKAGE) else name
        return str(gguf_files.converted(name)) if name.endswith(".gguf") else name
    return name


def load_model(
    name: str, dtype: Any, device: Any, device_map: Any, quantization: Optional[str], adapter: Any = None
) -> Any:
    """Return the transformers model of a `model_source`; see `CausalLm.from_pretrained`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_folder(name)
    rule = "not be set with a quantization (quantized weights cannot take it in exactly)"
    check(not adapter or quantization is None, "adapter", rule, str(adapter))
    if dtype == FAST:
        spread = device_map is not None and torch.cuda.is_available()
        dtype = fast_dtype("cuda" if spread else torch.device(device).type)
    options = {"dtype": dtype, "device_map": device_map}
    if quantization is not None:
        from icefall_fusion.lm.quantization import quantization_options

        options.update(quantization_options(quantization))
    if device_map is not None and find_spec("accelerate") is None:
        raise ImportError("device_map needs the package accelerate: pip install accelerate")
    if quantization is not None and device_map is None:
        options["device_map"] = {"": device}  # quantized weights are made on their device
    options = {key: value for key, value in options.items() if value is not None}
    try:
        config = AutoConfig.from_pretrained(name)
        kind = config.model_type
        check(not config.is_encoder_decoder, f"model {name}", "be a causal LM, not an encoder-decoder", kind)
        model, info = AutoModelForCausalLM.from_pretrained(
            name, config=config, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{name} cannot be loaded as a causal LM: {error}") from error
    missing = sorted(info["missing_keys"])
    check(not missing, f"weights of {name}", "be complete, but these are missing", missing[:5])
    model = model if "device_map" in options else model.to(device)
    if adapter:
        from icefall_fusion.lm.adapters import merge

        return merge(model, adapter, name)
    return model


def use_packed_attention(model: Any) -> bool:
    """Switch an `sdpa` model to packed attention; return whether the model can follow."""
    if model.config._attn_implementation not in ("sdpa", PACKED_ATTENTION):
        return False
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # sdpa leaves the cap out; newer transformers choose this too
        return False
    if not getattr(model, "_supports_attention_backend", False):  # its attention is a class of its own
        return False
    model.set_attn_implementation(PACKED_ATTENTION)
    return True


def attention_window(config: Any, name: str) -> tuple[Optional[int], bool]:
    """Return (sliding window in tokens or None, whether some layers have one and some not)."""
    types = set(getattr(config, "layer_types", None) or ())
    check(types <= LAYER_TYPES, f"layers of {name}", f"be of types {sorted(LAYER_TYPES)}", sorted(types))
    alibi = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    check(not alibi, f"positions of {name}", "come from position ids, not from ALiBi", "alibi")
    window = getattr(config, "sliding_window", None)
    if types:
        return (window, len(types) > 1) if "sliding_attention" in types else (None, False)
    return (window if getattr(config, "use_sliding_window", True) else None), False


def longest_path(model: Any, config: Any) -> Optional[int]:
    """Return the longest path of a model with a table of positions or a length-dependent rotary scaling."""
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit and rope.get("rope_type") in ("dynamic", "longrope"):
        return int(rope.get("original_max_position_embeddings") or limit)
    inputs = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not inputs]
    return int(limit) if limit and any(table.num_embeddings >= limit for table in tables) else None


def _check_folder(name: str) -> None:
    """Raise FileNotFoundError when ``name`` lacks config.json, or looks like a path and is none."""
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model folder must hold a config.json, but {name!r} does not")
    elif folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model must be a folder, a .gguf file or a hub name, but {name!r} is none")


# --- the vocabulary -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Args:
        tokenizer: Hugging Face tokenizer, or None.
        pieces: acoustic pieces (the folder has ``bpe.model``), or None.
        bos_id: start of a text, or None.
        eos_id: end of a text, or None.
    """

    tokenizer: Any = None
    pieces: Optional[AcousticTokens] = None
    bos_id: Optional[int] = None
    eos_id: Optional[int] = None

    @classmethod
    def load(cls, path_or_name: PathLike, config: Any) -> Vocabulary:
        """Read the tokens beside a model.

        Args:
            path_or_name: model folder or hub name.
            config: the model's config; its bos and eos are used if the tokenizer has none.
        Raises:
            ValueError: the tokenizer contradicts the SentencePiece model beside it.
        """
        folder = Path(path_or_name)
        config = config.get_text_config(decoder=True)
        bos_id, eos_id = _first(config.bos_token_id), _first(config.eos_token_id)
        if (folder / "bpe.model").is_file():
            pieces = AcousticTokens.load(folder)
            mark = pieces.sos_eos_id
            return cls(None, pieces, bos_id if mark is None else mark, eos_id if mark is None else mark)
        if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return cls(None, None, bos_id, eos_id)
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path_or_name))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"the tokenizer of {path_or_name} cannot be loaded: {error}") from error
        _check_against_sentence_piece(folder, tokenizer)
        bos_id = bos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        eos_id = eos_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return cls(tokenizer, None, bos_id, eos_id)

    def with_marks(self, bos: Optional[str], eos: Optional[str], name: str) -> Vocabulary:
        """Return the vocabulary with another bos or eos (None: as it is), each a token or the text of one.

        Raises:
            ValueError: the model ``name`` has no such token.
        """
        found = {}
        for field, text in (("bos", bos), ("eos", eos)):
            if text is not None:
                rule = f"be a token of {name}, or text of one token"
                ids = self._ids_of(text)
                check(len(ids) == 1, f"{field}_token", rule, text)
                found[f"{field}_id"] = ids[0]
        return replace(self, **found)

    def _ids_of(self, text: str) -> list[int]:
        if self.pieces is not None:
            known = self.pieces.pieces
            return [known.index(text)] if text in known else self.pieces.encode(text)
        if self.tokenizer is None:
            return []
        index = self.tokenizer.get_vocab().get(text)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if index is None else [index]


def _first(token: Any) -> Optional[int]:
    """Return the first id of a list, or the id itself, or None."""
    return token[0] if isinstance(token, (list, tuple)) and token else token or (0 if token == 0 else None)


def _check_against_sentence_piece(folder: Path, tokenizer: Any) -> None:
    """Raise ValueError when the loaded tokenizer gives other ids than the SentencePiece model beside it.

    From a folder with ``tokenizer.model`` alone, transformers 5 builds a tokenizer without the leading space.
    The first word of every text then has ids that the model never saw.
    """
    files = [folder / name for name in SENTENCE_PIECE_FILES]
    files += [Path(getattr(tokenizer, "vocab_file", None) or folder / "none")]  # of a hub name: in its cache
    files = [file for file in files if file.suffix == ".model" and file.is_file()]
    if not files:
        return
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(files[0]))
    except (OSError, RuntimeError):
        return  # not a SentencePiece model: other tokenizers use the same file name
    for text in PROBES:
        expected, ids = processor.EncodeAsIds(text), tokenizer(text, add_special_tokens=False)["input_ids"]
        if expected != ids:
            raise ValueError(
                f"tokenizer of {folder} must agree with its {files[0].name}, but {text!r} is "
                f"{tokenizer.convert_ids_to_tokens(ids)} instead of {processor.EncodeAsPieces(text)}; "
                "put the model's own tokenizer.json beside it"
            )


# --- the self-check -----------------------------------------------------------------------------------


def check_tree(lm: CausalLm) -> None:
    """Raise ValueError unless a random tree scores like plain forwards over each of its paths.

    The tree grows in three events with branches, dead ends and reused slots, in two utterances.
    """
    refusal = f"model {lm.name} cannot be used in a token tree"
    try:
        differences = _differences(lm)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{refusal}: {type(error).__name__}: {error}") from error
    full = {p.dtype for p in lm.model.parameters()} == {torch.float32}
    # The steep logits after some random paths are rounded by up to 1 nat in halves, by 0.001 in float32;
    # a wrong mask is wrong in all.
    allowed = {0.75: TOLERANCE_FLOAT32, 1.0: TOLERANCE_STEEP} if full else {0.5: TOLERANCE_HALF}
    for share, most in allowed.items():
        found = float(np.quantile(differences, share))  # keeps nan
        if not found <= most:
            raise ValueError(
                f"{refusal}: its scores must differ from plain forwards by at most {most:g} a token in "
                f"{100 * share:.0f} % of the paths, but differ by {found:.3g} (it ignores position ids or "
                "masks, as ALiBi models such as BLOOM do)"
            )


def _differences(lm: CausalLm) -> np.ndarray:
    """Return the difference between tree and plain scores of each path, natural log a token."""
    rng = np.random.default_rng(CHECK_SEED)
    prompts = [rng.integers(0, lm.vocab_size, size).tolist() for size in (1, 4)]
    scorer, eos = lm.open_tree(2, prompts), lm.eos_id is not None
    alive: list[list[list[int]]] = [[[]], [[]]]  # of each utterance: paths that may still grow
    differences = []
    for _ in range(CHECK_ROUNDS):
        alive = [_branch(paths, lm.vocab_size, rng) for paths in alive]
        nodes = [[scorer.insert(scorer.root(b), path) for path in paths] for b, paths in enumerate(alive)]
        scores = scorer.score(nodes[0] + nodes[1], eos=eos).tolist()
        for b, paths in enumerate(alive):
            for path, tokens in zip(paths, lm.token_log_probs(paths, prompts[b], eos)):
                differences.append(abs(scores.pop(0) - sum(tokens)) / (len(path) + 1))
        alive = [paths[1::2] for paths in alive]
        scorer.keep([some[1::2] for some in nodes])
    return np.array(differences)  


def _branch(paths: list[list[int]], vocab_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Return each path and two that continue it."""
    return [path + rng.integers(0, vocab_size, more).tolist() for path in paths for more in (0, 1, 3)]

