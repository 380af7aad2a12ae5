"""LLMs of the sizes that people use, with random weights: time and memory do not depend on the values.
Knows: configurations of published models. Must not know: what is measured.
"""
from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Iterator, Union

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from icefall_fusion.decode.method_names import parse_method
from icefall_fusion.decode.pretrained import FOLDER
from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.adapters import base_of, has_pieces
from icefall_fusion.lm.loading import Vocabulary, model_source

_FAINT = 1e-3  # weight of an LLM that knows nothing
_LLAMA = {"kind": "Llama", "vocab_size": 32000, "max_position_embeddings": 2048}
#: Configurations by name.
SHAPES: dict[str, dict[str, Any]] = {
    # to count on a CPU: calls and tokens of a method do not depend on the model where its weight is faint
    "tiny": {**_LLAMA, "vocab_size": 9000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2},
    "llama-160m": {**_LLAMA, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                   "num_attention_heads": 12},
    "tinyllama-1.1b": {**_LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                       "num_attention_heads": 32, "num_key_value_heads": 4},
    "open-llama-3b": {**_LLAMA, "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26,
                      "num_attention_heads": 32},
    "open-llama-7b": {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                      "num_attention_heads": 32},
    "mistral-7b": {"kind": "Mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
                   "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "sliding_window": 4096, "max_position_embeddings": 32768},
}


def make_model(name: str, device: str, dtype: str, tokens: int = 0) -> CausalLm:
    """Return the shipped LLM ("minibooks"), or random weights of a configuration, without a tokenizer.

    Args:
        name: of the configuration.
        device, dtype: of the model.
        tokens: entries that the vocabulary of random weights has at least.
    """
    if name == "minibooks":
        return CausalLm.from_pretrained(FOLDER / "llm", dtype=dtype, device=device)
    model = _random(name, device, getattr(torch, dtype), tokens)
    return CausalLm(model, Vocabulary(None, None, 1, 2), name, False)


def save_stand_in(folder: Path) -> None:
    """Save a model with the shipped LLM's tokens and few random weights, for machines that get no more."""
    vocabulary = _vocabulary(FOLDER / "llm")
    torch.manual_seed(1)
    model = _random("tiny", "cpu", torch.float16, len(vocabulary.tokenizer))
    model.config.bos_token_id, model.config.eos_token_id = vocabulary.bos_id, vocabulary.eos_id
    model.save_pretrained(folder)
    vocabulary.tokenizer.save_pretrained(folder)


def _vocabulary(path: Any) -> Vocabulary:
    """Return the tokens of a model or of an adapter, whose base need not be there if it brings its own."""
    folder = Path(path)
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and has_pieces(folder):
        return Vocabulary.load(folder, transformers.LlamaConfig())
    source = model_source(base_of(folder)) if adapter else str(path)
    return Vocabulary.load(source, transformers.AutoConfig.from_pretrained(source))


def _random(name: str, device: str, dtype: torch.dtype, tokens: int) -> Any:
    options = dict(SHAPES[name])
    options["vocab_size"] = max(options["vocab_size"], tokens)
    config = getattr(transformers, f"{options.pop('kind')}Config")(**options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def of_shape(name: str) -> Iterator[None]:
    """Within it, `CausalLm.from_pretrained` reads a folder's tokenizer alone: the weights are random ones.

    Args:
        name: of the configuration; "" changes nothing.
    """
    if not name:
        yield
        return

    def from_shape(
        path: Any, dtype: Union[torch.dtype, str] = torch.float32, device: Any = "cpu", **unused: Any
    ) -> CausalLm:
        vocabulary = _vocabulary(path)
        tokens = vocabulary.pieces.size if vocabulary.tokenizer is None else len(vocabulary.tokenizer)
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return CausalLm(_random(name, str(device), kind, tokens), vocabulary, name, False)

    before = CausalLm.__dict__["from_pretrained"]
    CausalLm.from_pretrained = staticmethod(from_shape)
    try:
        yield
    finally:
        CausalLm.from_pretrained = before


def faint(method: str) -> dict[str, float]:
    """Return weights with which a method does all its work and finds what the acoustic model finds."""
    return {"words": 0.0, **dict.fromkeys(parse_method(method).sources, _FAINT)}
