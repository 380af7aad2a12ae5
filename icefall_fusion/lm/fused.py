"""Decoder layers of the Llama family by few kernels: one kernel between two matrix products.
Knows: modules of such models, a cache of keys and values with its plan. Must not know: trees, search.

A layer as transformers runs it is some fifty operations, each a launch that the host has to make. Here it is
nine: four matrix products and five kernels. Keys and values are read where they lie, not gathered first.
"""
from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Callable, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_fusion.common.devices import kernels_run_on, load_kernels
from icefall_fusion.common.unavailable import Unavailable

if TYPE_CHECKING:
    from icefall_fusion.lm.tree_memory import TreeCache

#: Classes of transformers whose layers are these: RMS norm, rotary positions, gated SiLU.
FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_KERNELS = "icefall_fusion.lm.fused_kernels"
_MOST = 8192  # entries of a row in a norm, that one program holds
_BLOCK = 1024  # of the gates
_LEAST = 16  # sides of a block of matrix units


def check_fusible(model: Any) -> None:
    """Refuse a model of transformers that cannot run by these kernels.

    Raises:
        Unavailable: with the reason.
    """
    name = type(model).__name__
    if name not in FAMILY or not type(model).__module__.startswith("transformers."):
        raise Unavailable(f"{name} is none of {', '.join(FAMILY)}")
    config = model.config
    if config.hidden_act != "silu":
        raise Unavailable(f"its activation is {config.hidden_act}")
    if config.hidden_size > _MOST:
        raise Unavailable(f"its hidden size is above {_MOST}")
    devices = {parameter.device for parameter in model.parameters()}
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(devices) > 1 or len(kinds) > 1 or kinds - {torch.float32, torch.float16, torch.bfloat16}:
        raise Unavailable("its weights lie on several devices, or have several or other types")
    if not kernels_run_on(next(iter(devices))):
        raise Unavailable("it is not on a GPU")
    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj,
                 mlp.up_proj, mlp.down_proj)
        for part in parts:
            if type(part) is not nn.Linear or type(part.weight) is not nn.Parameter:
                raise Unavailable(f"its layers are quantized or have adapters ({type(part).__name__})")
        size, rows = attention.head_dim, (config.num_attention_heads, *2 * [config.num_key_value_heads])
        shapes = [tuple(part.weight.shape) for part in parts[:3]]
        if size % 2 or shapes != [(count * size, config.hidden_size) for count in rows]:
            raise Unavailable(f"its heads have {size} entries and weights of {shapes}")
    if 2 * model.model.rotary_emb.inv_freq.numel() != model.model.layers[0].self_attn.head_dim:
        raise Unavailable("only some dimensions of each head have rotary positions")
    load_kernels(_KERNELS)


def _on_its_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method of a fused model with the model's GPU as the current one, where Triton launches."""

    @functools.wraps(method)
    def run(self: FusedModel, *arguments: Any) -> Any:
        with torch.cuda.device_of(self._model.model.embed_tokens.weight):
            return method(self, *arguments)

    return run


class FusedModel:
    """A model's own weights, run by fused kernels.

    Weights of products with the same input are laid one after the other; the model's own parameters become
    views of them, so that nothing is held twice and the model itself still runs.

    Args:
        model: one that `check_fusible` has nothing against.
    """

    def __init__(self, model: Any) -> None:
        self._kernels = load_kernels(_KERNELS)
        self._model = model
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
        self._types = list(getattr(config, "layer_types", None) or [])
        if next(model.parameters()).is_cuda:
            torch.cuda.empty_cache()  # the weights before they were joined

    @_on_its_device
    def try_kernels(self) -> None:
        """Compare every form of attention that an event can need with plain arithmetic on random numbers.

        What compiles is also ready then.

        Raises:
            RuntimeError: a form is off.
        """
        like = self._model.model.embed_tokens.weight
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(like)

        groups, slots = self.heads // self.key_heads, 160
        for lines in (_LEAST, 32, 64):
            width = max(1, lines // groups)
            if self._lines(width, like.dtype) != lines:
                continue
            counts = [width, max(1, width - 1), 1]  # tokens of three utterances
            places = [u * width + w for u, count in enumerate(counts) for w in range(count)][::-1]
            padded = torch.zeros(3 * width, dtype=torch.int64)
            padded[places] = torch.arange(len(places))
            valid, padded = torch.tensor(places).to(like.device), padded.to(like.device)
            queries = random(len(places), self.heads * self.head_size)
            mask = torch.rand(3, 1, width, slots, generator=generator) < 0.3
            mask[..., 0] = True
            mask = mask.to(like.device)
            for utterances in (None, torch.tensor([3, 0, 2], device=like.device)):
                size = (3 if utterances is None else 4, slots + 40, self.key_heads, self.head_size)
                keys, values = random(*size), random(*size)
                output = self._look(queries, keys, values, mask, utterances, padded, valid, 0.2).float()
                rows = slice(3) if utterances is None else utterances
                key, value = (x[rows, :slots].float() for x in (keys, values))  # [R, S, H, D]
                query = queries.float()[padded].view(3, width, self.key_heads, groups, self.head_size)
                scores = 0.2 * torch.einsum("rwhgd,rshd->rwhgs", query, key)
                shares = scores.masked_fill(~mask.view(3, width, 1, 1, slots), -torch.inf).softmax(-1)
                wanted = torch.einsum("rwhgs,rshd->rwhgd", shares, value).reshape(3 * width, -1)[valid]
                worst = float((output - wanted).abs().max())
                if not worst < (1e-3 if like.dtype == torch.float32 else 5e-2):  # nan too
                    raise RuntimeError(f"attention of {lines} queries at once is {worst:.3g} off")

    @_on_its_device
    def logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        window_mask: Optional[Tensor],
        cache: TreeCache,
        wanted: Tensor,
    ) -> Tensor:
        """Return logits [n, V], as `CausalLm.tree_logits` does.

        Args:
            tokens, positions: [T] ids and depths, padding at the end.
            mask: [R, 1, W, S] bool, True where a token sees a slot.
            window_mask: the same for layers with a sliding window; None: as ``mask``.
            cache: keys and values by slot, with its plan set.
            wanted: [n] index into the tokens.
        """
        inside = self._model.model
        hidden = inside.embed_tokens(tokens).clone()
        cosines, sines = (x[0].contiguous() for x in inside.rotary_emb(hidden[None], positions[None]))
        layers = inside.layers
        norms = [layer.input_layernorm for layer in layers[1:]] + [inside.norm]
        rows = self._norm(hidden, None, layers[0].input_layernorm.weight)
        for number, (layer, after) in enumerate(zip(layers, norms)):
            here = mask if window_mask is None or not self._slides(number) else window_mask
            (weights, biases), (gate_weights, gate_biases) = self._mixed[number]
            mixed = F.linear(rows, weights, biases)
            looked = self._attend(mixed, cosines, sines, here, cache, number)
            rows = self._norm(hidden, layer.self_attn.o_proj(looked), layer.post_attention_layernorm.weight)
            opened = self._gate(F.linear(rows, gate_weights, gate_biases))
            rows = self._norm(hidden, layer.mlp.down_proj(opened), after.weight)
        return self._model.lm_head(rows[wanted])

    def _slides(self, number: int) -> bool:
        return not self._types or self._types[number] == "sliding_attention"

    def _norm(self, hidden: Tensor, more: Optional[Tensor], weight: Tensor) -> Tensor:
        """Add to ``hidden`` [T, hidden] in place and return its norm."""
        out = torch.empty_like(hidden)
        self._kernels.add_and_norm[(len(hidden),)](
            hidden, hidden if more is None else more, weight, out, self.hidden, self.epsilon,
            ADD=more is not None, BLOCK=_power(self.hidden), num_warps=8 if self.hidden > 2048 else 4,
        )
        return out

    def _gate(self, mixed: Tensor) -> Tensor:
        out = mixed.new_empty(len(mixed), self.inner)
        grid = (len(mixed), -(-self.inner // _BLOCK))
        self._kernels.silu_and_multiply[grid](mixed, out, self.inner, BLOCK=_BLOCK)
        return out

    def _attend(
        self, mixed: Tensor, cosines: Tensor, sines: Tensor, mask: Tensor, cache: TreeCache, number: int
    ) -> Tensor:
        """Write keys and values of new tokens into the cache and return the attention of all tokens."""
        layer, size = cache.layers[number], self.head_size
        attention = self._model.model.layers[number].self_attn
        cells, utterances, valid, padded = cache.plan.on(mixed.device)
        query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        normed = query_norm is not None
        if not layer.is_initialized:
            shape = mixed.new_empty(1, self.key_heads, 0, size)
            layer.lazy_initialization(shape, shape)
        queries = mixed.new_empty(len(mixed), self.heads * size)
        self._kernels.rotate_and_store[(len(mixed),)](
            mixed, cosines, sines, query_norm.weight if normed else None, key_norm.weight if normed else None,
            cells, queries, layer.keys, layer.values, len(cells), self.epsilon,
            NORM=normed, Q=self.heads, H=self.key_heads, D=size,
            HEADS=_power(self.heads + 2 * self.key_heads), DP=_power(size), num_warps=8,
        )
        return self._look(
            queries, layer.keys, layer.values, mask, utterances, padded, valid, attention.scaling
        )

    def _look(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, utterances: Optional[Tensor],
        padded: Tensor, valid: Tensor, scale: float,
    ) -> Tensor:
        """Return the attention of queries [T, heads * size] over the slots of their utterances."""
        rows, _, width, slots = mask.shape
        groups = self.heads // self.key_heads
        out = torch.empty_like(queries)  # of padding nothing is written, and no token reads that
        lines = self._lines(width, out.dtype)
        grid = (rows, self.key_heads, -(-width * groups // lines))
        self._kernels.attend[grid](
            queries, keys, values, mask.view(torch.uint8), utterances, padded, valid, out,
            scale, width, slots, keys.shape[1],
            EVERYONE=utterances is None, H=self.key_heads, G=groups, D=self.head_size,
            DP=max(_LEAST, _power(self.head_size)), M=lines, N=32 if out.dtype == torch.float32 else 64,
            num_warps=4, num_stages=2,
        )
        return out

    def _lines(self, width: int, dtype: torch.dtype) -> int:
        """Return how many queries a program has, heads of a group and tokens of an utterance."""
        most = _LEAST if dtype == torch.float32 else 64  # registers hold half as many numbers of that
        return max(_LEAST, min(most, _power(width * (self.heads // self.key_heads))))


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


def _power(size: int) -> int:
    """Return the power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()
