"""Matrix products of a decoder layer: the form of each that is the fastest on this GPU, by clock.
Knows: weights, shapes, forms of kernels. Must not know: which model it is, attention, trees.

A product has few rows (the tokens of an event) and many columns. Its tiles are fewer than two or three times
the multiprocessors, so that the last wave is half empty and cuBLAS is far from its rate. `Products` times
other forms against it and keeps the fastest that gives the same numbers. Untimed products go by cuBLAS.
Never run on a GPU yet.
"""
from __future__ import annotations

import functools
import logging
import time
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_fusion.common.devices import load_kernels
from icefall_fusion.common.unavailable import Unavailable

MATMUL = "icefall_fusion.lm.fused_matmul"
DEPTH = 64  # entries of a row in one step
_LEAST_WEIGHTS = 2**23  # smaller products take less time than their launches
_CANDIDATES = 5  # of each product, the best by count
_ROUNDS = 8
Gate = Callable[[Tensor], Tensor]


class Form(NamedTuple):
    """Tile of a product: rows, rows of a second block, columns, warps, stages; in how many parts its sums are
    made; whether gates are in the same kernel (then a tile has twice the columns).
    """

    rows: int
    more: int
    columns: int
    warps: int
    stages: int
    split: int = 1
    gated: bool = False


#: Without spills on sm_90 (tests/lm/test_products.py). A tall tile has all rows of an event: the fewer tiles
#: share weights, the more bytes must come from the cache, which limits products of this size.
FORMS = (
    Form(256, 64, 128, 8, 3), Form(128, 64, 256, 8, 3), Form(256, 128, 128, 8, 3), Form(128, 64, 128, 8, 4),
    Form(128, 0, 256, 8, 4), Form(256, 0, 128, 8, 4), Form(128, 0, 128, 8, 4), Form(64, 0, 256, 4, 4),
    Form(64, 0, 128, 4, 4),
)
GATED_FORMS = (
    Form(128, 0, 128, 8, 4, 1, True), Form(64, 0, 128, 4, 4, 1, True), Form(256, 0, 64, 8, 4, 1, True),
)
SPLITS = (1, 2, 3, 4, 6, 8)


class Machine(NamedTuple):
    """Rates of a GPU: multiprocessors, operations a second, bytes a second from memory and from its cache.

    Those of an H200; that of its cache is an estimate from what kernels without clusters reach.
    """

    processors: int = 132
    operations: float = 780e12
    memory: float = 4.3e12
    cache: float = 7.5e12


class Shape(NamedTuple):
    """A product: width columns of the result, size entries of a sum; gated: two of them and a gate.

    Args:
        parts: its result may come in parts, as the next kernel adds.
    """

    width: int
    size: int
    gated: bool = False
    parts: bool = False

    @property
    def weights(self) -> int:
        """Entries of the weights."""
        return self.width * self.size * (2 if self.gated else 1)

    def floor(self, rows: int, machine: Machine) -> float:
        """Return the least seconds for so many rows: operations, or weights read once."""
        return max(2 * rows * self.weights / machine.operations, 2 * self.weights / machine.memory)

    def predict(self, rows: int, form: Form, machine: Machine) -> Prediction:
        """Return what a form needs for so many rows of 16-bit numbers, one program a multiprocessor."""
        pair, width = (2, self.width) if form.gated else (1, self.weights // self.size)
        high = form.rows + form.more
        tiles = _over(rows, high) * _over(width, form.columns) * form.split
        steps = _over(_over(self.size, DEPTH), form.split) * DEPTH
        waves = _over(tiles, machine.processors)
        work = waves * machine.processors * 2 * high * form.columns * pair * steps / machine.operations
        fetched = tiles * (high + pair * form.columns) * steps * 2
        whole = 2 * self.weights + 2 * rows * (self.size + self.width)
        after = 8 * form.split * rows * width if form.split > 1 else 0  # parts, written and read
        if self.gated and not form.gated:
            after += 6 * rows * self.width
        seconds = max(work, fetched / machine.cache, whole / machine.memory) + after / machine.cache
        return Prediction(form, tiles, waves, fetched + after, seconds)

    def candidates(self, rows: int, machine: Machine) -> list[Prediction]:
        """Return predictions of all forms, the fastest first."""
        forms = [form._replace(split=n) for form in FORMS for n in (SPLITS if self.parts else (1,))]
        forms += GATED_FORMS if self.gated else ()
        found = [self.predict(rows, form, machine) for form in forms]
        return sorted(found, key=lambda each: each.seconds)

    @property
    def serves(self) -> bool:
        """Return whether the copy engine can fetch its rows: a multiple of 16 bytes each."""
        return self.width % 8 == 0 and self.size % 8 == 0


class Prediction(NamedTuple):
    """A form's tiles, waves of them, bytes that tiles fetch (and parts), and seconds by these numbers."""

    form: Form
    tiles: int
    waves: int
    bytes: int
    seconds: float


class Products:
    """Products by the form that was chosen for their name and number of rows; else by cuBLAS.

    Args:
        gate: makes ``silu(gate) * other`` of gates and others [T, 2 * width].

    Attributes:
        chosen: forms by name and rows.
        told: what was timed, a row each: name, rows, form (None: cuBLAS), seconds, predicted seconds.
        on: whether forms are used at all.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self.chosen: dict[tuple[str, int], Form] = {}
        self.told: list[dict[str, Any]] = []
        self.on = True

    def plain(self, name: str, rows: Tensor, weights: Tensor, biases: Optional[Tensor] = None) -> Tensor:
        """Return ``rows @ weights.T + biases`` [T, width]; or [parts, T, width] float32, to be added up."""
        form = self.chosen.get((name, len(rows))) if self.on and biases is None else None
        return F.linear(rows, weights, biases) if form is None else multiply(rows, weights, form)

    def gated(self, name: str, rows: Tensor, weights: Tensor, biases: Optional[Tensor] = None) -> Tensor:
        """Return ``silu(gate) * other`` [T, width] of two products by weights [2 * width, size]."""
        form = self.chosen.get((name, len(rows))) if self.on and biases is None else None
        return self._gated(rows, weights, biases, form)

    def _gated(self, rows: Tensor, weights: Tensor, biases: Optional[Tensor], form: Optional[Form]) -> Tensor:
        if form is not None and form.gated:
            return multiply(rows, weights, form)
        return self._gate(F.linear(rows, weights, biases) if form is None else multiply(rows, weights, form))

    @torch.inference_mode()
    def tune(
        self,
        weights: Mapping[str, tuple[Shape, Sequence[Tensor]]],
        counts: Sequence[int],
        budget: float,
        clock: Callable[[Sequence[Callable[[], Any]]], float],
        least: int = _LEAST_WEIGHTS,
    ) -> None:
        """Time forms of each product against cuBLAS and keep the fastest; stop when the budget is spent.

        Args:
            weights: by name of a product, its shape and the weights of some layers: taking turns they come
                from memory, as in a forward, not from the cache.
            counts: numbers of rows, the usual ones first.
            budget: seconds, compilation included.
            clock: seconds of a call, on average over several.
            least: entries of the weights of products worth it.
        """
        try:
            load_kernels(MATMUL)
        except Unavailable as reason:
            logging.warning("all products go by cuBLAS: %s", reason)
            return
        begun, broken = time.perf_counter(), set()
        for count in counts:
            for name, (shape, layers) in weights.items():
                half = layers[0].dtype in (torch.bfloat16, torch.float16)
                if shape.weights < least or not half or not shape.serves:
                    continue
                rows = _random(count, shape.size, layers[0])
                best = self._time(name, shape, rows, layers, None, clock)
                for found in shape.candidates(count, Machine())[:_CANDIDATES]:
                    if time.perf_counter() - begun > budget:
                        message = "products of more than %d tokens go by cuBLAS: %.1f s of trials are enough"
                        logging.info(message, count, budget)
                        return
                    if (shape, found.form) in broken:
                        continue
                    try:
                        seconds = self._time(name, shape, rows, layers, found, clock)
                    except torch.OutOfMemoryError:
                        raise
                    except Exception:  # compilers and drivers raise anything
                        broken.add((shape, found.form))
                        message = "product %s as %s fails, so it goes another way"
                        logging.warning(message, name, found.form, exc_info=True)
                        continue
                    if seconds < best:
                        best, self.chosen[name, count] = seconds, found.form

    def _time(
        self, name: str, shape: Shape, rows: Tensor, layers: Sequence[Tensor], found: Optional[Prediction],
        clock: Callable[[Sequence[Callable[[], Any]]], float],
    ) -> float:
        """Return the seconds of a product by a form, or by cuBLAS, and note them; refuse wrong numbers."""
        form = None if found is None else found.form

        def run(weights: Tensor) -> Tensor:
            if shape.gated:
                return self._gated(rows, weights, None, form)
            return F.linear(rows, weights) if form is None else multiply(rows, weights, form)

        if form is not None:
            wanted = F.linear(rows, layers[0])
            check_close(run(layers[0]), self._gate(wanted) if shape.gated else wanted)
        turns = [layers[i % len(layers)] for i in range(_ROUNDS)]
        seconds = clock([functools.partial(run, each) for each in turns])
        self.told.append({
            "product": name, "rows": len(rows), "form": None if form is None else list(form),
            "seconds": seconds, "predicted": None if found is None else found.seconds,
            "floor": shape.floor(len(rows), Machine()),
        })
        return seconds


def multiply(rows: Tensor, weights: Tensor, form: Form) -> Tensor:
    """Return the product [T, width] by a form; of a split one its parts [split, T, width] float32."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    count, size = rows.shape
    width = len(weights) // (2 if form.gated else 1)
    kind = rows.dtype if form.split == 1 else torch.float32
    out = rows.new_empty(form.split, count, width, dtype=kind)
    grid = (_over(count, form.rows + form.more) * _over(width, form.columns), form.split)

    def described(tensor: Tensor, *block: int) -> Optional[TensorDescriptor]:
        return TensorDescriptor.from_tensor(tensor, list(block)) if all(block) else None

    load_kernels(MATMUL).multiply[grid](
        described(rows, form.rows, DEPTH), described(rows, form.more, DEPTH),
        described(weights, form.columns, DEPTH), described(out, 1, form.rows, form.columns),
        described(out, 1, form.more, form.columns), count, width, size,
        GATED=form.gated, M=form.rows, MORE=form.more, N=form.columns, K=DEPTH,
        num_warps=form.warps, num_stages=form.stages,
    )
    return out[0] if form.split == 1 else out


def check_close(found: Tensor, wanted: Tensor) -> None:
    """Raise ValueError unless a product [T, width], or its parts, is as near as its type's rounding allows.

    Both round once to 8 bits (bfloat16), and cuBLAS may round parts of its sums, too.
    """
    total = (found.sum(0) if found.dim() == 3 else found).float()
    wanted = wanted.float()
    allowed = 2.0**-6 * (wanted.abs() + wanted.square().mean().sqrt())
    worst = ((total - wanted).abs() / allowed).max()
    if not worst <= 1:  # nan too
        raise ValueError(f"the product is {float(worst):.3g} times as far off as rounding allows")


def gpu_clock(calls: Sequence[Callable[[], Any]]) -> float:
    """Return the seconds of a call on the current GPU, on average; the host's time is hidden by a sleep."""
    calls[0]()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)  # cycles, some 2 ms
    first.record()
    for call in calls:
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / len(calls)


def _random(count: int, size: int, like: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(1)
    return torch.randn(count, size, device=like.device, generator=generator).to(like.dtype)


def _over(count: int, size: int) -> int:
    return -(-count // size)
