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

from icefall_fusion.decode.pretrained import FOLDER
from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.loading import Vocabulary

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


def make_model(name: str, device: str, dtype: str) -> CausalLm:
    """Return the shipped LLM ("minibooks"), or random weights of a configuration, without a tokenizer."""
    if name == "minibooks":
        return CausalLm.from_pretrained(FOLDER / "llm", dtype=dtype, device=device)
    return CausalLm(_random(name, device, getattr(torch, dtype)), Vocabulary(None, None, 1, 2), name, False)


def _random(name: str, device: str, dtype: torch.dtype) -> Any:
    options = dict(SHAPES[name])
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
        vocabulary = Vocabulary.load(path, transformers.AutoConfig.from_pretrained(str(path)))
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return CausalLm(_random(name, str(device), kind), vocabulary, name, False)

    before = CausalLm.__dict__["from_pretrained"]
    CausalLm.from_pretrained = staticmethod(from_shape)
    try:
        yield
    finally:
        CausalLm.from_pretrained = before
