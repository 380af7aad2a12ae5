"""LoRA adaptation of any Hugging Face causal LM: its base, its packed loss.
Knows: language models, adapters, batches of token streams. Must not know: the training loop, audio, search.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from icefall_fusion.common.checks import check, check_at_least
from icefall_fusion.lm import adapters, loading, transplant
from icefall_fusion.lm.starts import BetterStart, better_start
from icefall_fusion.text.scripts import split_units
from icefall_fusion.text.tokens import AcousticTokens
from icefall_fusion.train.token_stream import TokenBatch, attention_mask

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
        """Return the number of words of a document; of scripts without spaces that of characters."""
        decoder = self.vocabulary.pieces or self.vocabulary.tokenizer
        return len(split_units(decoder.decode(ids)))

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
        digest = adapters.weights_sha256(self.source)
        return {"name": self.name, **self.mark_names(), "sha256": digest,
                "sample": adapters.sample_of(self.model)}

    def mark_names(self) -> dict[str, str]:
        """Return {"bos", "eos"}: the tokens that start and end a text."""
        return dict(zip(("bos", "eos"), map(self._name_of, self.marks)))


def load_pieces(path: str) -> Optional[AcousticTokens]:
    """Return the acoustic pieces that ``TrainLmOptions.tokenizer`` names; None where it is empty.

    Raises:
        FileNotFoundError, ValueError: there is no SentencePiece model, or it has no sentence mark.
    """
    if not path:
        return None
    pieces = AcousticTokens.load(path)
    check(pieces.sos_eos_id is not None, f"TrainLmOptions.tokenizer {path}", "have the piece <sos/eos>", None)
    return pieces


def add_adapter(
    base: Base, lora: LoraOptions, init: str, pieces: Optional[AcousticTokens] = None
) -> tuple[Any, Base]:
    """Return the PEFT model of a new adapter, and the base that it adapts.

    Args:
        base: changed in place.
        lora: shape of the adapter.
        init: empty, or a PEFT folder whose weights it begins with.
        pieces: None, or the vocabulary that the base is given; its embeddings are trained too.

    Raises:
        FileNotFoundError, ValueError: the base has no such layers, or ``init`` is for another base, rank or
            vocabulary.
    """
    targets = lora.targets[0] if lora.targets == ("all-linear",) else lora.targets
    if init:
        if not (Path(init) / adapters.WEIGHTS_FILE).is_file():
            raise FileNotFoundError(f"TrainLmOptions.init: {init} must be a PEFT folder")
        adapters.check_base(init, base.model, base.name)
        same = adapters.has_pieces(init) == (pieces is not None)
        rule = f"have{'' if pieces else ' no'} acoustic pieces of its own, as TrainLmOptions.tokenizer says"
        check(same, f"TrainLmOptions.init {init}", rule, adapters.has_pieces(init))
    if pieces is not None:
        transplant.transplant(base.model, pieces, base.encode, base.marks)
        mark = pieces.sos_eos_id
        base = dataclasses.replace(base, vocabulary=loading.Vocabulary(None, pieces, mark, mark))
        if init:
            theirs = AcousticTokens.load(init).fingerprint()
            rule = "have the pieces of TrainLmOptions.tokenizer"
            check(theirs == pieces.fingerprint(), f"TrainLmOptions.init {init}", rule, theirs)
            transplant.load_embeddings(base.model, init)
    adapted = adapters.add_adapter(base.model, lora.rank, lora.alpha, lora.dropout, targets, base.name)
    if pieces is not None:
        transplant.train_embeddings(base.model)
    if init:
        adapters.start_from(adapted, init)
    return adapted, base


class AdapterLoss(nn.Module):
    """Summed cross-entropy of an adapted LM over packed documents; its state is the adapter's alone.

    Args:
        adapted: PEFT model of `adapters.add_adapter`.
    """

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.adapted = adapted
        self.dtype = next(p.dtype for p in adapted.parameters() if not p.requires_grad)  # of the layers

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the sum of -log P over all targets (natural log)."""
        mask = attention_mask(batch.documents)
        if self.adapted.config._attn_implementation == "eager":  # adds its mask to the scores
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e9)
            mask = mask.to(self.dtype)
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
    allowed = TOLERANCE.get(loss.dtype, 0.05)
    rule = f"score packed documents like single ones, within {allowed:g} a token"
    check(difference <= allowed, f"TrainLmOptions.base {name}", rule, difference)


@torch.no_grad()
def probe_start(loss: AdapterLoss, batch: TokenBatch, base: Base) -> Optional[BetterStart]:
    """Return a token that starts documents clearly better than the base's bos, or None (see `better_start`).

    Args:
        loss: of the base with a new adapter, which changes nothing yet.
        batch: some packed documents.
        base: its vocabulary names the candidates.
    """
    if base.vocabulary.tokenizer is None:
        return None
    loss.eval()
    first, items = (batch.positions == 0) & (batch.documents >= 0), max(int((batch.targets >= 0).sum()), 1)

    def nats(token: int) -> float:
        return float(loss(batch._replace(tokens=batch.tokens.masked_fill(first, token)))) / items

    return better_start(base.vocabulary.tokenizer, *base.marks, nats)


def _alone(loss: AdapterLoss, tokens: Tensor, targets: Tensor) -> float:
    """Return the loss of one document by a plain forward."""
    logits = loss.adapted(input_ids=tokens, use_cache=False).logits
    return float(nn.functional.cross_entropy(logits[0].float(), targets[0], reduction="sum"))
