"""The engines of the prefix search and the choice among them: C++, a GPU kernel, tensors, with equal results.
Knows: which searches an engine serves. Must not know: how a frame is searched, language models.
"""
from __future__ import annotations

import functools
import logging
import sys
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.search.engines.base import FramePlan, plan_frames

if TYPE_CHECKING:
    from icefall_fusion.search.beam import Beam
    from icefall_fusion.search.fusion import FusionSet
    from icefall_fusion.search.search_input import PrefixSearchOptions, SearchInput


class Serves(NamedTuple):
    """What searches an engine serves.

    device: type of device, None: every one; shallow: what may score extensions, a key of `_SHALLOW`; ngrams:
    how many n-grams, shallow fusion and look-ahead together, None: any number; recover_mass: see
    PrefixSearchOptions; beam: the largest, None: no limit.
    """

    device: Optional[str]
    shallow: str
    ngrams: Optional[int]
    recover_mass: bool
    beam: Optional[int]


#: Which searches each engine serves. The results are the same; tensors serve every search.
ENGINES = {
    "native": Serves(device="cpu", shallow="tables", ngrams=None, recover_mass=True, beam=None),
    "triton": Serves(device="cuda", shallow="one", ngrams=1, recover_mass=False, beam=62),
    "torch": Serves(device=None, shallow="any", ngrams=None, recover_mass=True, beam=None),
}

_SHALLOW = {"one": "one n-gram over pieces and one list of phrases", "any": "any",
            "tables": "n-grams over pieces and phrases"}


def open_search(inputs: SearchInput, beam: Beam, options: PrefixSearchOptions,
                fusions: FusionSet) -> tuple[Any, FramePlan]:
    """Return a search that is ready to ``run`` over a batch, and its frames.

    Args:
        inputs: of the search.
        beam: at the root; the search leaves it after the last frame.
        options: ``engine`` names one, or ``auto``.
        fusions: begun.

    Raises:
        ValueError: an engine is asked for by name where it does not serve.
    """
    device = inputs.log_probs.device
    wanted = options.engine
    if wanted == "auto":
        wanted = "triton" if device.type == "cuda" else "native"
    def make() -> Any:
        check_serves(wanted, options, fusions, device)
        return _open(wanted, inputs, beam, options, fusions)

    return or_tensors(options, make, lambda: _open("torch", inputs, beam, options, fusions))


def or_tensors(options: PrefixSearchOptions, make: Callable[[], Any], tensors: Callable[[], Any]) -> Any:
    """Return the engine that ``make`` makes; where it does not serve and none was named, that of tensors."""
    try:
        return make()
    except Unavailable as reason:
        good, rule = options.engine == "auto", f"be auto or torch: {reason}"
        check(good, "PrefixSearchOptions.engine", rule, options.engine)
        if reason.unusual:
            tell(str(reason))
    return tensors()


def check_serves(engine: str, options: PrefixSearchOptions, fusions: FusionSet, device: torch.device) -> None:
    """Refuse a search that an engine does not serve, by the table.

    Raises:
        Unavailable: with the reason.
    """
    serves = ENGINES[engine]
    _require(_runs_on(serves, device), f"it is for {serves.device}, the log-probs are on {device}")
    names = ", ".join(fusion.source for fusion in fusions.shallow)
    good = {"any": True, "one": fusions.one_each() is not None}
    good["tables"] = all(fusion.piece_ngram or fusion.phrases is not None for fusion in fusions.shallow)
    reason = f"it has no shallow fusion but that of {_SHALLOW[serves.shallow]} ({names})"
    _require(good[serves.shallow], reason, unusual=good["tables"])
    _require(serves.recover_mass or not options.recover_mass, "it cannot recover mass")
    _require(serves.beam is None or options.beam <= serves.beam,
             f"its beam is at most {serves.beam}, here {options.beam}")
    _require(serves.ngrams is None or len(ngrams_of(fusions)) <= serves.ngrams,
             "it has one n-gram, for shallow fusion or for look-ahead")


def _runs_on(serves: Serves, device: torch.device) -> bool:
    if serves.device in (None, device.type):
        return True
    from icefall_fusion.common.devices import kernels_run_on

    return serves.device == "cuda" and kernels_run_on(device)  # in Triton's interpreter


def ngrams_of(fusions: FusionSet) -> list[Any]:
    """Return the n-grams that a search itself reads: of shallow fusion and of look-ahead."""
    rule = fusions.stop_rule()
    ahead = rule.ahead.ngram if rule is not None and rule.ahead is not None else None
    shallow, _ = fusions.one_each() or (None, None)
    return [ngram for ngram in (shallow and shallow.piece_ngram, ahead) if ngram is not None]


def _require(good: bool, reason: str, unusual: bool = False) -> None:
    if not good:
        raise Unavailable(reason, unusual)


def _open(engine: str, inputs: SearchInput, beam: Beam, options: PrefixSearchOptions,
          fusions: FusionSet) -> tuple[Any, FramePlan]:
    """Open an engine that serves; each is loaded when it is first needed."""
    # the others pass over skipped frames at no cost; for tensors the frames are packed
    leave_out = engine == "torch" and not fusions.members
    plan = plan_frames(inputs, options.blank_skip, leave_out)
    if engine == "native":
        from icefall_fusion.search.engines.native import NativeSearch as Search
    elif engine == "triton":
        from icefall_fusion.search.engines.gpu import GpuSearch as Search
    else:
        from icefall_fusion.search.engines.tensors import TensorSearch as Search
    search = Search(inputs, plan, beam, options, fusions)
    if engine == "triton":
        search.compile()
    return search, plan


@functools.lru_cache(maxsize=1)
def tell(why: str) -> None:
    """Warn once of a reason why tensors search."""
    reason = sys.exc_info()[1]  # with what a compiler or a driver has raised
    shown = reason if reason is not None and reason.__cause__ is not None else None
    logging.warning("the prefix search runs on tensors, several times slower: %s", why, exc_info=shown)
