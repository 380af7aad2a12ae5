"""Trials of the GPU kernel against tensors: one before a device is first relied on, all for a check.
Knows: small random searches. Must not know: language models, real data.

Each trial compiles one form of the kernel; together they have every feature. `check_kernel` runs the one that
is nearest to a search. `trials` and `run_trial` are for programs that check them all, each in a process of
its own: an illegal access on a GPU breaks the process. They have run in Triton's interpreter, never on a GPU.
"""
from __future__ import annotations

import random
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from icefall_fusion.common.checks import check
from icefall_fusion.common.devices import refuse_switched_off
from icefall_fusion.common.unavailable import Unavailable, asked_once
from icefall_fusion.ngram.phrases import PhraseAutomaton, PhraseTensors
from icefall_fusion.ngram.piece_ngram import NgramOrder, PieceNgram
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines.base import plan_frames
from icefall_fusion.search.engines.gpu import KERNEL, GpuSearch
from icefall_fusion.search.engines.tensors import TensorSearch
from icefall_fusion.search.fusion import AheadTerms, Fusion, FusionSet, StopRule
from icefall_fusion.search.search_input import PrefixSearchOptions, check_input
from icefall_fusion.search.stop_rule import StopRuleRun

_PIECES, _BEAM, _FRAMES = 40, 8, 30
_LONG = 70  # frames, in which scores are rescaled
_WORST = 1e-2  # nats between two ways to add up the same


class Trial(NamedTuple):
    """A small search.

    fused: whether a fusion ranks; rule: when it stops; ngram: ``shallow``, ``ahead`` or none.
    phrases: whether there are some beside it.
    words: whether pieces begin words; score_beam, blank_skip: see PrefixSearchOptions; frames: T.
    """

    fused: bool = True
    rule: StopRule = StopRule(7)
    ngram: Optional[str] = None
    words: bool = False
    score_beam: Optional[float] = None
    blank_skip: Optional[float] = None
    frames: int = _FRAMES
    phrases: bool = False


_TRIALS = {
    "alone": Trial(fused=False, frames=_LONG),
    "ranked": Trial(words=True),
    "pieces": Trial(rule=StopRule(2, "pieces"), score_beam=6.0, blank_skip=0.7),
    "ahead": Trial(rule=StopRule(1, "words"), ngram="ahead", words=True),
    "ngram": Trial(ngram="shallow", words=True),
    "phrases": Trial(words=True, phrases=True),
    "phrases+ngram": Trial(ngram="shallow", words=True, phrases=True),
}


class _Scores(Fusion):
    """A fusion that ranks by the last piece where the rule stops, and by an n-gram if it has one.

    A search by tensors goes frame by frame, so the look-ahead is here a second time, by slots.
    """

    source, weight, _scale = "trial", 0.4, 0.3

    def __init__(self, trial: Trial, ngram: Optional[PieceNgram]) -> None:
        self.ngram, self.scores_extensions = ngram, trial.ngram == "shallow"
        self.piece_ngram = ngram if self.scores_extensions else None
        self.word_bonus = 0.2 if trial.words else 0.0
        looks = trial.ngram == "ahead"
        ahead = AheadTerms(ngram, self._scale, self.word_bonus, 2) if looks else None
        self.rule = trial.rule._replace(ahead=ahead)

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        super().begin(beam, index, tokens, ids)
        self.run, self.before = StopRuleRun(self.rule, beam), beam.last.clone()
        self.whole, self.closed, self.scored, self.estimate = (torch.zeros_like(beam.fused) for _ in range(4))

    def stop_rule(self) -> StopRule:
        return self.rule

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        shape = (-1, -1, pieces.shape[1])
        return self._log_prob(beam.last.unsqueeze(2).expand(shape), pieces.unsqueeze(1).expand(shape), beam)

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        self.run.advance(beam, source, grew)
        names = ("before", "whole", "closed", "scored", "estimate")
        before, self.whole, self.closed, self.scored, self.estimate = (
            getattr(self, name).gather(1, source) for name in names
        )
        self.before = beam.last.clone()
        if self.rule.ahead is not None:
            begins = beam.arena.begins_word(beam.last, before == beam.blank)
            gain = self._scale * self._log_prob(before, beam.last, beam) + self.word_bonus * begins
            self.closed = torch.where(grew & beam.arena.starts_word[beam.last], self.whole, self.closed)
            self.whole = self.whole + torch.where(grew, gain, torch.zeros_like(gain))

    def fuse(self, beam: Beam, frame: int, active: Tensor) -> bool:
        fires = self.run.fires(beam, frame, active)
        due = self.rule.ahead is not None and (frame + 1) % self.rule.ahead.every == 0
        now = active if due else torch.zeros_like(active)
        if fires is not None:
            self.fuse_now(beam, fires)
            now = now | fires
            self.scored = torch.where(fires.unsqueeze(1), self.closed, self.scored)
        if self.rule.ahead is not None:
            wanted = torch.where(now.unsqueeze(1), self.whole - self.scored, self.estimate)
            beam.fused += wanted - self.estimate
            self.estimate = wanted
        return due or fires is not None

    def fuse_now(self, beam: Beam, fires: Tensor) -> None:
        beam.fused += 0.7 * (beam.last % 3) * fires.unsqueeze(1)

    def finish(self, beam: Beam) -> None:
        beam.fused -= self.estimate

    def _log_prob(self, before: Tensor, piece: Tensor, beam: Beam) -> Tensor:
        return self.ngram.score([torch.where(before == beam.blank, self.ngram.start_id, before)], piece)


class _Boosts(Fusion):
    """Phrases of which each utterance has one of two lists."""

    source, weight, word_bonus, scores_extensions = "boosts", 0.8, 0.1, True

    def __init__(self) -> None:
        chance = random.Random(3)
        starts, others = range(1, _PIECES, 3), range(1, _PIECES)
        self.lists = []
        for count in (300, 3):
            phrases = {(chance.choice(starts), *chance.choices(others, k=chance.randrange(4))): boost
                       for boost in torch.linspace(-2.0, 5.0, count).tolist()}
            self.lists.append(PhraseAutomaton(_PIECES, list(phrases.items())))

    def begin(self, beam: Beam, index: int, tokens: Any, ids: Sequence[str]) -> None:
        super().begin(beam, index, tokens, ids)
        self.phrases = [self.lists[number % 2] for number in range(len(ids))]
        self.tensors = PhraseTensors(self.lists, beam.node.device)
        self.phrase_bases = self.tensors.bases
        self.ceiling = max(float(one.most.max()) for one in self.lists)
        roots = [self.phrase_bases[one] for one in self.phrases]
        beam.state[..., index] = torch.tensor(roots, device=beam.state.device).unsqueeze(1)

    def stop_rule(self) -> StopRule:
        return StopRule(0)

    def extension_scores(self, beam: Beam, pieces: Tensor, active: Tensor) -> Tensor:
        begins = beam.arena.starts_word[pieces].unsqueeze(1)
        return self.tensors.score(beam.state[..., self.index].unsqueeze(2), pieces.unsqueeze(1), begins)

    def advance(self, beam: Beam, source: Tensor, grew: Tensor) -> None:
        nodes = beam.state[..., self.index]
        nodes.copy_(torch.where(grew, self.tensors.next(nodes, beam.last), nodes))


class _Words(NamedTuple):
    """A vocabulary of which only the beginnings of words are known."""

    starts_word: list[bool]


def trials() -> tuple[str, ...]:
    """Return the names of all trials."""
    return tuple(_TRIALS)


def form_of(fusions: FusionSet, score_beam: Optional[float] = None) -> str:
    """Return the name of the trial that is nearest to a search; the fusions have begun."""
    rule = fusions.stop_rule() or StopRule(0)
    if any(fusion.phrases is not None for fusion in fusions.shallow):
        with_ngram = any(fusion.piece_ngram is not None for fusion in fusions.shallow)
        return "phrases+ngram" if with_ngram else "phrases"
    if fusions.shallow or rule.ahead is not None:
        return "ngram" if fusions.shallow else "ahead"
    if score_beam is not None or (fusions.ranks and rule.unit == "pieces"):
        return "pieces"
    return "ranked" if fusions.ranks else "alone"


def run_trial(name: str, device: torch.device) -> float:
    """Search a small random batch by the kernel and by tensors; return how far their scores are apart, nats.

    Args:
        name: see `trials`.
        device: a GPU; a CPU where Triton interprets.

    Raises:
        ValueError: there is no such trial.
        RuntimeError: the scores differ. Whatever the compiler or the driver raises comes as it is.
    """
    check(name in _TRIALS, "name", f"be one of {list(_TRIALS)}", name)
    tensors, kernel = (_best_scores(engine, device, _TRIALS[name]) for engine in (TensorSearch, _trusted))
    worst = float((tensors - kernel).nan_to_num(0.0, torch.inf, torch.inf).abs().max())
    if not worst < _WORST:
        raise RuntimeError(f"the kernel's scores are {worst:.3g} nats off those of tensors")
    return worst


@asked_once
def check_kernel(device: torch.device, form: str) -> None:
    """Compare the kernel with tensors on a device, once for each trial.

    Args:
        device: a GPU.
        form: see `form_of`.

    Raises:
        Unavailable: the kernel does not run there, its scores differ, or it is switched off.
    """
    refuse_switched_off(f"{KERNEL}:{form}")
    try:
        run_trial(form, device)
    except Exception as error:  # of a compiler or a driver: any
        reason = f"on {device}, trial {form!r}: {type(error).__name__}: {str(error)[-400:]}"
        raise Unavailable(reason, unusual=True) from error


def _trusted(*arguments: Any) -> GpuSearch:
    return GpuSearch(*arguments, trusted=True)


def _best_scores(engine: Callable[..., Any], device: torch.device, trial: Trial) -> Tensor:
    """Return the better half of the scores that rank [B, K / 2], sorted, of a search by an engine.

    The last places are left out: where two scores are nearly equal, rounding decides who has them.
    """
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, trial.frames, _PIECES, generator=generator)
    logits[:, ::5, 0] += 12.0  # surely blank
    lens = torch.tensor([trial.frames, trial.frames - 9, 0])
    inputs = check_input(logits.log_softmax(-1).to(device), lens.to(device), 0, None, None)
    ngram = None if trial.ngram is None else _random_bigram().to(device)
    starts = torch.arange(_PIECES) % 3 == 1
    words = _Words(starts.tolist()) if trial.words else None
    members: list[Fusion] = [_Scores(trial, ngram)] if trial.fused else []
    fusions = FusionSet([*members, *([_Boosts()] if trial.phrases else [])], words)  # type: ignore[arg-type]
    beam = Beam.at_root(inputs, _BEAM, starts.to(device) if trial.words else None, len(fusions.members))
    fusions.begin(beam, inputs.ids)
    options = PrefixSearchOptions(_BEAM, score_beam=trial.score_beam, blank_skip=trial.blank_skip)
    engine(inputs, plan_frames(inputs, trial.blank_skip, False), beam, options, fusions).run()
    fusions.finish(beam)
    scores = (beam.log_total + beam.fused).double() + beam.offset.unsqueeze(1)
    scores = scores.masked_fill(~beam.alive, -torch.inf)
    return scores.sort(1, descending=True).values[:, : _BEAM // 2].cpu()


def _random_bigram() -> PieceNgram:
    """Return a bigram over the pieces that has half of all pairs."""
    base, generator = _PIECES + 2, torch.Generator().manual_seed(2)
    keys = torch.randperm(base * base, generator=generator)[: base * base // 2].sort().values
    orders = [
        NgramOrder(length, at, -3.0 - torch.rand(len(at), generator=generator), torch.full((len(at),), -0.5))
        for length, at in ((1, torch.arange(base)), (2, keys))
    ]
    return PieceNgram(_PIECES, orders, "trial")
