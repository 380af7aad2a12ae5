"""Delayed fusion: at an event the closed words of all survivors are scored by an LLM, in one call.
Knows: closed words, their LLM tokens, the tree, triggers. Must not know: which LM it is, the frame step.

Hori, Kocour, Haider, McDermott, Zhuang: "Delayed fusion: integrating large language models into first-pass
decoding in end-to-end speech recognition", ICASSP 2025 (arXiv 2501.09258), section 3.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch

from icefall_fusion.common.checks import check, is_count
from icefall_fusion.fusion.base import LmFusion, check_prompt, prompt_tokens, slots_on_host, tokenizer_for
from icefall_fusion.fusion.triggers import ShortestHypothesis, Trigger
from icefall_fusion.fusion.word_nodes import open_word_nodes
from icefall_fusion.lm.tree_forward import on_device
from icefall_fusion.search.fusion import AheadTerms, Fusion, StopRule

if TYPE_CHECKING:
    from torch import Tensor

    from icefall_fusion.fusion.late import LateScores
    from icefall_fusion.fusion.ngram import LookAhead, LookAheadRun
    from icefall_fusion.fusion.words import WordNodes
    from icefall_fusion.lm import CausalLm
    from icefall_fusion.search.beam import Beam

Prompt = Union[None, str, Mapping[str, str]]
_KEEP_AFTER = 8  # new tokens an utterance between two clean-ups of the tree


class _Event(NamedTuple):
    """A model call on its way; on the host: flat slots, tree nodes, numbers of words, scores; [n] each."""
    slots: Tensor
    nodes: Tensor
    counts: Tensor
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
        boundaries: how much of the closed words the LM is shown where words have no spaces between them:
            ``words`` (all: each character closes the one before), ``tokens`` or ``jieba`` (see
            ``boundaries.py``). The final scores do not depend on it.

    Raises:
        ValueError: a bad weight, bonus, trigger, text style, prompt or source (see `LmFusion`). In a search
            with a weight above 0: a word that the tokenizer cannot spell; the message has the utterance and
            the word.
    """

    def __init__(
        self, lm: CausalLm, weight: float, word_bonus: float = 0.0,
        trigger: Trigger = ShortestHypothesis(),  # noqa: B008 (a frozen value)
        text: str = "as-is", prompt: Prompt = None, eos: bool = True, source: str = "llm",
        look_ahead: Optional[LookAhead] = None, late: int = 0, boundaries: str = "words",
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
        self._tokenizer, self._in_turns = tokenizer_for(lm, text, weight > 0, boundaries), False
        self.boundaries = boundaries

    def for_groups(self, count: int) -> list[Fusion]:
        """Return fusions whose model runs aside, while others' utterances are searched."""
        groups = super().for_groups(count)
        for group in groups:
            group._in_turns = True
        return groups

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        """Start a batch (see ``Fusion.begin``).

        Raises:
            ValueError: the search has no acoustic vocabulary, or an utterance has no prompt.
        """
        check(tokens is not None, "tokens", "be passed to the search for delayed fusion", None)
        self._tokenizer.check_acoustic(tokens)
        prompts = prompt_tokens(self.lm, self.prompt, ids)
        prompted = [bool(prompt) for prompt in prompts]
        if self.look_ahead is not None and self.weight > 0:
            self.look_ahead.ngram.check_size(tokens.size)
        self._scored = np.zeros(0, np.bool_)  # tree nodes at which a text was scored
        self._events, self._words_asked = 0, np.zeros(2, np.int64)  # words known before, and others
        self._open(beam, index, ids, prompts, aside=self.late > 0 or self._in_turns)
        self._texts = self._tree, beam.arena, tokens, self._tokenizer, prompted, ids
        self._flying: Optional[LateScores] = None
        if self.late:  # late scores need the words of shorter prefixes; compiled code does not keep them
            from icefall_fusion.fusion.late import LateScores

            self._flying = LateScores(self.late, beam.lens.cpu())
            self._go_by_python()
        else:
            self._word_nodes = open_word_nodes(*self._texts)
        self._run = self.trigger.start(beam, tokens)
        self._ahead: Optional[LookAheadRun] = None
        self._look: Optional[AheadTerms] = None
        if self.look_ahead is not None and self.weight > 0:
            weight = self.weight * self.look_ahead.scale
            self._look = AheadTerms(self.look_ahead.ngram, weight, self.word_bonus, self.look_ahead.every)
        self._cleaned_at = len(self._tree.tree)

    def stop_rule(self) -> Optional[StopRule]:
        """Return when to call `fuse_now`; None: the fusion must be asked after every frame."""
        own = (DelayedFusion.fuse, DelayedFusion.advance)
        if self._run.rule is None or (type(self).fuse, type(self).advance) != own:
            return None
        if self.late and not self._scores_in_steps():
            return None
        return self._run.rule._replace(ahead=self._look, late=self.late)

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        """Score the closed words of every live hypothesis of the utterances [B] bool that have stopped."""
        for _ in self._fuse_in_steps(beam, fires.cpu(), 0):
            pass

    def in_steps(self, beam: Beam, fires: Optional[Tensor], lands: Optional[Tensor] = None) -> Iterator[None]:
        """Score in two steps: launch the model, then join the scores (see ``Fusion.in_steps``)."""
        if not self._scores_in_steps():
            yield from super().in_steps(beam, fires, lands)
        elif fires is None:
            yield from self._finish_in_steps(beam)
        else:
            if self._flying is not None:
                lands = (fires | lands) & self._flying.flying()
                if bool(lands.any()):
                    yield
                    landed = self._land(beam, lands)
                    beam.landed = None if self._look is None or landed[0] is None else landed
            yield from self._fuse_in_steps(beam, fires, 0)

    def _scores_in_steps(self) -> bool:
        """Return whether no subclass scores in its own way."""
        return (type(self).fuse_now, type(self).finish) == (DelayedFusion.fuse_now, DelayedFusion.finish)

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
        fires = None if fires is None else fires.cpu()
        scored, until = fires, None
        if self._flying is not None:
            scored, until = self._land(beam, self._flying.due(frame, fires))
        if fires is not None:
            for _ in self._fuse_in_steps(beam, fires, frame):
                pass
        if self._ahead is not None:
            if scored is not None:
                scored, until = scored.to(beam.lens.device), beam.boundary if until is None else until
            return self._ahead.fuse(beam, frame, active, scored, until)
        return scored is not None

    def _fuse_in_steps(self, beam: Beam, fires: Tensor, frame: int) -> Iterator[None]:
        """Score the closed words of the utterances [B] bool (host), or start to if scores are late."""
        event = self._launch(beam, fires)
        if event is None:
            return
        self._events += 1
        if self._flying is not None:
            self._flying.add(fires, frame, event.wait)
        else:
            yield
            self._join(beam, *event[:3], event.wait())
        if len(self._tree.tree) - self._cleaned_at > _KEEP_AFTER * beam.arena.batch:
            self._clean(beam)

    def _launch(self, beam: Beam, fires: Optional[Tensor]) -> Optional[_Event]:
        """Start to score the closed words of utterances [B] bool (host), or (None) all words and the end."""
        last = fires is None
        slots, prefixes = slots_on_host(beam, fires, complete=last)
        if not len(slots):
            return None
        nodes, counts = self._nodes(prefixes, last)
        return _Event(slots, nodes, counts, self._tree.launch(nodes, eos=last and self.eos))

    def _join(self, beam: Beam, slots: Tensor, nodes: Tensor, counts: Tensor, scores: Tensor) -> Tensor:
        """Give slots their scores, states and numbers of words, all [n] on the host; return slots there."""
        scores = self._numbers(beam, slots, scores)
        slots, nodes, counts = on_device(beam.lens.device, torch.stack([slots, nodes, counts])).unbind()
        self._put(beam, slots, on_device(beam.lens.device, scores), counts)
        self._move(beam, slots, nodes)
        return slots

    def _land(self, beam: Beam, landing: Tensor) -> tuple[Optional[Tensor], Optional[Tensor]]:
        """Add the late scores of utterances [B] bool (host).

        Return these, and the arena nodes [B, K] up to which they are scored; None, None where nothing came.
        """
        if not bool(landing.any()):
            return None, None
        self._flying.wait(landing)
        until = beam.boundary.clone()
        slots, boundaries = slots_on_host(beam, landing)
        if len(slots):
            from icefall_fusion.fusion.late import beginnings

            distinct, where = boundaries.unique(return_inverse=True)
            scored = beginnings(self._ask("scored_parts", distinct.numpy()), self._tree)
            *scored, prefixes = (values[where] for values in scored)
            until.view(-1)[self._join(beam, slots, *scored)] = on_device(until.device, prefixes)
        return landing, until

    def finish(self, beam: Beam) -> None:
        """Score all words, and the end, of every live hypothesis of the batch in one call."""
        for _ in self._finish_in_steps(beam):
            pass

    def _finish_in_steps(self, beam: Beam) -> Iterator[None]:
        if self._flying is not None:
            self._flying.wait()
        event = self._launch(beam, None)
        if event is not None:
            yield
            self._join(beam, *event[:3], event.wait())
        if self._ahead is not None:
            self._ahead.finish(beam)
        self._close()
        del self._word_nodes, self._texts, self._run, self._ahead, self._flying

    def _count(self) -> dict[str, float]:
        """Return the tree's counters, events, histories_scored and those of re-tokenization."""
        own = {"events": self._events, "histories_scored": int(self._scored.sum())}
        before = np.array([self._tokenizer.hits, self._tokenizer.misses]) - self._words_asked
        return {**super()._count(), **own, **self._tokenizer.stats(*before.tolist())}

    def _nodes(self, prefixes: Tensor, complete: bool = False) -> tuple[Tensor, Tensor]:
        """Return the tree nodes and numbers of words of prefixes [n] (arena nodes), int64 on the CPU."""
        nodes, counts = self._ask("complete" if complete else "closed", prefixes.numpy())
        if len(self._scored) < len(self._tree.tree):
            longer = np.zeros(2 * len(self._tree.tree), np.bool_)
            longer[: len(self._scored)] = self._scored
            self._scored = longer
        self._scored[nodes[counts > 0]] = True
        return torch.from_numpy(nodes), torch.from_numpy(counts)

    def _ask(self, what: str, prefixes: np.ndarray) -> Any:
        """Call a method of the word nodes, and count the words asked for (others may share the tokenizer)."""
        tokenizer = self._tokenizer
        before = np.array([tokenizer.hits, tokenizer.misses])
        answer = getattr(self._word_nodes, what)(prefixes)
        if answer is None:
            answer = getattr(self._go_by_python(), what)(prefixes)
        self._words_asked += np.array([tokenizer.hits, tokenizer.misses]) - before
        return answer

    def _go_by_python(self) -> WordNodes:
        """Go on in Python: it serves tokenizers that change earlier tokens when text grows, too."""
        from icefall_fusion.fusion.words import WordNodes

        self._word_nodes = WordNodes(*self._texts)
        return self._word_nodes

    def _clean(self, beam: Beam) -> None:
        """Free what no live hypothesis needs, in the tree and among the known words.

        A model call on its way has read its input: what it needs on the device is reused in the same stream.
        """
        self._tree.keep(self._ask("keep", slots_on_host(beam)[1].unique().numpy()))
        self._cleaned_at = len(self._tree.tree)
