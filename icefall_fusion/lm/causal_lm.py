"""Any Hugging Face causal LM as a scorer of token trees; the sole importer of transformers' models.
Knows: transformers, tokens, devices. Must not know: acoustic models, search, fusion.
"""
from __future__ import annotations

from typing import Any, Optional, Sequence, Union

import torch

from icefall_fusion.lm.tree_scorer import TreeScorer


class CausalLm:
    """A causal LM that scores texts (natural log) through a token tree.

    Attributes:
        tokenizer: Hugging Face tokenizer, or None when the folder holds ``bpe.model``.
        pieces: `AcousticTokens` when the folder holds ``bpe.model`` (ids equal the acoustic ids), else None.
        vocab_size, bos_id (None allowed), eos_id (None allowed), device, name.
    """

    tokenizer: Any
    pieces: Any
    vocab_size: int
    bos_id: Optional[int]
    eos_id: Optional[int]
    device: torch.device
    name: str

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str,
        dtype: Union[torch.dtype, str] = torch.float32,
        device: str = "cpu",
        device_map: Any = None,
        quantization: Optional[str] = None,
        self_check: bool = True,
    ) -> CausalLm:
        """Load a model folder or a hub name."""

    def encode(self, text: str) -> list[int]:
        """Return token ids of ``text`` without bos or eos."""

    def open_tree(self, batch: int, prompts: Optional[Sequence[Sequence[int]]] = None) -> TreeScorer:
        """Return a tree for ``batch`` utterances; ``prompts`` are token ids put after bos."""

    def log_prob(self, text: str, prompt: Optional[str] = None, eos: bool = False) -> float:
        """Return log P(text | prompt), natural log, plus log P(eos) when ``eos``."""

    def log_probs(self, texts: Sequence[str], prompt: Optional[str] = None, eos: bool = False) -> list[float]:
        """Return `log_prob` of each text, all in one tree."""

    def token_log_probs(self, paths: Sequence[Sequence[int]], eos: bool = False) -> list[list[float]]:
        """Return log P of each token of each path after bos, by plain forwards: the slow twin of the tree."""
