"""Job ``train-lm``: a new Llama language model, or a LoRA adapter of any causal LM, from streams of tokens.
Knows: the model, the training loop, token streams. Must not know: audio, search, fusion.
"""
from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import field
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from torch import Tensor, nn

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.precision import in_bf16
from icefall_fusion.common.processes import check_compiler, to_device
from icefall_fusion.lm.adapters import save_adapter
from icefall_fusion.lm.starts import BetterStart
from icefall_fusion.train.checkpoints import newest_checkpoint
from icefall_fusion.train.job import report_size, run_training
from icefall_fusion.train.llama import (
    LlamaOptions,
    PackedLoss,
    Vocabulary,
    build_model,
    export,
    load_vocabulary,
    start_from,
)
from icefall_fusion.train.lm_documents import DocumentOptions, prepare_streams
from icefall_fusion.train.loop import Trainer
from icefall_fusion.train.lora import (
    AdapterLoss,
    Base,
    LoraOptions,
    add_adapter,
    check_packing,
    load_pieces,
    probe_start,
)
from icefall_fusion.train.lora_card import card
from icefall_fusion.train.options import TrainingOptions
from icefall_fusion.train.token_stream import TokenBatch, TokenBatches, ValidationPass

SAMPLE = 128  # tokens of dev on which an exported model is compared with the trained one


@dataclasses.dataclass(frozen=True)
class TrainLmOptions(TrainingOptions):
    """Train a new language model, or a LoRA adapter of another one (``base``).

    Args:
        data: folder with ``train.npy`` and ``dev.npy``: ids of documents ``bos t1 .. tn eos`` end to end.
            With ``base`` also one with ``train.jsonl`` and ``dev.jsonl``: a sentence a line, key ``text``.
        tokenizer: folder of a Hugging Face tokenizer, or a folder or file of a SentencePiece ``bpe.model``. A
            ``base`` has its own; with both, the base is given the vocabulary of ``bpe.model``, for
            llm-shallow: its embeddings are new and trained too.
        exp: folder of checkpoints, logs and ``export/``, the newest checkpoint as a Hugging Face folder, or
            as a PEFT folder (for ``--llm.adapter``).
        init: folder of a Llama model of the same size and vocabulary whose weights a new training starts
            from, or of an adapter of ``base``; empty: random weights.
        base: folder, GGUF file or hub name of the causal LM to adapt; empty: train a new model.
        bos_token: what starts a document for a ``base``: a token or the text of one; default: as its
            tokenizer says. Decode with the same (``--llm.bos_token``).
        eos_token: what ends one.
        lora: the adapter.
        documents: how sentences become documents for a ``base``.
        model: size of a new model.
        rows: rows in a batch; a batch of one process has ``rows * length`` tokens.
        length: tokens in a row, filled with whole documents where possible.
        valid_tokens: tokens of ``dev.npy`` to validate on (about), spread over it; 0 = all.
        compile: fuse the model with torch.compile (needs a C++ compiler on a CPU; there 1.5-2 times faster).
    """

    data: str
    tokenizer: str = ""
    base: str = ""
    bos_token: Optional[str] = None
    eos_token: Optional[str] = None
    lora: LoraOptions = field(default_factory=LoraOptions)
    documents: DocumentOptions = field(default_factory=DocumentOptions)
    model: LlamaOptions = field(default_factory=LlamaOptions)
    rows: int = 16
    length: int = 256
    valid_tokens: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "rows")
        check_at_least(0, self, "valid_tokens")
        rule = "be set, or else TrainLmOptions.base (which has its own tokenizer)"
        check(bool(self.tokenizer or self.base), "TrainLmOptions.tokenizer", rule, self.tokenizer)
        longest = max(self.length, 2) if self.base else self.model.max_positions
        check(2 <= self.length <= longest, "TrainLmOptions.length", f"be from 2 to {longest}", self.length)


def compute_loss(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """LossFunction of language models: one item is one predicted token."""
    return model(batch), (batch.targets >= 0).sum(), {}


def words_per_token(batches: TokenBatches, count_words: Any) -> tuple[float, float]:
    """Return words a predicted token and documents a predicted token of a source."""
    words = tokens = 0
    for begin, end in batches.bounds:
        words += count_words(batches.stream[begin + 1 : end - 1].tolist())
        tokens += int(end - begin - 1)
    return words / tokens, len(batches.bounds) / tokens


def load_streams(
    options: TrainLmOptions, vocabulary: Vocabulary, rank: int, world: int, folder: str = ""
) -> tuple[TokenBatches, TokenBatches]:
    """Return the batches of ``train.npy`` and of ``dev.npy`` of ``folder``, by default that of the options.

    Raises:
        FileNotFoundError, ValueError: a stream is missing, or has ids beyond the vocabulary.
    """
    shape = (vocabulary.bos, vocabulary.eos, options.rows, options.length)
    share: dict[str, int] = {"rank": rank, "world": world}
    data = Path(folder or options.data)
    train = TokenBatches(data / "train.npy", *shape, seed=options.trainer.seed, **share)
    dev = TokenBatches(data / "dev.npy", *shape, shuffle=False, max_tokens=options.valid_tokens, **share)
    for source in (train, dev):
        largest = int(source.stream.max())
        check(largest < vocabulary.size, f"ids of {options.data}", f"be below {vocabulary.size}", largest)
    return train, dev


def perplexities(dev: TokenBatches, count_words: Any) -> Callable[[dict[str, float]], dict[str, float]]:
    """Return a function from validation means to perplexities a token and a word.

    Per word as n-gram toolkits count: the end of a document is one more word to predict.
    """
    words, documents = words_per_token(dev, count_words)

    def describe(means: dict[str, float]) -> dict[str, float]:
        nats = {"perplexity": means["loss"], "word_perplexity": means["loss"] / (words + documents)}
        return {name: math.exp(min(value, 50.0)) for name, value in nats.items()}

    return describe


def make_trainer(options: TrainLmOptions, device: torch.device, rank: int = 0, world: int = 1) -> Trainer:
    """Build the loop with its model and batches."""
    if options.base:
        return make_adapter_trainer(options, device, rank, world)
    vocabulary = load_vocabulary(options.tokenizer)
    train, dev = load_streams(options, vocabulary, rank, world)
    torch.manual_seed(options.trainer.seed)
    # Eager attention is what torch.compile fuses best on a CPU; its sdpa backward takes a quarter of a step.
    lm = build_model(options.model, vocabulary, "sdpa" if device.type == "cuda" else "eager").to(device)
    if options.init and newest_checkpoint(options.exp) is None:
        start_from(lm, options.init)
    trained = PackedLoss(lm)
    if options.compile:
        check_compiler(device, "TrainLmOptions.compile")
        trained.compile()
    report_size(lm, f", {len(train.stream)} training tokens, {device}", rank)
    folder, sample = Path(options.exp) / "export", torch.tensor(dev.stream[None, :SAMPLE].astype("int64"))
    return Trainer(
        options.trainer, trained, compute_loss, train, ValidationPass(dev), options.exp, device=device,
        on_save=lambda step: export(lm, vocabulary, folder, options.export_dtype, sample),
        describe=perplexities(dev, vocabulary.count_words),
    )


def make_adapter_trainer(options: TrainLmOptions, device: torch.device, rank: int, world: int) -> Trainer:
    """Build the loop of an adapter with its base and batches."""
    torch.manual_seed(options.trainer.seed)
    dtype = torch.bfloat16 if in_bf16(options.trainer.precision, device) else torch.float32  # frozen weights
    base = Base.load(options.base, dtype, device, options.compile and device.type == "cpu",
                     options.bos_token, options.eos_token)
    base.check_length(options.length)
    new = newest_checkpoint(options.exp) is None
    made_for, begins_at = base.identity(), options.init if new else ""
    pieces = load_pieces(options.tokenizer)
    adapted, base = add_adapter(base, options.lora, begins_at, pieces)
    trained, made_for = AdapterLoss(adapted.to(device)), {**made_for, **base.mark_names()}
    streams = prepare_streams(options.data, Path(options.exp) / "streams", options.documents, base.encode,
                              base.marks, pieces.fingerprint() if pieces else made_for["sha256"] or base.name,
                              base.size, rank)
    vocabulary = Vocabulary(Path(base.source), base.size, *base.marks, base.count_words)
    train, dev = load_streams(options, vocabulary, rank, world, str(streams))
    some = to_device(next(iter(ValidationPass(dev))), device)
    check_packing(trained, some, base.name)
    if rank == 0 and new and not begins_at:
        warn_of_start(probe_start(trained, some, base), base)
    if options.compile:
        check_compiler(device, "TrainLmOptions.compile")
        trained.compile()
    own = sum(value.numel() for value in trained.state_dict().values()) / 1e6
    report_size(trained, f", {own:.2f}M of the adapter, {len(train.stream)} training tokens, {device}", rank)

    def save(step: int) -> None:
        about = {"text": options.documents.text, "tokens seen": trainer.items_seen, "steps": step}
        page = card(made_for, options.lora, about, Path(options.exp) / "log.jsonl")
        save_adapter(trained.adapted, Path(options.exp) / "export", made_for,
                     getattr(torch, options.export_dtype), page, pieces)

    trainer = Trainer(options.trainer, trained, compute_loss, train, ValidationPass(dev), options.exp,
                      device=device, on_save=save, describe=perplexities(dev, base.count_words))
    return trainer


def warn_of_start(better: Optional[BetterStart], base: Base) -> None:
    """Warn when another token than the base's bos starts the dev text clearly better."""
    if better is not None:
        logging.warning("texts for %s start with token %d (%.2f nats a token on dev), but with "
                        "--bos_token %r they would have %.2f", base.name, base.marks[0], better.own,
                        better.token, better.better)


def run(options: TrainLmOptions) -> int:
    """Train (or go on training) and export; return 0, or 4 when it was stopped before its last step.

    Raises:
        FileNotFoundError, ValueError: data or tokenizer are missing or do not fit each other.
        RuntimeError: the loss was not finite too often.
    """
    return run_training(options, make_trainer)
