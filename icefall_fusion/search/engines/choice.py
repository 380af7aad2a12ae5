"""Which engine searches: compiled code on a CPU, a kernel on a GPU, or tensors; all find the same.
Knows: what each engine serves. Must not know: how a frame is searched, which language model takes part.
"""
from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Union

import torch

from icefall_fusion.common.checks import check
from icefall_fusion.common.native_build import load_native
from icefall_fusion.search.beam import Beam
from icefall_fusion.search.engines.base import lacks
from icefall_fusion.search.engines.candidates import FramePlan, columns_needed, plan_frames
from icefall_fusion.search.engines.children import columns_kept
from icefall_fusion.search.engines.gpu import DeviceSearch, load_kernel, why_not
from icefall_fusion.search.engines.gpu_check import kernel_fails, kind_of
from icefall_fusion.search.engines.native import NativeSearch, native_tables
from icefall_fusion.search.engines.tensors import TensorSearch
from icefall_fusion.search.fusion_set import JointFusion
from icefall_fusion.search.options import PrefixSearchOptions

if TYPE_CHECKING:
    from icefall_fusion.ngram.piece_ngram import PieceNgram
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
        why = load_kernel()[1]
        unusual = bool(why)
        why = why or why_not(options.beam, options.recover_mass, joint, device)
        if not why and device.type == "cuda":
            why = kernel_fails(device, kind_of(joint), _run)
            unusual = bool(why)
    else:
        why = "" if device.type == "cpu" else f"it is for the CPU, the log-probs are on {device}"
        why = lacks(joint) or why
        if not why:
            _, why = load_native()
            unusual = bool(why)
    check(not why or options.engine == "auto", "PrefixSearchOptions.engine", f"be auto or torch: {why}",
          options.engine)
    if unusual:
        _tell(why)
    return "torch" if why else wanted


def prepare_ngram(ngram: PieceNgram, engine: str) -> None:
    """Lay an n-gram out as the search by compiled code wants it, which the first search would do otherwise.

    Args:
        ngram: on the device where the search runs.
        engine: see PrefixSearchOptions.
    """
    if engine in ("auto", "native") and ngram.device.type == "cpu":
        library, _ = load_native()
        if library is not None:
            native_tables(library, ngram)


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
        search = DeviceSearch(beam, plan, given.live, joint, limit, options.score_beam)
        try:
            search.compile()
        except Exception as error:  # of a compiler or a driver: any
            if options.engine != "auto":
                raise
            _tell(f"the kernel cannot be had for this search: {type(error).__name__}: {str(error)[-400:]}")
            return open_search("torch", given, beam, options, joint)
        return search, plan
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


def _run(engine: str, given: SearchInput, beam: Beam, joint: JointFusion) -> None:
    """Search a batch by an engine."""
    options = PrefixSearchOptions(beam=beam.arena.beam, engine=engine)
    open_search(engine, given, beam, options, joint)[0].run()
