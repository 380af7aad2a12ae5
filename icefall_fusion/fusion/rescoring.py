"""Second pass: N-best lists get a score more, from a language model or the attention decoder.
Knows: N-best lists, token trees, the model's `score_tokens`. Must not know: k2, searches, weights.

All functions add a raw natural-log score. Totals and order stay; `NBest.reweight` makes them anew with the
new source.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Mapping, MutableMapping, Optional, Sequence, Union

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.common.counters import add_counters
from icefall_fusion.fusion.base import check_lm, check_prompt, prompt_tokens, tokenizer_for
from icefall_fusion.nbest import NBest
from icefall_fusion.ngram.piece_ngram import PieceNgram

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.fusion.retokenize import WordTokenizer
    from icefall_fusion.lm import CausalLm

TOKENS_A_CALL = 8192  # of all hypotheses; what they share is forwarded once
UTTERANCES_A_CALL = 8  # of the attention decoder


def rescore_with_lm(
    nbests: Sequence[NBest],
    lm: CausalLm,
    source: str = "llm",
    text: str = "as-is",
    prompts: Union[None, str, Mapping[str, str]] = None,
    eos: bool = True,
    counters: Optional[MutableMapping[str, float]] = None,
) -> list[NBest]:
    """Add ``log P(text of each hypothesis | prompt)``; what hypotheses of an utterance share is scored once.

    Args:
        nbests: one list an utterance.
        lm: the language model.
        source: name of the new score.
        text: how the LM sees words: ``as-is``, ``lower`` or ``sentence``.
        prompts: earlier text, for all utterances or by utterance id.
        eos: whether the end of the utterance is scored too.
        counters: the tree's counters are added to it (of peaks the largest is kept); None: not wanted.

    Raises:
        ValueError: the tokenizer cannot spell a word, an utterance has no prompt, the style is unknown, or an
            end is to be scored by an LM that has no end-of-sentence token.
    """
    good = isinstance(nbests, Sequence) and all(isinstance(nbest, NBest) for nbest in nbests)
    check(good, "nbests", "be a list of N-best lists", nbests)
    check(isinstance(source, str), "source", "be a name", source)
    check_lm(lm, "lm")
    check(not eos or lm.eos_id is not None, "eos", "be False for an LM without an end token", eos)
    check_prompt(prompts, "prompts")
    tokenizer = tokenizer_for(lm, text)
    # A search checks the tokenizer on its pieces; here words with white space inside are the doubtful ones.
    words = {word for nbest in nbests for hypothesis in nbest for word in hypothesis.words()}
    tokenizer.check(sorted(word for word in words if word.split() != [word]))
    prompt_ids = prompt_tokens(lm, prompts, [nbest.utterance for nbest in nbests])
    paths = [_paths(tokenizer, nbest, bool(ids)) for nbest, ids in zip(nbests, prompt_ids)]
    scores: list[list[float]] = []
    for start, stop in _chunks(paths):
        scores += _score_paths(lm, paths[start:stop], prompt_ids[start:stop], eos, counters)
    return [nbest.with_scores(source, values) for nbest, values in zip(nbests, scores)]


def rescore_with_attention(
    nbests: Sequence[NBest], model: Any, encoder_out: Tensor, lens: Tensor, source: str = "attention"
) -> list[NBest]:
    """Add the attention decoder's log-probability of each hypothesis, its end included.

    Args:
        nbests: one list an utterance, in the order of ``encoder_out``.
        model: anything with ``score_tokens(encoder_out, lens, token_lists) -> list of [N]``.
        encoder_out: [B, T, D].
        lens: [B] frames; an utterance without frames scores 0.
        source: name of the new score.

    Raises:
        ValueError: the number of lists is not B.
    """
    check(len(nbests) == len(encoder_out), "nbests", f"have {len(encoder_out)} utterances", len(nbests))
    scores: list[list[float]] = [[0.0] * len(nbest) for nbest in nbests]
    rows = [row for row in range(len(nbests)) if int(lens[row]) > 0 and len(nbests[row]) > 0]
    for start in range(0, len(rows), UTTERANCES_A_CALL):
        chosen = rows[start : start + UTTERANCES_A_CALL]
        frames = int(lens[chosen].max())
        lists = [[hypothesis.tokens for hypothesis in nbests[row]] for row in chosen]
        decoded = model.score_tokens(encoder_out[chosen][:, :frames], lens[chosen], lists)
        for row, values in zip(chosen, decoded):
            scores[row] = values.tolist()
    return [nbest.with_scores(source, values) for nbest, values in zip(nbests, scores)]


def rescore_with_ngram(nbests: Sequence[NBest], ngram: PieceNgram, source: str = "ngram") -> list[NBest]:
    """Add ``log P(pieces of each hypothesis, its end included)`` of an n-gram over the acoustic pieces.

    Args:
        nbests: one list an utterance.
        ngram: the n-gram.
        source: name of the new score.
    """
    rows = [h.tokens for nbest in nbests for h in nbest]
    ids = [i for pieces in rows for i in (ngram.start_id, *pieces, ngram.end_id)]
    log_probs, owner = ngram.score_sentences(torch.tensor(ids, dtype=torch.int64, device=ngram.device))
    scores = torch.zeros(len(rows), dtype=torch.float64, device=ngram.device)
    scores.index_add_(0, owner, log_probs.double())
    values = iter(scores.tolist())
    return [nbest.with_scores(source, [next(values) for _ in nbest]) for nbest in nbests]


def _paths(tokenizer: WordTokenizer, nbest: NBest, prompted: bool) -> list[list[int]]:
    try:
        return [tokenizer.encode(hypothesis.words(), prompted) for hypothesis in nbest]
    except ValueError as error:  # a word that the tokenizer cannot spell
        raise ValueError(f"utterance {nbest.utterance!r}: {error}") from error


def _chunks(paths: Sequence[Sequence[Sequence[int]]]) -> Iterator[tuple[int, int]]:
    """Cut utterances into runs of at most `TOKENS_A_CALL` tokens (at least one utterance)."""
    start = tokens = 0
    for row, lists in enumerate(paths):
        more = sum(len(ids) for ids in lists)
        if row > start and tokens + more > TOKENS_A_CALL:
            yield start, row
            start, tokens = row, 0
        tokens += more
    if start < len(paths):
        yield start, len(paths)


def _score_paths(
    lm: CausalLm,
    paths: Sequence[Sequence[Sequence[int]]],
    prompts: Optional[Sequence[Sequence[int]]],
    eos: bool,
    counters: Optional[MutableMapping[str, float]],
) -> list[list[float]]:
    """Return the raw score of every path of every utterance, through one tree an utterance."""
    tree = lm.open_tree(len(paths), prompts)
    nodes = [tree.insert(tree.root(row), ids) for row, lists in enumerate(paths) for ids in lists]
    values = tree.score(nodes, eos=eos).tolist() if nodes else []
    if counters is not None:
        add_counters(counters, tree.stats())
    scores = iter(values)
    return [[next(scores) for _ in lists] for lists in paths]
