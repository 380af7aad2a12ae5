"""The CUDA stream on which a model runs beside its caller's kernels: one a model.
Knows: CUDA streams. Must not know: tokens, trees, search.

The rule: a tensor belongs to the stream on which it was made. PyTorch gives its memory to later tensors of
that stream alone, without waiting. So all that a token tree keeps on the device (keys and values,
distributions) is made, changed and freed on the side stream, and all trees of a model share the one stream,
so that their memory is used again. What crosses:

- Weights are the caller's. The side stream waits for the caller's once, when a tree is opened.
- Inputs come from the host: pinned memory, copied on the side stream (`tree_forward.on_device`). The host
  may reuse it when that copy is done, which PyTorch keeps track of.
- Scores go to the host: they are copied to pinned memory on the side stream, and the host waits for an event
  there (`tree_forward.fetch`), not for the caller's stream.
- Distributions that the caller reads on the device (`TreeScorer.next_log_probs`) are gathered on the side
  stream into a tensor of their own; `hand_over` lets the caller's stream wait for it, and keeps its memory
  from being given away before the caller's stream is done.
"""
from __future__ import annotations

import contextlib
import weakref
from typing import Any, MutableMapping

import torch
from torch import Tensor


class SideStream:
    """A stream on a model's device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)

    def after_caller(self) -> None:
        """Let what runs here from now on come after all that the caller has launched."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def running(self) -> contextlib.AbstractContextManager:
        """Return a context in which kernels go to this stream."""
        return torch.cuda.stream(self._stream)

    def hand_over(self, values: Tensor) -> Tensor:
        """Return a tensor made on this stream, ready for the caller's."""
        caller = torch.cuda.current_stream(self.device)
        caller.wait_stream(self._stream)
        values.record_stream(caller)
        return values


_STREAMS: MutableMapping[Any, SideStream] = weakref.WeakKeyDictionary()


def side_stream(model: Any) -> SideStream:
    """Return the stream of a model, which waits for what the caller has launched so far."""
    if model not in _STREAMS:
        _STREAMS[model] = SideStream(model.device)
    _STREAMS[model].after_caller()
    return _STREAMS[model]
