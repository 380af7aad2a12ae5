"""Ways to score the events of an LLM: whole texts, a cache a hypothesis, token trees (see llm_tree.py).
Knows: recorded events, causal LMs, key/value caches. Must not know: how the events came about, times.
"""
from __future__ import annotations

import itertools
import sys
import weakref
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from llm_events import Event  # noqa: E402

from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.lm.graphs import EventGraphs, graphs_of  # noqa: E402
from icefall_fusion.lm.tree_forward import ForwardPlan  # noqa: E402
from icefall_fusion.lm.tree_memory import TreeCache  # noqa: E402

_TOKENS_AT_ONCE = 2048  # of full texts and path caches, as many as the trees' limit


class Way:
    """Scores the events of one batch; counts tokens forwarded and bytes of keys and values."""

    needs_fused = False  # whether it is another way only where a model is fused
    rounds = 1  # before it is timed

    def __init__(self, lm: CausalLm, batch: int) -> None:
        self.lm, self.batch = lm, batch
        self.forwarded = self.forwards = self.kv_bytes = 0
        self.start = [lm.bos_id]

    def prepare(self, event: Event) -> Any:
        """Return what `launch` needs of an event: what a search has at hand costs no time of an event."""
        return event

    def launch(self, prepared: Any) -> Callable[[], Tensor]:
        """Start to score; return what waits for log P of each hypothesis [n], with its end where it ends."""
        scores = self.score(prepared)
        return lambda: scores

    def after(self, event: Event) -> None:
        """Do what follows an event (untimed): clean up, count."""

    def told(self) -> dict[str, Any]:
        """Return what else a row has."""
        return {}

    def score(self, event: Event) -> Tensor:
        raise NotImplementedError

    def targets(self, event: Event) -> list[list[int]]:
        end = [self.lm.eos_id] if event.ends else []
        return [[*path, *end] for path in event.paths]


class FullTexts(Way):
    """Every hypothesis from its first token; no cache."""

    def score(self, event: Event) -> Tensor:
        texts = self.targets(event)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        result = torch.zeros(len(texts))
        while order:
            width = max(1, len(texts[order[-1]]))
            rows = [order.pop() for _ in range(min(len(order), max(1, _TOKENS_AT_ONCE // width)))]
            inputs = torch.zeros(len(rows), width, dtype=torch.int64)
            wanted, seen = torch.zeros_like(inputs), torch.zeros(len(rows), width, dtype=torch.bool)
            for place, row in enumerate(rows):
                tokens, size = texts[row], len(texts[row])
                inputs[place, :size] = torch.tensor([*self.start, *tokens][:size])
                wanted[place, :size], seen[place, :size] = torch.tensor(tokens), True
            self.forwarded += int(seen.sum())
            self.forwards += 1
            device = self.lm.device
            logits = self.lm.model(inputs.to(device), use_cache=False).logits.float()
            picked = logits.log_softmax(-1).gather(2, wanted.to(device).unsqueeze(2))[..., 0]
            result[rows] = picked.masked_fill(~seen.to(device), 0.0).sum(1).cpu()
        return result


class PathCaches(Way):
    """Keys and values of each hypothesis apart; a new beam's rows are copied from those of the old one."""

    def __init__(self, lm: CausalLm, batch: int) -> None:
        super().__init__(lm, batch)
        self.rows: dict[int, list[tuple[tuple[int, ...], int, float]]] = {}  # utterance: path, row, score
        self.cache: Optional[TreeCache] = None
        self.last: Optional[Tensor] = None  # log-probs after the last token of each row

    def score(self, event: Event) -> Tensor:
        source, kept, before = [], [], []
        for utterance, path in zip(event.utterances, event.paths):
            known = self.rows.get(utterance, [])
            common = [_common(path, other) for other, _, _ in known]
            best = max(range(len(known)), key=lambda i: (common[i], -len(known[i][0])), default=-1)
            exact = best >= 0 and common[best] == len(known[best][0])
            source.append(known[best][1] if best >= 0 else -1)
            kept.append(common[best] if best >= 0 else 0)
            before.append(known[best][2] if exact else None)
        return self._forward(event, source, kept, before)

    def _forward(self, event: Event, source: list[int], kept: list[int], before: list) -> Tensor:
        lm, count = self.lm, len(event.paths)
        texts = [[*self.start, *path] for path in event.paths]
        slots = -(-max(map(len, texts)) // 32) * 32
        old = self.cache
        self.cache = TreeCache(lm.layers, count, slots)
        index = torch.tensor([max(0, row) for row in source], device=lm.device)
        if old is not None:
            for mine, other in zip(self.cache.layers, old.layers):
                mine.keys, mine.values = (
                    _to_slots(values.index_select(0, index), slots) for values in (other.keys, other.values)
                )
                mine.is_initialized = True
        # where the last token's distribution is not at hand, that token goes through the model again
        begin = [1 + size if prior is not None else max(0, size) for size, prior in zip(kept, before)]
        begin = [0 if row < 0 else place for row, place in zip(source, begin)]
        scores = torch.zeros(count, dtype=torch.float64)
        last = None if self.last is None else self.last.index_select(0, index)
        fresh = torch.zeros(count, lm.vocab_size, device=lm.device)
        for start in range(0, count, max(1, _TOKENS_AT_ONCE // slots)):
            rows = range(start, min(count, start + max(1, _TOKENS_AT_ONCE // slots)))
            self._rows(event, rows, texts, begin, kept, before, last, fresh, scores)
        self.last, self.rows = fresh, {}
        for row, (utterance, path) in enumerate(zip(event.utterances, event.paths)):
            self.rows.setdefault(utterance, []).append((path, row, float(scores[row])))
        self.kv_bytes = max(self.kv_bytes, self.cache.kv_bytes + (old.kv_bytes if old is not None else 0))
        if event.ends:
            scores = scores + fresh[:, lm.eos_id].double().cpu()
        return scores.float()

    def _rows(self, event, rows, texts, begin, kept, before, last, fresh, scores) -> None:
        """Forward the new tokens of some rows; add to their scores, keep their last distributions."""
        lm, cache = self.lm, self.cache
        parts = [texts[row][begin[row] :] for row in rows]
        width = max(map(len, parts))
        for row in rows:
            if not texts[row][begin[row] :]:
                fresh[row], scores[row] = last[row], before[row]
        if not width:
            return
        device, size = lm.device, len(parts)
        tokens, positions = (torch.zeros(size, width, dtype=torch.int64) for _ in range(2))
        valid, cells = [], []
        for place, (row, part) in enumerate(zip(rows, parts)):
            tokens[place, : len(part)] = torch.tensor(part)
            positions[place, : len(part)] = torch.arange(begin[row], begin[row] + len(part))
            valid += [place * width + i for i in range(len(part))]
            cells += [row * cache.slots + begin[row] + i for i in range(len(part))]
        self.forwarded += len(valid)
        self.forwards += 1
        mask = torch.arange(cache.slots) <= positions.unsqueeze(2)  # [R, W, S]
        cells, some, valid, nothing = (
            torch.tensor(x, dtype=torch.int64, device=device) for x in (cells, list(rows), valid, [])
        )
        cache.plan = ForwardPlan(cells, some, valid, nothing, cache.slots, False)
        logits = lm.model(
            input_ids=tokens.to(device), position_ids=positions.to(device), past_key_values=cache,
            use_cache=True, attention_mask=mask.unsqueeze(1).to(device),
        ).logits
        log_probs = logits.float().log_softmax(-1)
        for place, (row, part) in enumerate(zip(rows, parts)):
            if not part:
                continue
            path, first = event.paths[row], begin[row]
            known, total = (kept[row], before[row]) if before[row] is not None else (first, None)
            if total is None:  # the score of what was kept is not at hand: sum it up again
                total = self._prefix_score(event.utterances[row], path[:first]) if first else 0.0
                known = first
            following = torch.tensor(path[known:], dtype=torch.int64, device=device)
            at = log_probs[place, : len(part)]
            source = at if first == known else torch.cat([last[row].unsqueeze(0), at])
            total += float(source[: len(following)].gather(1, following.unsqueeze(1)).double().sum())
            scores[row], fresh[row] = total, at[-1]

    def _prefix_score(self, utterance: int, path: tuple[int, ...]) -> float:
        """Return log P of a beginning, by a forward of its own (rare: a word was tokenized anew)."""
        self.forwarded += len(path)
        self.forwards += 1
        inputs = torch.tensor([[*self.start, *path]], device=self.lm.device)
        log_probs = self.lm.model(inputs[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        return float(log_probs.gather(1, inputs[0, 1:, None]).double().sum())


class LazyTree(Way):
    """Ours, as it is by default."""

    eager = False
    rounds = 2  # with graphs a size is run, then captured, then replayed

    def __init__(self, lm: CausalLm, batch: int) -> None:
        super().__init__(lm, batch)
        self.tree = lm.open_tree(batch)

    def prepare(self, event: Event) -> tuple[Tensor, bool]:
        return self._nodes(event.utterances, event.paths), event.ends

    def launch(self, prepared: tuple[Tensor, bool]) -> Callable[[], Tensor]:
        nodes, ends = prepared
        if self.eager:
            self.tree.known(nodes)  # brings new nodes into the tree's arrays
            self.tree.next_log_probs(torch.from_numpy(self.tree.tree.unscored(nodes.numpy())))
        return self.tree.launch(nodes, eos=ends)

    def after(self, event: Event) -> None:
        if event.kept is not None:
            self.tree.keep(self._nodes(*event.kept))
        stats = self.tree.stats()
        self.forwarded, self.forwards = int(stats["lm_tokens_forwarded"]), int(stats["lm_forwards"])
        self.kv_bytes = int(stats["kv_bytes_peak"])

    def told(self) -> dict[str, Any]:
        graphs = getattr(self, "graphs", self.lm.fused and self.lm.fused.graphs)
        return {"graphs": graphs.captured, "graphs_failed": graphs.failure} if graphs else {"graphs": 0}

    def _nodes(self, utterances: Sequence[int], paths: Sequence[Sequence[int]]) -> Tensor:
        roots = [self.tree.root(utterance) for utterance in utterances]
        return torch.tensor([self.tree.insert(root, path) for root, path in zip(roots, paths)])


class EagerTree(LazyTree):
    eager = True


class UnfusedTree(LazyTree):
    """Ours without fused kernels: layers as transformers runs them."""

    needs_fused = True
    graphs = None

    def launch(self, prepared: tuple[Tensor, bool]) -> Callable[[], Tensor]:
        fused, self.lm.fused = self.lm.fused, None
        try:
            return super().launch(prepared)
        finally:
            self.lm.fused = fused


class LaunchesTree(LazyTree):
    """Ours with fused kernels, each launched by itself, and all products by cuBLAS."""

    needs_fused = True
    graphs: Optional[EventGraphs] = None

    def launch(self, prepared: tuple[Tensor, bool]) -> Callable[[], Tensor]:
        fused = self.lm.fused
        before = fused.graphs, fused.products.on
        fused.graphs, fused.products.on = self.graphs, False
        try:
            return super().launch(prepared)
        finally:
            fused.graphs, fused.products.on = before


class CublasTree(LaunchesTree):
    """Ours with events of usual sizes as CUDA graphs, all products by cuBLAS."""

    _graphs: weakref.WeakKeyDictionary[Any, EventGraphs] = weakref.WeakKeyDictionary()  # by fused model

    def __init__(self, lm: CausalLm, batch: int) -> None:
        super().__init__(lm, batch)
        if lm.fused not in self._graphs:
            self._graphs[lm.fused] = graphs_of(lm.fused)
        self.graphs = self._graphs[lm.fused]


WAYS: dict[str, type[Way]] = {
    "full texts": FullTexts, "path caches": PathCaches, "eager tree": EagerTree,
    "lazy, unfused": UnfusedTree, "lazy, launches": LaunchesTree,
    "lazy, cublas": CublasTree, "lazy tree": LazyTree,
}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _to_slots(values: Tensor, slots: int) -> Tensor:
    if values.shape[1] >= slots:
        return values[:, :slots].contiguous()
    longer = values.new_zeros(values.shape[0], slots, *values.shape[2:])
    longer[:, : values.shape[1]] = values
    return longer
