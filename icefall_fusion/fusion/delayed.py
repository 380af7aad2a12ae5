"""Delayed fusion: at an event the closed words of all survivors are scored by an LLM, in one call.
Knows: closed words, their LLM tokens, the tree, triggers. Must not know: which LM it is, the frame step.

Hori, Kocour, Haider, McDermott, Zhuang: "Delayed fusion: integrating large language models into first-pass
decoding in end-to-end speech recognition", ICASSP 2025 (arXiv 2501.09258), section 3.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, Sequence, Union

import numpy as np
import torch

from icefall_fusion.common.checks import check, is_count
from icefall_fusion.fusion.base import LmFusion, check_prompt, live_slots, prompt_tokens, tokenizer_for
from icefall_fusion.fusion.triggers import ShortestHypothesis, Trigger
from icefall_fusion.fusion.word_nodes import open_word_nodes
from icefall_fusion.search.fusion import AheadTerms, StopRule

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.fusion.ngram import LookAhead, LookAheadRun
    from icefall_fusion.fusion.words import WordNodes
    from icefall_fusion.lm import CausalLm
    from icefall_fusion.search.beam import Beam

Prompt = Union[None, str, Mapping[str, str]]
_KEEP_AFTER = 8  # new tokens an utterance between two clean-ups of the tree


@dataclass
class _Event:
    """Scores that are computed: of utterances [B] bool (CPU), due in a frame, and a function that waits."""

    utterances: Tensor
    due: int
    wait: Callable[[], Tensor]


class DelayedFusion(LmFusion):
    """An LLM with any tokenizer joins the search, a word late.

    When the trigger fires for an utterance, the closed words of each live hypothesis are re-tokenized and
    scored; ``log P(closed words | prompt)`` becomes the hypothesis's raw score. At the end of the utterance
    the last words follow, and the end of the sentence if asked for.

    Args:
        lm: the language model, of any vocabulary.
        weight: factor of its natural-log score, at least 0; 0 leaves the search as it is, bit for bit. The
            scores are reported all the same, and a word that the tokenizer cannot spell is no error then:
            it is scored as the tokenizer has it, with unknown or missing tokens.
        word_bonus: added per scored word, in nats.
        trigger: when to score (see ``triggers.py``).
        text: how the LM sees words: ``as-is``, ``lower`` or ``sentence``.
        prompt: earlier text, for all utterances or by utterance id; it is read, not scored.
        eos: whether the end of the utterance is scored too.
        source: name of the score in N-best lists.
        look_ahead: ranks words that are not scored yet; None: by the acoustic score alone, as in the paper.
        late: frames from an event to the scores (asynchronous fusion); 0: the search waits for them. The
            search goes on while the LLM runs, on a GPU at the same time. The scores join after ``late``
            frames, or at the utterance's next event if that is earlier. A hypothesis then has the score of
            those of its words that were closed at the event. The result never depends on timing.

    Raises:
        ValueError: a bad weight, bonus, trigger, text style, prompt or source (see `LmFusion`). In a search
            with a weight above 0: a word that the tokenizer cannot spell; the message has the utterance and
            the word.
    """

    def __init__(
        self,
        lm: CausalLm,
        weight: float,
        word_bonus: float = 0.0,
        trigger: Trigger = ShortestHypothesis(),  # noqa: B008 (a frozen value)
        text: str = "as-is",
        prompt: Prompt = None,
        eos: bool = True,
        source: str = "llm",
        look_ahead: Optional[LookAhead] = None,
        late: int = 0,
    ) -> None:
        super().__init__(lm, weight, word_bonus, eos, source)
        check(isinstance(trigger, Trigger), "DelayedFusion.trigger", "be a trigger", trigger)
        if look_ahead is not None:
            from icefall_fusion.fusion.ngram import LookAhead

            good = isinstance(look_ahead, LookAhead)
            check(good, "DelayedFusion.look_ahead", "be None or a LookAhead", look_ahead)
        check(is_count(late, 0), "DelayedFusion.late", "be an integer, at least 0", late)
        check_prompt(prompt, "DelayedFusion.prompt")
        self.late = int(late)
        self.trigger, self.text, self.prompt, self.look_ahead = trigger, text, prompt, look_ahead
        self._tokenizer = tokenizer_for(lm, text, strict=weight > 0)

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch (see ``Fusion.begin``).

        Raises:
            ValueError: the search has no acoustic vocabulary, or an utterance has no prompt.
        """
        check(tokens is not None, "tokens", "be passed to the search for delayed fusion", None)
        self._tokenizer.check_acoustic(tokens)
        prompts = prompt_tokens(self.lm, self.prompt, ids)
        prompted = [bool(prompt) for prompt in prompts]
        self._open(beam, index, ids, prompts, aside=self.late > 0)
        self._flying: list[_Event] = []
        self._lens = beam.lens.cpu()
        self._texts = self._tree, beam.arena, tokens, self._tokenizer, prompted, ids
        if self.late:  # late scores need the words of shorter prefixes; compiled code does not keep them
            self._go_by_python()
        else:
            self._word_nodes = open_word_nodes(*self._texts)
        self._run = self.trigger.start(beam, tokens)
        self._ahead: Optional[LookAheadRun] = None
        self._look: Optional[AheadTerms] = None
        if self.look_ahead is not None and self.weight > 0:
            self.look_ahead.ngram.check_size(tokens.size)
            weight = self.weight * self.look_ahead.scale
            self._look = AheadTerms(self.look_ahead.ngram, weight, self.word_bonus, self.look_ahead.every)
        self._events, self._cleaned_at = 0, len(self._tree.tree)
        self._scored = np.zeros(0, np.bool_)  # tree nodes at which a text was scored
        self._cache_before = (self._tokenizer.hits, self._tokenizer.misses)

    def stop_rule(self) -> Optional[StopRule]:
        """Return when to call `fuse_now`; None: the fusion must be asked after every frame."""
        own = (DelayedFusion.fuse, DelayedFusion.advance)
        if self.late or self._run.rule is None or (type(self).fuse, type(self).advance) != own:
            return None
        return self._run.rule._replace(ahead=self._look)

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        """Score the closed words of every live hypothesis of the utterances [B] bool that have stopped."""
        self._score_closed(beam, fires, 0)

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Let the trigger count, and the look-ahead estimate (see ``Fusion.advance``)."""
        self._run.advance(beam, source, grew)
        if self._look is not None and self._ahead is None:
            from icefall_fusion.fusion.ngram import LookAheadRun

            self._ahead = LookAheadRun(self._look, beam)
        if self._ahead is not None:
            self._ahead.advance(beam, grew)

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> bool:
        """Score the closed words of every live hypothesis of the utterances that fuse now."""
        fires = self._run.fires(beam, frame, active)
        scored, until = fires, None
        if self.late:
            scored, until = self._land(beam, frame, fires)
        if fires is not None:
            self._score_closed(beam, fires, frame)
        if self._ahead is not None:
            until = beam.boundary if scored is not None and until is None else until
            return self._ahead.fuse(beam, frame, active, scored, until)
        return scored is not None

    def _score_closed(self, beam: Beam, fires: Tensor, frame: int) -> None:
        slots = live_slots(beam, fires)
        if not slots.numel():
            return
        self._events += 1
        nodes, counts = self._nodes(beam.boundary.reshape(-1)[slots])
        wait = self._tree.launch(nodes)
        if self.late:
            self._flying.append(_Event(fires.cpu(), frame + self.late, wait))
        else:
            self._write(beam, slots, wait(), counts.to(slots.device))
            self._move(beam, slots, nodes)
        if len(self._tree.tree) - self._cleaned_at > _KEEP_AFTER * beam.arena.batch:
            self._clean(beam)

    def _land(
        self, beam: Beam, frame: int, fires: Optional[Tensor]
    ) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """Add the scores that are due, and those of utterances that fuse again.

        Returns:
            the utterances whose scores came, [B] bool, and the arena nodes [B, K] up to which their
            hypotheses are scored now; None, None where nothing came.
        """
        landing = torch.zeros_like(self._lens, dtype=torch.bool)
        again = None if fires is None else fires.cpu()
        for event in self._flying:
            now = event.utterances & (self._lens > frame)  # those that have ended are scored in `finish`
            if event.due <= frame:
                landing |= now
            elif again is not None:
                landing |= now & again
        if not bool(landing.any()):
            return None, None
        for event in self._flying:
            if bool((event.utterances & landing).any()):
                event.wait()
                event.utterances = event.utterances & ~landing
        self._flying = [event for event in self._flying if bool(event.utterances.any())]
        landed, until = landing.to(beam.lens.device), beam.boundary.clone()
        slots = live_slots(beam, landed)
        if slots.numel():
            boundaries, where = until.view(-1)[slots].cpu().unique(return_inverse=True)
            histories = self._word_nodes.scored_parts(boundaries.numpy())
            nodes, counts, prefixes = (
                torch.tensor([getattr(history, name) for history in histories], dtype=torch.int64)[where]
                for name in ("node", "count", "prefix")
            )
            scores = torch.from_numpy(self._tree.known(nodes)[1]).float()
            self._write(beam, slots, scores, counts.to(slots.device))
            self._move(beam, slots, nodes)
            until.view(-1)[slots] = prefixes.to(slots.device)
        return landed, until

    def finish(self, beam: Beam) -> None:
        """Score all words, and the end, of every live hypothesis of the batch in one call."""
        self._wait_for_all()
        slots = live_slots(beam)
        if slots.numel():
            self._finish(beam, slots)
        if self._ahead is not None:
            self._ahead.finish(beam)
        self._close()
        del self._word_nodes, self._texts, self._run, self._ahead, self._flying

    def _wait_for_all(self) -> None:
        for event in self._flying:
            event.wait()

    def _finish(self, beam: Beam, slots: Tensor) -> None:
        nodes, counts = self._nodes(beam.node.reshape(-1)[slots], complete=True)
        scores = self._tree.score(nodes, eos=self.eos)
        self._write(beam, slots, scores, counts.to(slots.device))
        self._move(beam, slots, nodes)

    def _count(self) -> dict[str, float]:
        """Return the tree's counters, events, histories_scored and those of re-tokenization."""
        own = {"events": self._events, "histories_scored": int(self._scored.sum())}
        return {**super()._count(), **own, **self._tokenizer.stats(*self._cache_before)}

    def _nodes(self, prefixes: Tensor, complete: bool = False) -> tuple[Tensor, Tensor]:
        """Return the tree nodes and numbers of words of prefixes [n] (arena nodes), int64 on the CPU."""
        wanted = prefixes.cpu().numpy()
        known = self._word_nodes.complete(wanted) if complete else self._word_nodes.closed(wanted)
        if known is None:
            self._go_by_python()
            return self._nodes(prefixes, complete)
        nodes, counts = known
        if len(self._scored) < len(self._tree.tree):
            longer = np.zeros(2 * len(self._tree.tree), np.bool_)
            longer[: len(self._scored)] = self._scored
            self._scored = longer
        self._scored[nodes[counts > 0]] = True
        return torch.from_numpy(nodes), torch.from_numpy(counts)

    def _go_by_python(self) -> WordNodes:
        """Go on in Python: it serves tokenizers that change earlier tokens when text grows, too."""
        from icefall_fusion.fusion.words import WordNodes

        self._word_nodes = WordNodes(*self._texts)
        return self._word_nodes

    def _clean(self, beam: Beam) -> None:
        """Free what no live hypothesis needs, in the tree and among the known words."""
        self._wait_for_all()
        boundaries = beam.boundary.reshape(-1)[live_slots(beam)].cpu().unique().numpy()
        nodes = self._word_nodes.keep(boundaries)
        if nodes is None:
            nodes = self._go_by_python().keep(boundaries)
        self._tree.keep(nodes)
        self._cleaned_at = len(self._tree.tree)
