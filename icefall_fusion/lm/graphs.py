"""CUDA graphs of events: one launch instead of some ten a layer, for sizes that come again.
Knows: an event's buffer and sizes, CUDA graphs. Must not know: what the kernels do, trees, search.

All that changes from event to event lies in one static buffer (see fused_event.py), addresses of keys and
values included. So a graph depends on sizes alone and serves every batch. Never run on a GPU yet; there a
model goes by graphs when its scores by them have agreed with plain forwards (see fused_loading.py).
"""
from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Callable, Optional

import torch
from torch import Tensor

from icefall_fusion.lm.fused_event import EventInputs, EventSizes

if TYPE_CHECKING:
    from icefall_fusion.lm.fused import FusedModel

Work = Callable[[], Tensor]
_MOST_TOKENS = 1024  # an event of more is no usual one, and the GPU works longer on it than the host
_MOST_SEEN = 4096  # sizes that are counted


def graphs_of(fused: FusedModel, most: int = 32, after: int = 1) -> EventGraphs:
    """Return graphs of a model's events; on a CPU they are no graphs, but the work itself.

    Args:
        fused: the model.
        most, after: see `EventGraphs`.
    """
    mine = weakref.proxy(fused)  # a circle would keep all weights until a collection
    capture = GraphCapture(fused.device) if fused.device.type == "cuda" else None
    return EventGraphs(lambda event: mine.logits(event), capture, most, after)


class EventGraphs:
    """Runs events of each size on a static buffer, by a graph where it can be captured.

    Args:
        run: returns the logits of an event, by launches that depend on its sizes alone.
        capture: makes of work what replays it, with the same output tensor each time; None: the work itself.
        most: sizes that are kept.
        after: so often a size is run without a graph first.

    Attributes:
        after: as given.
        captured: graphs that were made.
        replayed: events that went by them.
        failure: why no more graphs are made; None: nothing failed.
    """

    def __init__(
        self, run: Callable[[EventInputs], Tensor], capture: Optional[GraphCapture], most: int = 32,
        after: int = 1,
    ) -> None:
        self._run, self._capture = run, capture
        self._most, self.after = most, after
        self._seen: Counter[EventSizes] = Counter()
        self._kept: OrderedDict[EventSizes, tuple[Tensor, Work]] = OrderedDict()
        self._stream: Optional[torch.cuda.Stream] = None
        self._out = torch.empty(0)  # one for all: each is read before the next event
        self.captured = self.replayed = 0
        self.failure: Optional[str] = None

    def logits(self, sizes: EventSizes, host: Tensor) -> Optional[Tensor]:
        """Return the logits of an event, to be read before the next one; None: it is to be run as usual.

        Args:
            sizes: of the event.
            host: its buffer, int64; on a GPU's host pinned.
        """
        if self.failure is not None or sizes.tokens > _MOST_TOKENS:
            return None
        if sizes not in self._kept and self._seen[sizes] < self.after:
            if len(self._seen) < _MOST_SEEN:
                self._seen[sizes] += 1
            return None
        self._take_turns()
        if sizes not in self._kept and not self._make(sizes, host):
            return None
        self._kept.move_to_end(sizes)
        static, replay = self._kept[sizes]
        static.copy_(host, non_blocking=True)
        self.replayed += 1
        return replay()

    def _make(self, sizes: EventSizes, host: Tensor) -> bool:
        """Capture the graph of a size; return whether that went well."""
        while len(self._kept) >= self._most:
            if self._capture is not None:
                torch.cuda.synchronize(self._capture.device)  # nothing that goes may still run
            self._kept.popitem(last=False)
        static = torch.zeros_like(host, device=self._capture.device if self._capture is not None else None)
        static.copy_(host, non_blocking=True)
        inputs = EventInputs.of(static, sizes)

        def work() -> Tensor:
            logits = self._run(inputs)
            if logits.numel() > self._out.numel() or logits.dtype != self._out.dtype:
                self._out = torch.empty_like(logits)  # not while it is captured: `GraphCapture` runs it first
            return self._out.view(-1)[: logits.numel()].view_as(logits).copy_(logits)

        try:
            self._kept[sizes] = static, work if self._capture is None else self._capture(work)
        except Exception as error:  # what drivers refuse has no type of its own; or memory runs out
            self.failure = f"{type(error).__name__}: {error}"
            self._kept.clear()
            logging.warning("no CUDA graphs, so each kernel is launched by itself", exc_info=True)
            return False
        self.captured += 1
        return True

    def _take_turns(self) -> None:
        """Let what runs now come after the last event, which may have run on another stream."""
        if self._capture is None:
            return
        stream = torch.cuda.current_stream(self._capture.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream


class GraphCapture:
    """Captures work as CUDA graphs that share one pool of memory: no two of them may run at a time.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Return what replays ``work`` on the current stream; its output is the same tensor each time."""
        current, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            try:
                work()  # work spaces of libraries belong to a stream: they must be there, outside of the pool
            finally:
                self._stream.synchronize()  # where it fails, too: others will use the memory it writes to
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = work()
            except BaseException:
                try:
                    graph.capture_end()
                except RuntimeError:  # it says again that the capture has failed
                    pass
                raise
            graph.capture_end()
        current.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
