"""What starts a text for a language model: the candidates, and whether one is clearly better than its bos.
Knows: tokenizers, scores of texts. Must not know: training, search, fusion.
"""
from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Sequence

if TYPE_CHECKING:
    from icefall_fusion.lm.causal_lm import CausalLm

STARTS = ("<|endoftext|>", "<|begin_of_text|>", "<s>", "</s>", "<bos>")  # of families of models
CLEARLY = 0.1  # nats a token


class BetterStart(NamedTuple):
    """A token that starts texts better than the model's bos, and nats a token with bos and with it."""

    token: str
    own: float
    better: float


def better_start(
    tokenizer: Any, bos: int, eos: Optional[int], nats: Callable[[int], float]
) -> Optional[BetterStart]:
    """Return the token that starts texts best, if it is clearly better than bos.

    Args:
        tokenizer: of Hugging Face; the candidates are its bos and eos, and what other models start with.
        bos, eos: ids that are used now.
        nats: id of a first token -> mean -log P (natural) of a token of some texts.
    """
    known = tokenizer.get_vocab()
    names = {index: name for name in STARTS if (index := known.get(name)) is not None}
    own = [index for index in (bos, eos) if index is not None]
    names.update({index: str(tokenizer.convert_ids_to_tokens(index)) for index in own})
    scores = {index: nats(index) for index in names}
    best = min(scores, key=scores.__getitem__)
    better = scores[bos] - scores[best] > CLEARLY
    return BetterStart(names[best], scores[bos], scores[best]) if better else None


def probe_start(lm: CausalLm, texts: Sequence[str]) -> Optional[BetterStart]:
    """Return `better_start` of a model on some texts; None for a model without a tokenizer or a bos.

    Args:
        lm: any model.
        texts: as the model sees them in a decode; some thirty sentences are enough.
    """
    if lm.tokenizer is None or lm.bos_id is None or not texts:
        return None
    tokens = sum(len(lm.encode(text)) + (lm.eos_id is not None) for text in texts)

    def nats(first: int) -> float:
        other = copy.copy(lm)  # shares the weights
        other.bos_id = first
        return -sum(other.log_probs(texts, eos=lm.eos_id is not None)) / max(tokens, 1)

    return better_start(lm.tokenizer, lm.bos_id, lm.eos_id, nats)
