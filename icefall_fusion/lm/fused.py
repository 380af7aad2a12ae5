"""Decoder layers of the Llama family by few kernels: one kernel between two matrix products.
Knows: modules of such models, an event's tensors. Must not know: trees, search.

A layer as transformers runs it is some fifty operations, each a launch that the host has to make. Here it is
nine: four matrix products and five kernels. Keys and values are read where they lie, not gathered first.
"""
from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any, Callable, Optional, Sequence

import torch
from torch import Tensor, nn

from icefall_fusion.common.devices import load_kernels
from icefall_fusion.lm.products import Products, Shape

if TYPE_CHECKING:
    from icefall_fusion.lm.fused_event import EventInputs
    from icefall_fusion.lm.graphs import EventGraphs
    from icefall_fusion.lm.tree_memory import TreeCache

KERNELS = "icefall_fusion.lm.fused_kernels"
LONGEST_ROW = 8192  # entries of a row in a norm, that one program holds
_BLOCK = 1024  # of the gates
LEAST = 16  # sides of a block of matrix units


def _on_its_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method of a fused model with the model's GPU as the current one, where Triton launches."""

    @functools.wraps(method)
    def run(self: FusedModel, *arguments: Any) -> Any:
        with torch.cuda.device_of(self.model.model.embed_tokens.weight):
            return method(self, *arguments)

    return run


class FusedModel:
    """A model's own weights, run by fused kernels.

    Weights of products with the same input are laid one after the other; the model's own parameters become
    views of them, so that nothing is held twice and the model itself still runs.

    Args:
        model: one that `check_fusible` has nothing against.

    Attributes:
        products: runs the matrix products.
        graphs: replays events of usual sizes; None: each kernel is launched by itself.
    """

    def __init__(self, model: Any) -> None:
        self._kernels = load_kernels(KERNELS)
        self.model = model
        config = model.config
        first = model.model.layers[0].self_attn
        self.head_size, self.heads = int(first.head_dim), int(config.num_attention_heads)
        self.key_heads = int(config.num_key_value_heads)
        self.epsilon, self.hidden = float(config.rms_norm_eps), int(config.hidden_size)
        self.inner = int(config.intermediate_size)
        self._mixed = [
            (
                _join([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                _join([layer.mlp.gate_proj, layer.mlp.up_proj]),
            )
            for layer in model.model.layers
        ]
        mine = weakref.proxy(self)  # a circle would keep all weights until a collection
        self.products = Products(lambda mixed: mine._gate(mixed))
        self.graphs: Optional[EventGraphs] = None
        self._types = list(getattr(config, "layer_types", None) or [])
        if next(model.parameters()).is_cuda:
            torch.cuda.empty_cache()  # the weights before they were joined

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.model.embed_tokens.weight.device

    def allocate(self, cache: TreeCache) -> None:
        """Make a cache's buffers, unless they are there."""
        if cache.layers[0].is_initialized:
            return
        shape = self.model.model.embed_tokens.weight.new_empty(1, self.key_heads, 0, self.head_size)
        for layer in cache.layers:
            layer.lazy_initialization(shape, shape)

    @_on_its_device
    def logits(self, event: EventInputs) -> Tensor:
        """Return logits [A, V] after the wanted tokens of an event; writes keys and values of all tokens."""
        inside = self.model.model
        hidden = inside.embed_tokens(event.tokens).clone()
        cosines, sines = (x[0].contiguous() for x in inside.rotary_emb(hidden[None], event.positions[None]))
        layers, products = inside.layers, self.products
        norms = [layer.input_layernorm for layer in layers[1:]] + [inside.norm]
        rows = self._norm(hidden, None, layers[0].input_layernorm.weight)
        for number, (layer, after) in enumerate(zip(layers, norms)):
            (weights, biases), (gate_weights, gate_biases) = self._mixed[number]
            mixed = products.plain("heads", rows, weights, biases)
            looked = self._attend(mixed, cosines, sines, event, number)
            output, down = layer.self_attn.o_proj, layer.mlp.down_proj
            more = products.plain("output", looked, output.weight, output.bias)
            rows = self._norm(hidden, more, layer.post_attention_layernorm.weight)
            opened = products.gated("gates", rows, gate_weights, gate_biases)
            rows = self._norm(hidden, products.plain("down", opened, down.weight, down.bias), after.weight)
        last = self.model.lm_head
        return products.plain("last", rows[event.wanted], last.weight, last.bias)

    def _slides(self, number: int) -> bool:
        return not self._types or self._types[number] == "sliding_attention"

    def shapes(self) -> dict[str, tuple[Shape, list[Tensor]]]:
        """Return by name the shape of each product and its weights in some layers."""
        layers, last = self.model.model.layers[:8], self.model.lm_head.weight
        size, inner, heads = self.hidden, self.inner, self.heads * self.head_size
        mixed = heads + 2 * self.key_heads * self.head_size
        return {
            "gates": (Shape(inner, size, gated=True), [pair[1][0] for pair in self._mixed[:8]]),
            "down": (Shape(size, inner, parts=True), [layer.mlp.down_proj.weight for layer in layers]),
            "heads": (Shape(mixed, size, parts=True), [pair[0][0] for pair in self._mixed[:8]]),
            "output": (Shape(size, heads, parts=True), [layer.self_attn.o_proj.weight for layer in layers]),
            "last": (Shape(len(last), size), [last]),
        }

    def _norm(self, hidden: Tensor, more: Optional[Tensor], weight: Tensor) -> Tensor:
        """Add to ``hidden`` [T, hidden] in place and return its norm."""
        out = torch.empty_like(hidden)
        self._kernels.add_and_norm[(len(hidden),)](
            hidden, hidden if more is None else more, weight, out, self.hidden, self.epsilon,
            ADD=_parts(more), BLOCK=_power(self.hidden), num_warps=8 if self.hidden > 2048 else 4,
        )
        return out

    def _gate(self, mixed: Tensor) -> Tensor:
        out = mixed.new_empty(len(mixed), self.inner)
        grid = (len(mixed), -(-self.inner // _BLOCK))
        self._kernels.silu_and_multiply[grid](mixed, out, self.inner, BLOCK=_BLOCK)
        return out

    def _attend(
        self, mixed: Tensor, cosines: Tensor, sines: Tensor, event: EventInputs, number: int
    ) -> Tensor:
        """Write keys and values of new tokens into the cache and return the attention of all tokens."""
        attention, size = self.model.model.layers[number].self_attn, self.head_size
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        normed = query_norm is not None
        queries = cosines.new_empty(len(cosines), self.heads * size)
        self._kernels.rotate_and_store[(len(queries),)](
            mixed, cosines, sines, query_norm.weight if normed else None, key_norm.weight if normed else None,
            event.cells, event.places, queries, number, self.epsilon,
            PARTS=_parts(mixed), NORM=normed, Q=self.heads, H=self.key_heads, D=size,
            HEADS=_power(self.heads + 2 * self.key_heads), DP=_power(size), num_warps=8,
        )
        return self.look(queries, event, number, attention.scaling)

    def look(self, queries: Tensor, event: EventInputs, number: int, scale: float) -> Tensor:
        """Return the attention of queries [P, heads * size] over the slots of their utterances."""
        groups = self.heads // self.key_heads
        seen = event.seen if event.near is None or not self._slides(number) else event.near
        out = torch.empty_like(queries)  # of padding nothing is written, and no token reads that
        lines = self.lines(event.width, out.dtype)
        grid = (len(event.rows), self.key_heads, -(-event.width * groups // lines))
        self._kernels.attend[grid](
            queries, event.places, event.rows, seen, out, scale, seen.shape[1], number,
            H=self.key_heads, G=groups, D=self.head_size, DP=max(LEAST, _power(self.head_size)), M=lines,
            N=32 if out.dtype == torch.float32 else 64, num_warps=4, num_stages=2,
        )
        return out

    def lines(self, width: int, dtype: torch.dtype) -> int:
        """Return how many queries a program has, heads of a group and tokens of an utterance."""
        most = 64 if self.head_size == _power(self.head_size) else 32  # more would not fit into registers
        most = LEAST if dtype == torch.float32 else most
        return max(LEAST, min(most, _power(width * (self.heads // self.key_heads))))


def _join(parts: Sequence[nn.Linear]) -> tuple[Tensor, Optional[Tensor]]:
    """Return weights and biases of linear layers one after the other; their own become views of them."""
    weights = torch.cat([part.weight.data for part in parts])
    biases = None
    if any(part.bias is not None for part in parts):
        none = [weights.new_zeros(part.out_features) for part in parts]
        biases = torch.cat([x if part.bias is None else part.bias.data for part, x in zip(parts, none)])
    begin = 0
    for part in parts:
        end = begin + part.out_features
        part.weight.data = weights[begin:end]
        if part.bias is not None:
            part.bias.data = biases[begin:end]
        begin = end
    return weights, biases


def _parts(values: Optional[Tensor]) -> int:
    """Return in how many parts values [parts, T, n] or [T, n] come; none: 0."""
    return 0 if values is None else 1 if values.dim() == 2 else len(values)


def _power(size: int) -> int:
    """Return the power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()
