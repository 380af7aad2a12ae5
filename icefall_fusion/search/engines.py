"""Which engine searches: compiled code on a CPU, a kernel on a GPU, or tensors; all find the same.
Knows: what each engine serves. Must not know: how a frame is searched, which language model takes part.
"""
from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, Union

import torch

from icefall_fusion.checks import check
from icefall_fusion.native_build import load_native
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.candidates import FramePlan, columns_needed, plan_frames
from icefall_fusion.search.children import columns_kept
from icefall_fusion.search.device_search import DeviceSearch, why_not
from icefall_fusion.search.engine import serves
from icefall_fusion.search.joint import JointFusion
from icefall_fusion.search.native import NativeSearch
from icefall_fusion.search.options import PrefixSearchOptions
from icefall_fusion.search.search_input import check_input
from icefall_fusion.search.tensor_search import TensorSearch

if TYPE_CHECKING:
    from icefall_fusion.search.search_input import SearchInput

Search = Union[NativeSearch, DeviceSearch, TensorSearch]


def choose_engine(options: PrefixSearchOptions, joint: JointFusion, device: torch.device) -> str:
    """Return the engine to take, none of them ``auto``.

    Raises:
        ValueError: one is asked for by name where it does not serve.
    """
    wanted = options.engine
    if wanted == "auto":
        wanted = "triton" if device.type == "cuda" else "native"
    if wanted == "torch":
        return wanted
    unusual = False  # worth telling, for it costs time and can be mended
    if wanted == "triton":
        why = why_not(options.beam, options.recover_mass, joint, device)
        if not why and device.type == "cuda":
            why = kernel_fails(device)
            unusual = bool(why)
    else:
        why = "" if device.type == "cpu" else f"it is for the CPU, the log-probs are on {device}"
        if not serves(joint):
            names = ", ".join(fusion.source for fusion in joint.shallow)
            why = f"it has no shallow fusion but that of one n-gram over pieces ({names})"
        if not why:
            _, why = load_native()
            unusual = bool(why)
    check(not why or options.engine == "auto", "PrefixSearchOptions.engine", f"be auto or torch: {why}",
          options.engine)
    if unusual:
        _tell(why)
    return "torch" if why else wanted


@functools.lru_cache(maxsize=1)
def _tell(why: str) -> None:
    logging.warning("the prefix search runs on tensors, several times slower: %s", why)


def open_search(engine: str, given: SearchInput, beam: Beam, options: PrefixSearchOptions,
                joint: JointFusion) -> tuple[Search, FramePlan]:
    """Return a search that is ready to ``run`` over a batch, and its frames.

    Args:
        engine: one that serves, see `choose_engine`.
        beam: at the root; the search leaves it after the last frame.
        joint: the fusions, begun.
    """
    pieces = given.log_probs.shape[2]
    limit = pieces - 1 if options.top_pieces is None else min(options.top_pieces, pieces - 1)
    # the others pass over skipped frames in no time; tensors are better off without them
    plan = plan_frames(given, options.blank_skip, leave_out=engine == "torch" and not joint.fusions)
    if engine == "triton":
        return DeviceSearch(beam, plan, given.live, joint, limit, options.score_beam), plan
    if engine == "torch":
        return TensorSearch(given, plan, beam, options, limit, joint), plan
    columns = min(limit, columns_needed(options.beam, pieces, options.beam - 1 if joint.ranks else 0))
    if any(fusion.weight != 0 or fusion.word_bonus != 0 for fusion in joint.shallow):
        columns = limit  # those that could survive are found in each frame
    if options.recover_mass:
        columns = columns_kept(options.beam, limit)
    library, _ = load_native()
    search = NativeSearch(
        library, beam, plan, given.live, joint, columns, options.recover_mass, options.score_beam
    )
    return search, plan


@functools.lru_cache(maxsize=None)
def kernel_fails(device: torch.device) -> str:
    """Return "" if the kernel finds on a device what tensors find there, else what happens; tried once."""
    generator = torch.Generator().manual_seed(1)
    log_probs = (3 * torch.randn(3, 90, 40, generator=generator)).log_softmax(-1).to(device)
    given = check_input(log_probs, torch.tensor([90, 61, 0]), 0, None, None)
    found: list[Any] = []
    for engine in ("torch", "triton"):
        beam = Beam.at_root(given, 8)
        try:
            open_search(engine, given, beam, PrefixSearchOptions(beam=8), JointFusion([], None))[0].run()
            found.append((beam.log_total.double() + beam.offset.unsqueeze(1)).cpu())
        except Exception as error:  # of a compiler or a driver: any
            return f"{engine} does not run on {device}: {type(error).__name__}: {str(error)[-400:]}"
    worst = float((found[0] - found[1]).nan_to_num(0.0).abs().max())
    return "" if worst < 1e-2 else f"on {device} the kernel's scores are {worst} nats off those of tensors"
