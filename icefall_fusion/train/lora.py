"""LoRA adaptation of any Hugging Face causal LM: its base, its packed loss, the exported PEFT folder.
Knows: language models, adapters, batches of token streams. Must not know: the training loop, audio, search.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.common.files import PathLike
from icefall_fusion.lm import adapters, loading
from icefall_fusion.train.token_stream import TokenBatch, attention_mask

STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "</s>", "<bos>")  # of families of models
CLEARLY = 0.1  # nats a token
#: Largest difference between packed and single documents, natural log a token.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """A low-rank adapter (Hu et al. 2022); with it the base's weights stay as they are.

    Args:
        rank: r of the two factors of each adapted layer.
        alpha: their product counts ``alpha / rank``.
        dropout: of the adapter's input, in training.
        targets: names of the adapted linear layers, e.g. q_proj; ``all-linear``: all but the output layer.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self) -> None:
        check_at_least(1, self, "rank")
        check(self.alpha > 0, "LoraOptions.alpha", "be above 0", self.alpha)
        check(0 <= self.dropout < 1, "LoraOptions.dropout", "be in [0, 1)", self.dropout)
        check(len(self.targets) > 0, "LoraOptions.targets", "name a layer at least", self.targets)


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that is adapted.

    Args:
        name: as given.
        source: folder or hub name that it was loaded from.
        model: its transformers model.
        vocabulary: its tokens.
    """

    name: str
    source: str
    model: Any
    vocabulary: loading.Vocabulary

    @classmethod
    def load(
        cls, name: str, dtype: torch.dtype, device: torch.device, eager: bool = False,
        bos: Optional[str] = None, eos: Optional[str] = None,
    ) -> Base:
        """Load a folder, GGUF file or hub name, as `CausalLm.from_pretrained` does.

        Raises:
            FileNotFoundError, ValueError: it is no causal LM with a tokenizer, a bos and an eos.
        """
        source = loading.model_source(name)
        model = loading.load_model(source, dtype, device, None, None)
        vocabulary = loading.Vocabulary.load(source, model.config).with_marks(bos, eos, name)
        has = vocabulary.tokenizer is not None or vocabulary.pieces is not None
        check(has, f"TrainLmOptions.base {name}", "have a tokenizer", None)
        marks = (vocabulary.bos_id, vocabulary.eos_id)
        check(None not in marks, f"TrainLmOptions.base {name}", "have bos and eos", marks)
        loading.attention_window(model.config.get_text_config(decoder=True), name)  # refuses ALiBi
        if eager:
            model.set_attn_implementation("eager")
        return cls(name, source, model, vocabulary)

    @property
    def marks(self) -> tuple[int, int]:
        """Ids of bos and eos."""
        return self.vocabulary.bos_id, self.vocabulary.eos_id  # type: ignore[return-value]

    @property
    def size(self) -> int:
        """Entries of the output layer."""
        return int(self.model.config.get_text_config(decoder=True).vocab_size)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return token ids of each text, without bos and eos."""
        if self.vocabulary.pieces is not None:
            return [self.vocabulary.pieces.encode(text) for text in texts]
        return self.vocabulary.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def count_words(self, ids: list[int]) -> int:
        """Return the number of words of a document."""
        decoder = self.vocabulary.pieces or self.vocabulary.tokenizer
        return len(decoder.decode(ids).split())

    def check_length(self, length: int) -> None:
        """Raise ValueError when rows are longer than the model's positions or its attention window."""
        config = self.model.config.get_text_config(decoder=True)
        window, _ = loading.attention_window(config, self.name)
        limits = [limit for limit in (window, getattr(config, "max_position_embeddings", None)) if limit]
        longest = min(limits, default=length)
        check(length <= longest, "TrainLmOptions.length", f"be at most {longest} for {self.name}", length)

    def _name_of(self, token: int) -> str:
        if self.vocabulary.pieces is not None:
            return self.vocabulary.pieces.pieces[token]
        return str(self.vocabulary.tokenizer.convert_ids_to_tokens(token))

    def identity(self) -> dict[str, Any]:
        """Return {"name", "bos", "eos", "sha256", "sample"}: what an adapter says of its base."""
        names = [self._name_of(token) for token in self.marks]
        digest = adapters.weights_sha256(self.source)
        return {"name": self.name, "bos": names[0], "eos": names[1], "sha256": digest,
                "sample": adapters.sample_of(self.model)}


def add_adapter(base: Base, lora: LoraOptions, init: str) -> Any:
    """Return the PEFT model of a new adapter; ``init``: empty, or a PEFT folder whose weights it begins with.

    Raises:
        FileNotFoundError, ValueError: the base has no such layers, or ``init`` is for another base or rank.
    """
    targets = lora.targets[0] if lora.targets == ("all-linear",) else lora.targets
    if init:
        if not (Path(init) / adapters.WEIGHTS_FILE).is_file():
            raise FileNotFoundError(f"TrainLmOptions.init: {init} must be a PEFT folder")
        adapters.check_base(init, base.model, base.name)
    adapted = adapters.add_adapter(base.model, lora.rank, lora.alpha, lora.dropout, targets, base.name)
    if init:
        adapters.start_from(adapted, init)
    return adapted


class AdapterLoss(nn.Module):
    """Summed cross-entropy of an adapted LM over packed documents; its state is the adapter's alone.

    Args:
        adapted: PEFT model of `adapters.add_adapter`.
    """

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the sum of -log P over all targets (natural log)."""
        mask = attention_mask(batch.documents)
        if self.adapted.config._attn_implementation == "eager":  # adds its mask to the scores
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e9)
            mask = mask.to(self.adapted.dtype)
        logits = self.adapted(
            input_ids=batch.tokens, attention_mask=mask, position_ids=batch.positions, use_cache=False
        ).logits
        targets = batch.targets.flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the weights that are trained: the base is not part of a checkpoint."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: it is of an adapter with other layers or another rank.
        """
        own = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        other = {name: tuple(value.shape) for name, value in state.items()}
        odd = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
        rule = "have the layers and the rank of TrainLmOptions.lora"
        check(not odd, "the checkpoint's adapter", rule, odd[:3])
        return super().load_state_dict(state, strict=False)


@torch.no_grad()
def check_packing(loss: AdapterLoss, batch: TokenBatch, name: str) -> None:
    """Raise ValueError unless the documents of a row score as if they were alone.

    Args:
        loss: of the model.
        batch: some packed documents.
        name: of the model.
    """
    loss.eval()
    row = TokenBatch(*(part[:1] for part in batch))
    singles = [(row.documents[0] == number).nonzero()[:, 0] for number in range(int(row.documents.max()) + 1)]
    try:
        together = float(loss(row))
        alone = sum(_alone(loss, row.tokens[:, own], row.targets[:, own]) for own in singles)
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = f"cannot be trained on packed documents: {type(error).__name__}: {error}"
        raise ValueError(f"TrainLmOptions.base {name} {reason}") from error
    difference = abs(together - alone) / max(int((row.targets >= 0).sum()), 1)
    allowed = TOLERANCE.get(loss.adapted.dtype, 0.05)
    rule = f"score packed documents like single ones, within {allowed:g} a token"
    check(difference <= allowed, f"TrainLmOptions.base {name}", rule, difference)


@torch.no_grad()
def better_start(loss: AdapterLoss, batch: TokenBatch, base: Base) -> Optional[tuple[str, float, float]]:
    """Return a token that starts texts clearly better than the base's bos, or None.

    Args:
        loss: of the base with a new adapter, which changes nothing yet.
        batch: some packed documents.
        base: its vocabulary names the candidates: eos, and what other models start with.

    Returns:
        the token, and nats a token with bos and with it.
    """
    if base.vocabulary.tokenizer is None:
        return None
    loss.eval()
    known = base.vocabulary.tokenizer.get_vocab()
    names = {index: name for name in STARTS if (index := known.get(name)) is not None}
    for index in base.marks:
        names[index] = base._name_of(index)
    first, items = (batch.positions == 0) & (batch.documents >= 0), max(int((batch.targets >= 0).sum()), 1)
    nats = {index: float(loss(batch._replace(tokens=batch.tokens.masked_fill(first, index)))) / items
            for index in names}
    best = min(nats, key=nats.__getitem__)
    own = nats[base.marks[0]]
    return (names[best], own, nats[best]) if own - nats[best] > CLEARLY else None


def _alone(loss: AdapterLoss, tokens: Tensor, targets: Tensor) -> float:
    """Return the loss of one document by a plain forward."""
    logits = loss.adapted(input_ids=tokens, use_cache=False).logits
    return float(nn.functional.cross_entropy(logits[0].float(), targets[0], reduction="sum"))


def card(base: Mapping[str, Any], lora: LoraOptions, more: Mapping[str, Any], log: PathLike) -> str:
    """Return the page of an adapter: base, hash, options, tokens seen, learning curve.

    Args:
        base: of `Base.identity`.
        lora: of the adapter.
        more: further facts, by name.
        log: ``log.jsonl`` of the training.
    """
    text = Path(log).read_text(encoding="utf-8") if Path(log).is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    curve = "\n".join(
        f"| {line['step']} | {line['items']} | {line['valid_word_perplexity']:.1f} |"
        for line in lines if "valid_word_perplexity" in line
    )
    facts = {"base": base["name"], "SHA-256 of the base": base["sha256"] or "not known",
             "starts with": f"`{base['bos']}`", "ends with": f"`{base['eos']}`",
             "rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout,
             "layers": ", ".join(lora.targets), **more}
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        "---\nlibrary_name: peft\n"
        f"base_model: {base['name']}\n---\n"
        "# A LoRA adapter, trained by icefall_fusion's job train-lm\n\n"
        f"| what | value |\n|---|---|\n{table}\n\n"
        "Perplexity a word on dev, the end of each sentence counted as one more word:\n\n"
        f"| step | tokens seen | perplexity a word |\n|---|---|---|\n{curve}\n"
    )
