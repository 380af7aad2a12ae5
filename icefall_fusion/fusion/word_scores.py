"""What a language model gives each token of each word of a text, to look at.
Knows: texts, a language model's tokenizer and plain forward. Must not know: searches, N-best lists.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Sequence

from icefall_fusion.fusion.base import check_lm, tokenizer_for

if TYPE_CHECKING:
    from icefall_fusion.lm import CausalLm


class TokenScore(NamedTuple):
    """A token of a language model, as its vocabulary writes it, and its natural-log probability."""

    token: str
    log_prob: float


def score_words(lm: CausalLm, texts: Sequence[Sequence[str]], style: str = "as-is",
                prompt: str = "") -> list[list[list[TokenScore]]]:
    """Return the tokens of each word of each text with their log-probabilities, given all before.

    One plain forward a text. The end of the text is not scored.

    Args:
        lm: the language model.
        texts: lists of words.
        style: how the LM sees words, see `WordTokenizer`.
        prompt: earlier text of all of them.

    Raises:
        ValueError: the tokenizer cannot spell a word.
    """
    check_lm(lm, "lm")
    tokenizer = tokenizer_for(lm, style)
    before = lm.encode(prompt) if prompt else []
    paths = [tokenizer.encode(list(words), bool(before)) for words in texts]
    scores = lm.token_log_probs(paths, before)
    found = []
    for words, path, values in zip(texts, paths, scores):
        ends = [len(tokenizer.encode(list(words[:count]), bool(before))) for count in range(len(words))]
        ends.append(len(path))
        named = [TokenScore(_name(lm, index), value) for index, value in zip(path, values)]
        found.append([named[start:stop] for start, stop in zip(ends, ends[1:])])
    return found


def _name(lm: CausalLm, index: int) -> str:
    """Return a token as text: with its space, where the tokenizer keeps one."""
    if lm.tokenizer is None:
        return lm.pieces.pieces[index]
    return str(lm.tokenizer.convert_ids_to_tokens(index)).replace("Ġ", " ").replace("▁", " ")


def unstable_words(lm: CausalLm, words: Sequence[str], style: str = "as-is") -> list[int]:
    """Return the places of words whose tokens change when the next word comes: re-tokenization anomalies.

    There are none where the tokenizer goes word by word.
    """
    tokenizer = tokenizer_for(lm, style)
    if tokenizer.word_by_word:
        return []
    before: list[int] = []
    found = []
    for count in range(1, len(words) + 1):
        ids = tokenizer.encode(list(words[:count]))
        if ids[: len(before)] != before:
            found.append(count - 2)
        before = ids
    return found
