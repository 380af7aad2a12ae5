"""Delayed fusion: at an event the closed words of all survivors are scored by an LLM, in one call.
Knows: closed words, their LLM tokens, the tree, triggers. Must not know: which LM it is, the frame step.

Hori, Kocour, Haider, McDermott, Zhuang: "Delayed fusion: integrating large language models into first-pass
decoding in end-to-end speech recognition", ICASSP 2025 (arXiv 2501.09258), section 3.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, Sequence, Union

import torch

from icefall_fusion.checks import check
from icefall_fusion.fusion.base import LmFusion, live_slots
from icefall_fusion.fusion.look_ahead import LookAhead, LookAheadRun
from icefall_fusion.fusion.retokenize import prompt_tokens, tokenizer_for
from icefall_fusion.fusion.triggers import ShortestHypothesis, Trigger
from icefall_fusion.fusion.words import ClosedWords, History
from icefall_fusion.search.pace import Ahead, Pace

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.lm import CausalLm
    from icefall_fusion.search.beam import Beam

Prompt = Union[None, str, Mapping[str, str]]
_KEEP_AFTER = 32  # new tokens an utterance between two clean-ups of the tree


@dataclass
class _Event:
    """Scores on their way: of which utterances [B] bool (CPU), the frame when they are due, what waits."""

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
        weight: factor of its natural-log score, at least 0; 0 leaves the search as it is, bit for bit.
        word_bonus: added per scored word, in nats.
        trigger: when to score (see ``triggers.py``).
        text: how the LM sees words: ``as-is``, ``lower`` or ``sentence``.
        prompt: earlier text, for all utterances or by utterance id; it is read, not scored.
        eos: whether the end of the utterance is scored too.
        source: name of the score in N-best lists.
        look_ahead: ranks words that are not scored yet; None: by the acoustic score alone, as in the paper.
        late: asynchronous fusion: the LLM is started at an event, the search goes on, and the scores join so
            many frames later (or at the utterance's next event, if that is earlier): each hypothesis then has
            the score of those of its words that were closed at the event. On a GPU the LLM runs beside the
            search meanwhile. 0: the search waits. The result depends on ``late``, never on timing.

    Raises:
        ValueError: a bad weight, bonus, trigger, text style or source (see `LmFusion`). In a search: a word
            that the tokenizer cannot spell; the message has the utterance and the word.
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
        good = look_ahead is None or isinstance(look_ahead, LookAhead)
        check(good, "DelayedFusion.look_ahead", "be None or a LookAhead", look_ahead)
        check(late >= 0, "DelayedFusion.late", "be at least 0 frames", late)
        self.late = int(late)
        self.trigger, self.text, self.prompt, self.look_ahead = trigger, text, prompt, look_ahead
        self._tokenizer = tokenizer_for(lm, text)

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch (see ``Fusion.begin``).

        Raises:
            ValueError: the search has no acoustic vocabulary, or an utterance has no prompt.
        """
        check(tokens is not None, "tokens", "be given to the search for delayed fusion", None)
        self._tokenizer.check_acoustic(tokens)
        prompts = prompt_tokens(self.lm, self.prompt, ids)
        self._prompted = [bool(prompt) for prompt in prompts] if prompts else [False] * len(ids)
        self._open(beam, index, ids, prompts, aside=self.late > 0)
        self._flying: list[_Event] = []
        self._lens = beam.lens.cpu()
        self._words = ClosedWords(beam.arena, tokens)
        for utterance, node in enumerate(self._tree.roots().tolist()):
            self._words.root(utterance).node = node
        self._run = self.trigger.start(beam, tokens)
        self._ahead: Optional[LookAheadRun] = None
        self._look: Optional[Ahead] = None
        if self.look_ahead is not None and self.weight > 0:
            self.look_ahead.ngram.check_size(tokens.size)
            weight = self.weight * self.look_ahead.scale
            self._look = Ahead(self.look_ahead.ngram, weight, self.word_bonus, self.look_ahead.every)
        self._events = self._new_tokens = 0
        self._scored: set[int] = set()
        self._cache_before = (self._tokenizer.hits, self._tokenizer.misses)

    def pace(self) -> Optional[Pace]:
        """Return when to call ``fuse_now`` (see ``Fusion``); None: scores come late, or the trigger asks."""
        pace = None if self.late else self.trigger.pace()
        return None if pace is None else pace._replace(ahead=self._look)

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        """Score the closed words of every live hypothesis of the utterances [B] bool that have stopped."""
        self._score_closed(beam, fires, 0)

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        """Let the trigger count, and the look-ahead estimate (see ``Fusion.advance``)."""
        self._run.advance(beam, source, grew)
        if self._look is not None and self._ahead is None:
            self._ahead = LookAheadRun(self._look, beam)
        if self._ahead is not None:
            self._ahead.advance(beam, grew)

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> None:
        """Score the closed words of every live hypothesis of the utterances that fuse now."""
        fires = self._run.fires(beam, frame, active)
        scored, until = fires, None
        if self.late:
            scored, until = self._land(beam, frame, fires)
        if fires is not None:
            self._score_closed(beam, fires, frame)
        if self._ahead is not None:
            until = beam.boundary if scored is not None and until is None else until
            self._ahead.fuse(beam, frame, active, scored, until)

    def _score_closed(self, beam: Beam, fires: Tensor, frame: int) -> None:
        slots = live_slots(beam, fires)
        if not slots.numel():
            return
        self._events += 1
        boundaries, where = beam.boundary.reshape(-1)[slots].cpu().unique(return_inverse=True)
        histories = self._words.closed(boundaries.tolist())
        nodes, counts = self._place(histories, where)
        state = beam.state[..., self.index]
        wait = self._tree.launch(nodes, state.reshape(-1)[slots].cpu())
        if self.late:
            self._flying.append(_Event(fires.cpu(), frame + self.late, wait))
        else:
            self._write(beam, slots, wait(), counts.to(slots.device))
            self._move(beam, slots, nodes)
        if self._new_tokens > _KEEP_AFTER * beam.arena.batch:
            self._clean(beam)

    def _land(
        self, beam: Beam, frame: int, fires: Optional[Tensor]
    ) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """Let scores join that are due, or whose utterances fuse again.

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
            histories = [self._scored_part(history) for history in self._words.closed(boundaries.tolist())]
            nodes, counts, places = (
                torch.tensor([getattr(history, name) for history in histories], dtype=torch.int64)[where]
                for name in ("node", "count", "place")
            )
            scores = torch.from_numpy(self._tree.known(nodes)[1]).float()
            self._write(beam, slots, scores, counts.to(slots.device))
            self._move(beam, slots, nodes)
            until.view(-1)[slots] = places.to(slots.device)
        return landed, until

    def _scored_part(self, history: History) -> History:
        """Return the longest part of a history whose words have a score; the root has one."""
        self._insert(history)
        while not self._tree.known([history.node])[0][0]:
            history = history.before
        return history

    def finish(self, beam: Beam) -> None:
        """Score all words, and the end, of every live hypothesis of the batch in one call."""
        self._wait_for_all()
        slots = live_slots(beam)
        if slots.numel():
            self._finish(beam, slots)
        if self._ahead is not None:
            self._ahead.finish(beam)
        self._close()
        del self._words, self._run, self._ahead, self._flying

    def _wait_for_all(self) -> None:
        for event in self._flying:
            event.wait()

    def _finish(self, beam: Beam, slots: Tensor) -> None:
        histories = self._words.complete(beam.node.reshape(-1)[slots].tolist())
        nodes, counts = self._place(histories, torch.arange(len(histories)))
        previous = beam.state[..., self.index].reshape(-1)[slots].cpu()
        scores = self._tree.score(nodes, previous, eos=self.eos)
        self._write(beam, slots, scores, counts.to(slots.device))
        self._move(beam, slots, nodes)

    def _count(self) -> dict[str, float]:
        """Return the tree's counters, events, histories_scored and those of re-tokenization."""
        own = {"events": self._events, "histories_scored": len(self._scored)}
        return {**super()._count(), **own, **self._tokenizer.stats(*self._cache_before)}

    def _place(self, histories: Sequence[History], where: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tree nodes and numbers of words of ``histories[where]``, two int64 [n] on the CPU."""
        for history in histories:
            self._insert(history)
        self._scored.update(history.node for history in histories if history.count)
        nodes = torch.tensor([history.node for history in histories], dtype=torch.int64)
        counts = torch.tensor([history.count for history in histories], dtype=torch.int64)
        return nodes[where], counts[where]

    def _insert(self, history: History) -> None:
        """Find the tree node of a history and of all it goes back to."""
        chain = []
        while history.node < 0:
            chain.append(history)
            history = history.before
        for after in reversed(chain):
            try:
                after.node = self._extend(history, after)
            except ValueError as error:  # a word that the tokenizer cannot spell
                raise ValueError(f"utterance {self._ids[after.utterance]!r}: {error}") from error
            history = after

    def _extend(self, before: History, history: History) -> int:
        node, prompted = before.node, self._prompted[history.utterance]
        for index, word in enumerate(history.words, before.count):
            ids = self._tokenizer.word_ids(word, index, prompted)
            if ids is None:  # this tokenizer may change the tokens of earlier words: walk from the root
                ids = self._tokenizer.encode_whole(history.all_words(), prompted)
                self._new_tokens += 1
                return self._tree.insert(self._words.root(history.utterance).node, ids)
            node = self._tree.insert(node, ids)
            self._new_tokens += len(ids)
        return node

    def _move(self, beam: Beam, slots: Tensor, nodes: Tensor) -> None:
        width = beam.state.shape[1]
        row = torch.div(slots, width, rounding_mode="floor")
        beam.state[row, slots % width, self.index] = nodes.to(slots.device)

    def _clean(self, beam: Beam) -> None:
        """Free what no live hypothesis can come back to, in the tree and here."""
        self._wait_for_all()
        boundaries = beam.boundary.reshape(-1)[live_slots(beam)].unique().tolist()
        self._words.keep(boundaries)
        live = self._words.closed(boundaries)
        for history in live:
            self._insert(history)
        self._tree.keep([history.node for history in live])
        self._new_tokens = 0
