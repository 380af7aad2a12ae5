"""What shallow and delayed fusion share: settings, the tree of a batch, writing scores into the beam.
Knows: the Fusion base class, token trees. Must not know: which LM it is, words, when to score.
"""
from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any, Mapping, MutableMapping, Optional, Sequence, Union

import torch

from icefall_fusion.common.checks import check, check_choice, check_text
from icefall_fusion.common.counters import add_counters
from icefall_fusion.fusion.retokenize import WordTokenizer
from icefall_fusion.search.fusion import Fusion, check_fusion
from icefall_fusion.text.styles import TEXT_STYLES

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.lm import CausalLm, TreeScorer
    from icefall_fusion.ngram.piece_ngram import PieceNgram
    from icefall_fusion.search.beam import Beam

#: Stands for log 0: a sum of scores stays a number, so that a weight of 0 stays without effect.
LOG_ZERO = -1e30
_MADE: MutableMapping[Any, dict[tuple[str, bool, str], WordTokenizer]] = weakref.WeakKeyDictionary()


class LmFusion(Fusion):
    """A language model that takes part in the search: what all of them share.

    Args:
        lm: the language model.
        weight: factor of its natural-log score, at least 0.
        word_bonus: added per word, in nats; below 0 it is a penalty.
        eos: whether the end of the utterance is scored too.
        source: name of the score in N-best lists.

    Raises:
        ValueError: a weight below 0 or not finite, a bonus not finite, a reserved source, or an end to be
            scored by an LM that has no end-of-sentence token.
    """

    def __init__(
        self, lm: Union[CausalLm, PieceNgram], weight: float, word_bonus: float, eos: bool, source: str
    ) -> None:
        check_lm(lm, f"{type(self).__name__}.lm")
        rule = "be False for an LM without an end token"
        check(not eos or lm.eos_id is not None, f"{type(self).__name__}.eos", rule, eos)
        self.lm, self.eos, self.source = lm, bool(eos), source
        self.weight, self.word_bonus = weight, word_bonus
        check_fusion(self)
        self._tree: Optional[TreeScorer] = None
        self._ids: Sequence[str] = ()
        self._stats: dict[str, float] = {}
        self._groups: Sequence[LmFusion] = ()

    def for_groups(self, count: int) -> list[Fusion]:
        """Return copies that share the language model and have a tree each (see ``Fusion.for_groups``)."""
        self._groups = ()
        self._groups = [copy.copy(self) for _ in range(count)]
        return list(self._groups)

    def _open(
        self, beam: Beam, index: int, ids: Sequence[str], prompts: Optional[list[list[int]]],
        aside: bool = False,
    ) -> None:
        self.index, self._ids, self._groups = index, ids, ()
        self._tree = self.lm.open_tree(beam.arena.batch, prompts, aside=aside, names=ids)
        beam.state[..., index] = self._tree.roots().to(beam.state.device)[:, None]

    def stats(self) -> dict[str, float]:
        """Return the counters since ``begin``: the tree's, and what a fusion counts itself."""
        if not self._groups:
            return dict(self._stats) if self._tree is None else self._count()
        total: dict[str, float] = {"groups_peak": len(self._groups)}
        for stats in [group.stats() for group in self._groups]:
            total |= {name: total.get(name, 0) + value for name, value in stats.items()}
        add_counters(total, {})  # rates are made new; peaks add up: the groups' caches are there at once
        return total

    def _count(self) -> dict[str, float]:
        return dict(self._tree.stats())

    def _close(self) -> None:
        """Free the tree with its keys and values when the batch is done; the counters stay."""
        self._stats, self._tree = self._count(), None

    def _write(self, beam: Beam, slots: Tensor, scores: Tensor, words: Optional[Tensor] = None) -> None:
        """Give slots (flat indices [n] into [B, K]) new raw scores and numbers of paid words."""
        self._put(beam, slots, self._numbers(beam, slots, scores), words)

    def _put(self, beam: Beam, slots: Tensor, scores: Tensor, words: Optional[Tensor]) -> None:
        """Do the same with scores that are known to be numbers."""
        scores = scores.to(beam.lm.device, torch.float32).clamp(min=LOG_ZERO)
        lm, fused = beam.lm[..., self.index], beam.fused
        row, column = rows_and_columns(slots, lm.shape[1])
        gain = self.weight * (scores - lm[row, column])
        lm[row, column] = scores
        if words is not None:
            paid = beam.words[..., self.index]
            gain = gain + self.word_bonus * (words - paid[row, column])
            paid[row, column] = words
        fused[row, column] += gain

    def _add(self, beam: Beam, slots: Tensor, more: Tensor) -> None:
        """Add to the raw scores of slots (flat indices [n] into [B, K])."""
        self._write(beam, slots, beam.lm[..., self.index].reshape(-1)[slots] + more)

    def _move(self, beam: Beam, slots: Tensor, nodes: Tensor) -> None:
        """Let slots (flat indices [n] into [B, K]) stand at other tree nodes."""
        row, column = rows_and_columns(slots, beam.state.shape[1])
        beam.state[row, column, self.index] = nodes.to(beam.state.device)

    def _numbers(self, beam: Beam, slots: Tensor, scores: Tensor) -> Tensor:
        """Return the scores of slots if all are numbers, else name the utterance."""
        bad = torch.isnan(scores)
        if bool(bad.any()):  # asked where the scores are: those of a tree are on the host, no wait
            utterance = int(slots[bad.nonzero()[0, 0]]) // beam.lm.shape[1]
            raise ValueError(
                f"scores of the language model {self.lm.name!r} must be numbers, but utterance "
                f"{self._ids[utterance]!r} has NaN"
            )
        return scores


def rows_and_columns(slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the utterances and the slots of flat indices [n] into [B, K], where K is ``width``."""
    return torch.div(slots, width, rounding_mode="floor"), slots % width


def asked_slots(beam: Beam, active: Tensor) -> Tensor:
    """Return the flat indices [n] into [B, K] of slots that may grow in this frame (see ``Beam.asked``)."""
    return (beam.alive & beam.asked & active[:, None]).reshape(-1).nonzero().squeeze(1)


def live_slots(beam: Beam) -> Tensor:
    """Return the flat indices [n] into [B, K] of the live slots of all utterances."""
    return beam.alive.reshape(-1).nonzero().squeeze(1)


def slots_on_host(
    beam: Beam, utterances: Optional[Tensor] = None, complete: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `live_slots` [n] and the prefixes [n] (arena nodes) of their closed words; both on the host.

    Args:
        beam: where an engine has not brought what is read here along (``beam.seen``), a GPU is waited for.
        utterances: [B] bool on the host; None: all.
        complete: the prefixes of all words, the open last one included.
    """
    seen = beam.seen
    if seen is None and beam.lens.device.type == "cpu":
        seen = beam.alive, beam.node, beam.node if complete else beam.boundary
    elif seen is None:
        seen = torch.stack([beam.alive.long(), beam.node, beam.boundary]).cpu().unbind()
    alive = seen[0].bool() if utterances is None else seen[0].bool() & utterances[:, None]
    slots = alive.reshape(-1).nonzero().squeeze(1)
    return slots, seen[1 if complete else 2].reshape(-1)[slots]


def tokenizer_for(lm: Any, style: str, strict: bool = True, boundaries: str = "words") -> WordTokenizer:
    """Return the word tokenizer of a language model and text style; made and checked once, then shared.

    Args:
        lm: a `CausalLm` (its acoustic pieces serve where it has no tokenizer).
        style, strict: see `WordTokenizer`.
        boundaries: how much of closed words is shown (fusion/boundaries.py); ``words``: all.

    Raises:
        ValueError: style or boundaries are unknown, or the model comes without a tokenizer.
    """
    check_choice(style, TEXT_STYLES, "text")
    tokenizer = lm.tokenizer if lm.tokenizer is not None else lm.pieces
    check(tokenizer is not None, f"language model {lm.name!r}", "have a tokenizer or bpe.model", None)
    made = _MADE.setdefault(lm, {})
    key = style, strict, boundaries
    if key not in made and boundaries == "words":
        made[key] = WordTokenizer(tokenizer, style, strict=strict)
    elif key not in made:
        from icefall_fusion.fusion.boundaries import HoldingTokenizer

        made[key] = HoldingTokenizer(tokenizer, style, boundaries, strict)
    return made[key]


def check_lm(lm: Any, name: str) -> None:
    """Raise ValueError unless ``lm`` is a language model."""
    check(hasattr(lm, "eos_id"), name, "be a language model, e.g. a CausalLm", lm)


def check_prompt(prompt: Any, name: str) -> None:
    """Raise ValueError unless ``prompt`` is None, a text, or texts by utterance id."""
    check(prompt is None or isinstance(prompt, (str, Mapping)), name,
          "be a text, or a mapping of utterance ids to texts", prompt)
    if isinstance(prompt, Mapping):
        for utterance, text in prompt.items():
            check_text(text, f"{name}[{utterance!r}]")
    elif prompt is not None:
        check_text(prompt, name)


def prompt_tokens(
    lm: Any, prompt: Union[None, str, Mapping[str, str]], ids: Sequence[str]
) -> list[list[int]]:
    """Return the token ids of each utterance's prompt; without one there are none.

    Args:
        lm: a `CausalLm`.
        prompt: earlier text, for all utterances or by utterance id.
        ids: the utterances.

    Raises:
        ValueError: an utterance has no prompt.
    """
    if prompt is None:
        return [[] for _ in ids]
    if isinstance(prompt, str):
        texts = [prompt] * len(ids)
    else:
        for name in ids:
            check(name in prompt, "prompt", "have a text for each utterance", name)
        texts = [prompt[name] for name in ids]
    known = {text: list(lm.encode(text)) for text in dict.fromkeys(texts)}
    return [known[text] for text in texts]
