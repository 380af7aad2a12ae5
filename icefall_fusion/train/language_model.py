"""Job ``train-lm``: a Llama language model from a stream of token ids, exported as a Hugging Face folder.
Knows: transformers, the training loop, packed batches. Must not know: audio, search, fusion.
"""
from __future__ import annotations

import copy
import dataclasses
import math
import os
import shutil
import sys
import tempfile
from dataclasses import field
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import atomic_path
from icefall_fusion.common.memory import keep_freed_memory
from icefall_fusion.common.processes import check_compiler
from icefall_fusion.train.checkpoints import newest_checkpoint
from icefall_fusion.train.loop import STOPPED, Trainer, TrainerOptions, init_distributed
from icefall_fusion.train.packed import (
    PackedBatch,
    PackedBatches,
    WholePass,
    attention_mask,
)

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
        kv_heads: heads of keys and values; ``heads`` must be a multiple of it; 0 = as many as ``heads``.
        intermediate: width inside the feed-forward part.
        tied: use the input embeddings as output layer too.
        max_positions: longest context in tokens that the model promises to take.
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
        for name in ("hidden", "layers", "heads", "intermediate", "max_positions"):
            check(getattr(self, name) >= 1, f"LlamaOptions.{name}", "be at least 1", getattr(self, name))
        check(self.hidden % self.heads == 0, "LlamaOptions.hidden", f"be a multiple of heads={self.heads}",
              self.hidden)
        kv_heads = self.kv_heads or self.heads
        check(self.heads % kv_heads == 0, "LlamaOptions.kv_heads", f"divide heads={self.heads}", kv_heads)
        check(0 <= self.dropout < 1, "LlamaOptions.dropout", "be in [0, 1)", self.dropout)


@dataclasses.dataclass(frozen=True)
class TrainLmOptions:
    """Train a language model on a folder of token streams.

    Args:
        data: folder with ``train.npy`` and ``dev.npy``: ids of documents ``bos t1 .. tn eos`` end to end.
        tokenizer: folder of a Hugging Face tokenizer, or a folder or file of a SentencePiece ``bpe.model``.
        exp: folder for checkpoints, logs and ``export/``, the Hugging Face folder of the newest checkpoint.
        init: folder of a Llama model of the same size and vocabulary whose weights a new training begins
            with; empty: random weights.
        model: size of the model.
        trainer: optimization, limits and checkpoints.
        rows: rows in a batch; ``rows * length`` tokens go into one batch of one process.
        length: places in a row, filled with whole documents where possible.
        valid_tokens: validate on about so many tokens of ``dev.npy``, spread over it; 0 = all.
        device: "auto", "cpu" or "cuda".
        compile: fuse the model with torch.compile (needs a C++ compiler; 1.5-2 times faster on a CPU).
        threads: CPU threads; 0 = leave torch's choice.
        export_dtype: "bfloat16", "float16" or "float32" of the exported weights.
    """

    data: str
    tokenizer: str
    exp: str
    init: str = ""
    model: LlamaOptions = field(default_factory=LlamaOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    rows: int = 16
    length: int = 256
    valid_tokens: int = 100_000
    device: str = "auto"
    compile: bool = False
    threads: int = 0
    export_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check(self.rows >= 1, "TrainLmOptions.rows", "be at least 1", self.rows)
        longest = self.model.max_positions
        check(2 <= self.length <= longest, "TrainLmOptions.length", f"be from 2 to {longest}", self.length)
        check(self.valid_tokens >= 0, "TrainLmOptions.valid_tokens", "be at least 0", self.valid_tokens)
        check(self.threads >= 0, "TrainLmOptions.threads", "be at least 0", self.threads)
        check_choice(self.export_dtype, ("bfloat16", "float16", "float32"), "TrainLmOptions.export_dtype")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What training must know of a tokenizer.

    Args:
        folder: where its files are.
        size: ids are below it.
        bos: id that begins a document.
        eos: id that ends one; may equal ``bos``.
        count_words: token ids of a document -> number of words.
    """

    folder: Path
    size: int
    bos: int
    eos: int
    count_words: Any


def load_vocabulary(path: Union[str, Path]) -> Vocabulary:
    """Load a Hugging Face tokenizer folder, or the SentencePiece model of the acoustic model.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the tokenizer has no bos or no eos.
    """
    path = Path(path)
    folder = path.parent if path.name == "bpe.model" else path
    if (folder / "bpe.model").is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(folder / "bpe.model"))
        mark, size, decode = pieces.piece_to_id("<sos/eos>"), pieces.get_piece_size(), pieces.decode
        check(mark != pieces.unk_id(), f"{folder / 'bpe.model'}", "have the piece <sos/eos>", "one without")
        return Vocabulary(folder, size, mark, mark, lambda ids: len(decode(ids).split()))
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{path} must hold tokenizer_config.json or bpe.model, but does not")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    check(bos is not None and eos is not None, f"tokenizer {path}", "have bos and eos", (bos, eos))
    return Vocabulary(folder, len(tokenizer), bos, eos, lambda ids: len(tokenizer.decode(ids).split()))


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

    def forward(self, batch: PackedBatch) -> Tensor:
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


def begin_from(lm: nn.Module, folder: str) -> None:
    """Take over the weights of a Hugging Face model folder.

    Raises:
        FileNotFoundError: it is no model folder.
        ValueError: its model has another shape, or computes something else from the same weights.
    """
    from transformers import AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"TrainLmOptions.init: {folder} must be a model folder with config.json")
    given = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    configs = [model.config.to_dict() for model in (lm, given)]
    for name in _COMPUTES:
        wanted, found = (config.get(name) for config in configs)
        check(found == wanted, f"TrainLmOptions.init {folder}: {name}", f"be {wanted}", found)
    shapes = [{name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (lm, given)]
    odd = sorted(name for name in shapes[0].keys() | shapes[1].keys()
                 if shapes[0].get(name) != shapes[1].get(name))
    check(not odd, f"TrainLmOptions.init {folder}", "have the shape of TrainLmOptions.model", odd[:3])
    lm.load_state_dict(given.state_dict())


def compute_loss(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """LossFunction of language models: one item is one predicted token."""
    return model(batch), (batch.targets >= 0).sum(), {}


def words_per_token(batches: PackedBatches, count_words: Any) -> tuple[float, float]:
    """Return words and documents per predicted token of the documents of a source."""
    words = tokens = 0
    for begin, end in batches.bounds:
        words += count_words(batches.stream[begin + 1 : end - 1].tolist())
        tokens += int(end - begin - 1)
    return words / tokens, len(batches.bounds) / tokens


def export(lm: nn.Module, vocabulary: Vocabulary, folder: Union[str, Path], dtype: str = "bfloat16") -> None:
    """Write config, weights and tokenizer as a Hugging Face folder; each file is whole or absent.

    Args:
        lm: the trained model.
        vocabulary: its tokenizer files are copied.
        folder: made if missing; files there are replaced.
        dtype: of the weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        copy.deepcopy(lm).to("cpu", getattr(torch, dtype)).save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            path.chmod(0o644)  # safetensors makes 0600; others must be able to read the model
            os.replace(path, folder / path.name)
    for name in TOKENIZER_FILES:
        if (vocabulary.folder / name).is_file():
            with atomic_path(folder / name) as copied:
                shutil.copyfile(vocabulary.folder / name, copied)


def run(options: TrainLmOptions) -> int:
    """Train (or go on training) and export; return 0, or 4 when it was stopped before its last step.

    Raises:
        FileNotFoundError, ValueError: data or tokenizer are missing or do not fit each other.
        RuntimeError: the loss was not finite too often.
    """
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    rank, world, device = init_distributed(options.device)
    vocabulary = load_vocabulary(options.tokenizer)
    marks = (vocabulary.bos, vocabulary.eos, options.rows, options.length)
    share: dict[str, int] = {"rank": rank, "world": world}
    data, seed = Path(options.data), options.trainer.seed
    train = PackedBatches(data / "train.npy", *marks, seed=seed, **share)
    dev = PackedBatches(data / "dev.npy", *marks, shuffle=False, max_tokens=options.valid_tokens, **share)
    for source in (train, dev):
        largest = int(source.stream.max())
        check(largest < vocabulary.size, f"ids of {options.data}", f"be below {vocabulary.size}", largest)
    torch.manual_seed(options.trainer.seed)
    # Eager attention is what torch.compile fuses best on a CPU; its sdpa backward takes a quarter of a step.
    lm = build_model(options.model, vocabulary, "sdpa" if device.type == "cuda" else "eager").to(device)
    if options.init and newest_checkpoint(options.exp) is None:
        begin_from(lm, options.init)
    words, documents = words_per_token(dev, vocabulary.count_words)

    def describe(means: dict[str, float]) -> dict[str, float]:
        # Per word as n-gram toolkits count: the end of a document is one more word to predict.
        nats = {"perplexity": means["loss"], "word_perplexity": means["loss"] / (words + documents)}
        return {name: math.exp(min(value, 50.0)) for name, value in nats.items()}

    trained = PackedLoss(lm)
    if options.compile:
        check_compiler(device, "TrainLmOptions.compile")
        trained.compile()
    if rank == 0:
        size = sum(p.numel() for p in lm.parameters())
        print(f"{size / 1e6:.2f}M parameters, {len(train.stream)} training tokens, device {device}",
              file=sys.stderr, flush=True)
    trainer = Trainer(
        options.trainer, trained, compute_loss, train, WholePass(dev), options.exp, device=device,
        on_save=lambda step: export(lm, vocabulary, Path(options.exp) / "export", options.export_dtype),
        describe=describe,
    )
    result = trainer.run()
    if rank == 0:
        print(result, file=sys.stderr)
    return 0 if result["reason"] == "max_steps" else STOPPED
