"""The LLM's side of delayed fusion: ways to score the events of a real decode, at model sizes up to 7B.
Knows: recorded events, causal LMs, key/value caches. Must not know: how the events came about.

    OMP_NUM_THREADS=1 python tools/bench/llm_tree.py                          # the shipped LLM, on a CPU
    python tools/bench/llm_tree.py --device cuda --dtype bfloat16 --models minibooks open-llama-3b mistral-7b

A decode of speech by delayed fusion with the shipped models (interval 16, beam 10) is recorded: at each event
the tokens of every hypothesis. Then each model scores the same events

    full texts    every hypothesis again from its first token, in padded batches;
    path caches   keys and values of each hypothesis apart, re-ordered by copying when the beam changes;
    eager tree    one tree an utterance, every token forwarded as soon as it is there;
    lazy, unfused one tree an utterance, a token forwarded when a child of it has to be scored;
    lazy tree     the same by fused kernels where a model has them, on a GPU (ours).

All must give the same scores (float32; in bfloat16 the largest difference is told). Models but the
shipped one have random weights of the named configuration: time and memory do not depend on the values. The
floor of an event is the larger of: weights read once at the measured copy bandwidth, and forwarded tokens x 2
x parameters at the measured matrix rate.
"""
from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
import speech  # noqa: E402
from rates import rates  # noqa: E402
from shapes import SHAPES, make_model  # noqa: E402

from icefall_fusion.decode.job import DecodeRun  # noqa: E402
from icefall_fusion.lm import CausalLm  # noqa: E402
from icefall_fusion.lm.tree_forward import ForwardPlan  # noqa: E402
from icefall_fusion.lm.tree_memory import TreeCache  # noqa: E402
from icefall_fusion.lm.tree_scorer import TreeOptions, TreeScorer  # noqa: E402

_TOKENS_AT_ONCE = 2048  # of full texts and path caches, as many as the trees' limit


class Event(NamedTuple):
    """Hypotheses to score together: utterance of each [n], and tokens of each."""

    utterances: list[int]
    paths: list[tuple[int, ...]]
    ends: bool


class RecordingScorer(TreeScorer):
    """A tree that notes what it is asked."""

    events: list[Event]

    def launch(self, nodes: Any, eos: bool = False) -> Callable[[], Tensor]:
        flat = np.asarray(nodes).reshape(-1)
        paths = [tuple(self.tree.path(int(node))) for node in flat]
        self.events.append(Event(self.tree.utterance[flat].tolist(), paths, eos))
        return super().launch(nodes, eos)


def record(args: argparse.Namespace) -> tuple[list[tuple[int, list[Event]]], float]:
    """Decode speech and return the events of each batch (with its size), and seconds of audio."""
    from icefall_fusion.search import PrefixSearchOptions

    sets = speech.manifests(args)
    options = speech.decode_options(
        args, f"{args.speech}/decode", sets, methods=[f"llm-delayed-interval-{args.interval}"],
        search=PrefixSearchOptions(beam=args.beam), batch_size=args.batch,
    )
    decode = DecodeRun(options)
    lm, batches = decode.recognizer.models.get("llm"), []

    def open_tree(batch: int, *unused: Any, **also: Any) -> TreeScorer:
        scorer = RecordingScorer(lm, [[lm.bos_id]] * batch, TreeOptions())
        scorer.events = []
        batches.append((batch, scorer.events))
        return scorer

    lm.open_tree = open_tree
    rows = decode.decode_all()
    return batches, sum(row["audio_seconds"] for row in rows)


# --- the ways ----------------------------------------------------------------------------------------


class Way:
    """Scores the events of one batch; counts tokens forwarded and bytes of keys and values."""

    def __init__(self, lm: CausalLm, batch: int) -> None:
        self.lm, self.batch = lm, batch
        self.forwarded = self.forwards = self.kv_bytes = 0
        self.start = [lm.bos_id]

    def score(self, event: Event) -> Tensor:
        """Return log P of each hypothesis [n], its end included where the event says so."""
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
    """Ours."""

    eager = False

    def __init__(self, lm: CausalLm, batch: int) -> None:
        super().__init__(lm, batch)
        self.tree = lm.open_tree(batch)
        self.nodes: Optional[Tensor] = None

    def score(self, event: Event) -> Tensor:
        roots = [self.tree.root(utterance) for utterance in event.utterances]
        nodes = torch.tensor([self.tree.insert(root, path) for root, path in zip(roots, event.paths)])
        if self.eager:
            self.tree.known(nodes)  # brings new nodes into the tree's arrays
            self.tree.next_log_probs(torch.from_numpy(self.tree.tree.unscored(nodes.numpy())))
        scores = self.tree.score(nodes, eos=event.ends)
        stats = self.tree.stats()
        self.forwarded, self.forwards = int(stats["lm_tokens_forwarded"]), int(stats["lm_forwards"])
        self.kv_bytes = int(stats["kv_bytes_peak"])
        return scores


class EagerTree(LazyTree):
    eager = True


class UnfusedTree(LazyTree):
    """Ours without fused kernels: layers as transformers runs them."""

    def score(self, event: Event) -> Tensor:
        fused, self.lm.fused = self.lm.fused, None
        try:
            return super().score(event)
        finally:
            self.lm.fused = fused


WAYS: dict[str, type[Way]] = {
    "full texts": FullTexts, "path caches": PathCaches, "eager tree": EagerTree,
    "lazy, unfused": UnfusedTree, "lazy tree": LazyTree,
}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _to_slots(values: Tensor, slots: int) -> Tensor:
    if values.shape[1] >= slots:
        return values[:, :slots].contiguous()
    longer = values.new_zeros(values.shape[0], slots, *values.shape[2:])
    longer[:, : values.shape[1]] = values
    return longer


# --- measuring ----------------------------------------------------------------------------------------


@torch.inference_mode()
def replay(
    way: str, lm: CausalLm, batches: Sequence[tuple[int, list[Event]]], device: str
) -> tuple[dict, list]:
    """Score all events one way; return what it cost, and the scores."""
    if figures.on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    scores, seconds, forwarded, forwards, kv_bytes, events = [], 0.0, 0, 0, 0, 0
    for batch, recorded in batches:
        scorer = WAYS[way](lm, batch)
        for event in recorded:
            figures.wait(device)
            begun = time.perf_counter()
            found = scorer.score(event)
            figures.wait(device)
            seconds += time.perf_counter() - begun
            scores.append(found)
            events += 1
        forwarded, forwards = forwarded + scorer.forwarded, forwards + scorer.forwards
        kv_bytes = max(kv_bytes, scorer.kv_bytes)
    row = {"way": way, "seconds": seconds, "events": events, "ms_an_event": 1000 * seconds / max(1, events),
           "tokens_forwarded": forwarded, "forwards": forwards, "kv_mb": kv_bytes / 2**20}
    if figures.on_gpu(device):
        row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row, scores


def busy_share(lm: CausalLm, batches: Sequence[tuple[int, list[Event]]], seconds: float) -> Optional[float]:
    """Return the share of the lazy tree's ``seconds`` in which the GPU runs kernels; None: not to be had."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            replay("lazy tree", lm, batches, "cuda")
        return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / seconds
    except RuntimeError as error:  # not every driver lets itself be watched
        print(f"the share of the GPU's time cannot be had: {error}")
        return None


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Record, replay every way with every model; return rows, and what was measured once."""
    batches, audio = record(args)
    if args.events:
        batches = [(batch, events[: args.events]) for batch, events in batches]
    bandwidth, rate = rates(args.device, args.dtype)
    more = {"audio_seconds": audio, "copy_bytes_a_second": bandwidth, "matrix_ops_a_second": rate}
    rows: list[dict[str, Any]] = []
    for name in args.models:
        lm = make_model(name, args.device, args.dtype)
        parameters = sum(p.numel() for p in lm.model.parameters())
        weight_bytes = sum(p.numel() * p.element_size() for p in lm.model.parameters())
        reference: Optional[list] = None
        for way in args.ways:
            if way == "lazy, unfused" and lm.fused is None:
                continue
            attention = lm.model.config._attn_implementation
            if way in ("full texts", "path caches"):  # our attention is for trees
                lm.model.set_attn_implementation("sdpa")
            few = [(batch, events[:2]) for batch, events in batches[:1]]
            # of trees all: on a GPU each size that comes for the first time may cost as much as all events
            tree = issubclass(WAYS[way], LazyTree)
            replay(way, lm, batches if tree and figures.on_gpu(args.device) else few, args.device)
            row, scores = replay(way, lm, batches, args.device)
            lm.model.set_attn_implementation(attention)
            reference = reference or scores
            differences = [float((a - b).abs().max()) for a, b in zip(scores, reference)]
            worst = max(differences)
            row["largest_difference"] = worst if np.isfinite(worst) else None
            row["fused"] = tree and way != "lazy, unfused" and lm.fused is not None
            reading = weight_bytes * row["forwards"] / bandwidth
            floor = max(reading, row["tokens_forwarded"] * 2 * parameters / rate)
            row.update(model=name, parameters=parameters, floor_seconds=floor, rtf=row["seconds"] / audio,
                       times_floor=row["seconds"] / floor)
            rows.append(row)
            print(f"{name:16}{way:14}{row['ms_an_event']:9.2f} ms an event{row['times_floor']:8.2f} x floor"
                  f"{row['tokens_forwarded']:9,} tokens{row['kv_mb']:9.1f} MB keys and values"
                  f"  differs by {worst:.1e}{', fused' if row['fused'] else ''}", flush=True)
            if figures.on_gpu(args.device) and way == "lazy tree":
                row["gpu_busy_share"] = busy_share(lm, batches, row["seconds"])
            figures.save(args, rows, **more)  # a time limit takes nothing back
        del lm
        if figures.on_gpu(args.device):
            torch.cuda.empty_cache()
    return rows, more


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    speech.add_arguments(parser)
    parser.add_argument("--models", nargs="+", default=["minibooks"], choices=["minibooks", *SHAPES])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--beam", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="utterances")
    parser.add_argument("--interval", type=int, default=16, help="frames between events")
    parser.add_argument("--events", type=int, default=0, help="of each batch; 0: all")
    parser.add_argument("--output", default="bench/llm_tree.json")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    rows, more = measure(args)
    figures.write(args, rows, **more)
    ours = [row for row in rows if row["way"] == "lazy tree"]
    if figures.on_gpu(args.device) and not all(row["fused"] for row in ours):
        sys.exit("llm_tree.py: a model ran without fused kernels: the times are not ours (see the warnings)")


if __name__ == "__main__":
    main()
