"""Llama language models that are trained from scratch: shape, start weights, packed loss, exported folder.
Knows: transformers, batches of token streams. Must not know: the training loop, audio, search, fusion.
"""
from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.files import PathLike, atomic_path
from icefall_fusion.text.scripts import split_units
from icefall_fusion.text.tokens import AcousticTokens
from icefall_fusion.train.job import check_export
from icefall_fusion.train.token_stream import TokenBatch, attention_mask

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "bpe.model", "tokens.txt",
)


@dataclasses.dataclass(frozen=True)
class LlamaOptions:
    """Size of the model; its vocabulary comes from the tokenizer.

    Args:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: attention heads; ``hidden`` must be a multiple of it.
        kv_heads: heads of keys and values; ``heads`` must be a multiple of it; 0 = ``heads``.
        intermediate: width inside the feed-forward layers.
        tied: use the input embeddings as output layer too.
        max_positions: longest context, in tokens, that the model's config allows.
        rope_theta: base of the rotary position embedding.
        dropout: in training, of token embeddings, attention weights and the output layer's input.
    """

    hidden: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 0
    intermediate: int = 1280
    tied: bool = True
    max_positions: int = 2048
    rope_theta: float = 10000.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(1, self, "hidden", "layers", "heads", "intermediate", "max_positions")
        rule = f"be a multiple of heads={self.heads}"
        check(self.hidden % self.heads == 0, "LlamaOptions.hidden", rule, self.hidden)
        kv_heads = self.kv_heads or self.heads
        check(self.heads % kv_heads == 0, "LlamaOptions.kv_heads", f"divide heads={self.heads}", kv_heads)
        check(0 <= self.dropout < 1, "LlamaOptions.dropout", "be in [0, 1)", self.dropout)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The facts of a tokenizer that training needs.

    Args:
        folder: of its files.
        size: ids are below it.
        bos: id that begins a document.
        eos: id that ends one; may equal ``bos``.
        count_words: token ids of a document -> number of words.
    """

    folder: Path
    size: int
    bos: int
    eos: int
    count_words: Callable[[Sequence[int]], int]


def load_vocabulary(path: PathLike) -> Vocabulary:
    """Load a Hugging Face tokenizer folder, or the SentencePiece model of the acoustic model.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the tokenizer has no bos or no eos.
    """
    path = Path(path)
    folder = path.parent if path.name == "bpe.model" else path
    if (folder / "bpe.model").is_file():
        tokens = AcousticTokens.load(folder)
        mark = tokens.sos_eos_id
        check(mark is not None, f"{folder / 'bpe.model'}", "have the piece <sos/eos>", "one without")
        return Vocabulary(folder, tokens.size, mark, mark, lambda ids: len(split_units(tokens.decode(ids))))
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{path} must hold tokenizer_config.json or bpe.model, but does not")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    check(bos is not None and eos is not None, f"tokenizer {path}", "have bos and eos", (bos, eos))
    return Vocabulary(folder, len(tokenizer), bos, eos, lambda ids: len(split_units(tokenizer.decode(ids))))


def build_model(options: LlamaOptions, vocabulary: Vocabulary, attention: str) -> nn.Module:
    """Return a randomly initialized ``LlamaForCausalLM``.

    Args:
        options: its size.
        vocabulary: its ids.
        attention: "sdpa" or "eager".
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads or options.heads,
        intermediate_size=options.intermediate,
        tie_word_embeddings=options.tied,
        max_position_embeddings=options.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
        attention_dropout=options.dropout,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        pad_token_id=None,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


class PackedLoss(nn.Module):
    """Summed cross-entropy of a causal LM over packed documents; its ``forward`` is what is trained.

    Args:
        lm: a Hugging Face causal LM with ``sdpa`` or ``eager`` attention.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        self.drop = nn.Dropout(lm.config.attention_dropout)
        self.additive = lm.config._attn_implementation == "eager"

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the sum of -log P over all targets (natural log)."""
        mask = attention_mask(batch.documents)
        if self.additive:  # eager attention adds its mask to the scores
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e9)
        embedded = self.drop(self.lm.model.embed_tokens(batch.tokens))
        hidden = self.lm.model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        hidden = self.drop(hidden)
        logits = nn.functional.linear(hidden.flatten(0, 1), self.lm.lm_head.weight)
        return nn.functional.cross_entropy(logits.float(), batch.targets.flatten(), reduction="sum")


#: Settings of a model that change what the same weights compute.
_COMPUTES = (
    "model_type", "num_attention_heads", "num_key_value_heads", "rope_parameters", "rms_norm_eps",
    "hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id",
)


def start_from(lm: nn.Module, folder: str) -> None:
    """Load the weights of a Hugging Face model folder into a new model.

    Raises:
        FileNotFoundError: the folder has no model.
        ValueError: its model has another shape, or computes something else from the same weights.
    """
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"TrainLmOptions.init: {folder} must be a model folder with config.json")
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    configs = [model.config.to_dict() for model in (lm, source)]
    for name in _COMPUTES:
        wanted, actual = (config.get(name) for config in configs)
        check(actual == wanted, f"TrainLmOptions.init {folder}: {name}", f"be {wanted}", actual)
    shapes = [{name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (lm, source)]
    odd = sorted(name for name in shapes[0].keys() | shapes[1].keys()
                 if shapes[0].get(name) != shapes[1].get(name))
    check(not odd, f"TrainLmOptions.init {folder}", "have the shape of TrainLmOptions.model", odd[:3])
    lm.load_state_dict(source.state_dict())


def export(lm: nn.Module, vocabulary: Vocabulary, folder: PathLike, dtype: str, sample: Tensor) -> None:
    """Write config, weights and tokenizer as a Hugging Face folder; no file is ever half written.

    Args:
        lm: the trained model.
        vocabulary: its tokenizer files are copied.
        folder: made if missing; files there are replaced.
        dtype: "float16" or "float32" of the weights.
        sample: [1, T] token ids on which the rounded weights are compared with the trained ones.

    Raises:
        DoesNotFit: the weights do not fit ``dtype``; nothing is written.
    """
    folder = Path(folder)
    copied = copy.deepcopy(lm).to("cpu", torch.float32).eval()
    check_export(copied, dtype, lambda model: [model(sample, use_cache=False).logits.log_softmax(-1)])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        copied.to(getattr(torch, dtype)).save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            path.chmod(0o644)  # safetensors makes 0600; others must be able to read the model
            os.replace(path, folder / path.name)
    for name in TOKENIZER_FILES:
        if (vocabulary.folder / name).is_file():
            with atomic_path(folder / name) as temporary_file:
                shutil.copyfile(vocabulary.folder / name, temporary_file)
