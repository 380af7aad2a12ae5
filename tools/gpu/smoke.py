"""A trial of every kernel, each in a process of its own: compile, run one shape, compare with plain tensors.
Knows: kernels, their plain twins, Triton's compiled objects. Must not know: benchmarks, results of a day.

    python tools/gpu/smoke.py --device cuda --output smoke.json
    TRITON_INTERPRET=1 python tools/gpu/smoke.py --device cpu --kernels lm-norm    # in Triton's interpreter

A kernel that reads where it must not ends its process and no other. Compiling is work of the CPU, so that
many run at once. Each row tells whether all is well, the error in full, the time of the first run (with
compiling) and of the next, registers and spills. Never run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# as the package has them; the process that waits for the others need not load it
WITHOUT = "ICEFALL_FUSION_WITHOUT_KERNELS"
SEARCH = "icefall_fusion.search.engines.gpu_kernel"
LM = "icefall_fusion.lm.fused_kernels"
PRODUCTS = "icefall_fusion.lm.fused_matmul"
GRAPHS = "icefall_fusion.lm.graphs"
PRODUCT_PARTS = 4
FORMS = ("alone", "ranked", "pieces", "ahead", "ngram", "phrases", "phrases+ngram")
_MARK = "SMOKE "  # before the row that a process prints


class Trial(NamedTuple):
    """One kernel's trial: what to run on a device (it returns the largest difference), what to switch off."""

    run: Callable[[str], float]
    switch: str = ""
    module: str = ""
    most: float = 1e-2  # difference


def _native(device: str) -> float:
    """Build the C++ code."""
    from icefall_fusion.common.native_build import load_native

    load_native()
    return 0.0


def _search(form: str) -> Callable[[str], float]:
    """Return the engine's own trial, and a search at beam 10 by kernel and by tensors, on real pieces."""

    def run(device: str) -> float:
        import torch

        from icefall_fusion.fusion import DelayedFusion, LookAhead, NgramFusion
        from icefall_fusion.fusion import ShortestHypothesis as Shortest
        from icefall_fusion.fusion.hotwords import HotWordFusion
        from icefall_fusion.search import PrefixSearchOptions, ctc_prefix_search
        from icefall_fusion.search.engines.gpu_check import run_trial
        from icefall_fusion.text.tokens import AcousticTokens

        small_worst = run_trial(form, torch.device(device))
        tokens = AcousticTokens.load(ROOT / "egs/minibooks/ASR/pretrained/ctc_aed")
        small = device == "cpu"
        batch, frames = (2, 12) if small else (8, 120)
        generator = torch.Generator().manual_seed(1)
        logits = 2.0 * torch.randn(batch, frames, tokens.size, generator=generator)
        logits[..., tokens.blank_id] += 6.0
        log_probs = logits.log_softmax(-1).to(device)
        lens = torch.randint(frames // 2, frames + 1, (batch,), generator=generator).to(device)
        lm = _tiny_lm(tokens, device) if form in ("ranked", "pieces", "ahead", "phrases") else None
        ngram = _random_ngram(tokens).to(torch.device(device)) if form == "ahead" or "ngram" in form else None
        found = []
        for engine in ("triton", "torch"):
            fusions: list[Any] = []
            if "ngram" in form:
                fusions = [NgramFusion(ngram, 0.3, 0.2)]
            elif lm is not None:
                look = LookAhead(ngram, 0.6) if form == "ahead" else None
                trigger = Shortest("pieces", 2) if form == "pieces" else Shortest()
                fusions = [DelayedFusion(lm, 0.4, 0.5, trigger, look_ahead=look)]
            if "phrases" in form:
                fusions.append(HotWordFusion(["the white rabbit", "the sea", ("white", 2.0)]))
            options = PrefixSearchOptions(beam=4 if small else 10, engine=engine)
            found.append(ctc_prefix_search(log_probs, lens, options, tokens, fusions))
        totals = [[[h.total for h in nbest][:5] for nbest in nbests] for nbests in found]
        pairs = [(a, b) for kernel, tensors in zip(*totals) for a, b in zip(kernel, tensors)]
        return max([small_worst, *(abs(a - b) for a, b in pairs)])

    return run


def _tiny_lm(tokens: Any, device: str) -> Any:
    import torch
    import transformers

    from icefall_fusion.lm import CausalLm
    from icefall_fusion.lm.loading import Vocabulary

    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=tokens.size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    model = transformers.LlamaForCausalLM(config).to(device)
    os.environ[WITHOUT] = LM  # this trial is of the search alone
    return CausalLm(model, Vocabulary(None, tokens, 1, 1), "tiny", self_check=False)


def _random_ngram(tokens: Any) -> Any:
    """Return a bigram that has a quarter of all pairs of pieces."""
    import torch

    from icefall_fusion.ngram.piece_ngram import NgramOrder, PieceNgram

    base, generator = tokens.size + 2, torch.Generator().manual_seed(3)
    pairs = torch.randperm(base * base, generator=generator)[: base * base // 4].sort().values
    orders = [
        NgramOrder(
            size, keys, -3.0 - torch.rand(len(keys), generator=generator), torch.full((len(keys),), -0.5)
        )
        for size, keys in ((1, torch.arange(base)), (2, pairs))
    ]
    return PieceNgram(tokens.size, orders, "trial")


def _norm(device: str) -> float:
    """Compare the norm with plain arithmetic."""
    import torch

    from icefall_fusion.common.devices import load_kernels

    size, rows = (64, 3) if device == "cpu" else (4096, 320)
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    hidden, more, weight = (
        torch.randn(*shape, device=device).to(kind) for shape in ((rows, size), (rows, size), (size,))
    )
    added = (hidden + more).float()
    wanted = added * torch.rsqrt(added.square().mean(-1, keepdim=True) + 1e-5) * weight.float()
    out = torch.full_like(hidden, float("nan"))
    load_kernels(LM).add_and_norm[(rows,)](
        hidden, more, weight, out, size, 1e-5, ADD=True, BLOCK=size, num_warps=8 if size > 2048 else 4
    )
    return float((out.float() - wanted).abs().max())


def _gate(device: str) -> float:
    """Compare the gate with plain arithmetic."""
    import torch

    from icefall_fusion.common.devices import load_kernels

    size, rows = (96, 3) if device == "cpu" else (14336, 320)
    mixed = torch.randn(rows, 2 * size, device=device).to(
        torch.float32 if device == "cpu" else torch.bfloat16
    )
    wanted = torch.nn.functional.silu(mixed[:, :size].float()) * mixed[:, size:].float()
    out = torch.full_like(mixed[:, :size], float("nan")).contiguous()
    load_kernels(LM).silu_and_multiply[(rows, -(-size // 1024))](mixed, out, size, BLOCK=1024)
    return float((out.float() - wanted).abs().max())


def _products(part: int) -> Callable[[str], float]:
    """Return a comparison of products by every fourth tile with PyTorch's: compiling all takes a minute."""

    def run(device: str) -> float:
        import torch

        from icefall_fusion.lm.products import FORMS, GATED_FORMS, check_close, multiply

        rows, width, size = (5, 48, 72) if device == "cpu" else (320, 4096, 4096)
        kind = torch.float16 if device == "cpu" else torch.bfloat16  # the interpreter has no bfloat16
        left, weights = (torch.randn(n, size, device=device).to(kind) for n in (rows, width))
        plain = left @ weights.T
        gated = torch.nn.functional.silu(plain[:, : width // 2]) * plain[:, width // 2 :]
        for form in (FORMS + GATED_FORMS)[part::PRODUCT_PARTS]:
            for split in (1,) if form.gated else (1, 3):
                wanted = gated if form.gated else plain
                check_close(multiply(left, weights, form._replace(split=split)), wanted)
        return 0.0

    return run


def _tree(dtype: str) -> Callable[[str], float]:
    """Return a check of all fused layers: scores of a random tree are those of plain forwards."""

    def run(device: str) -> float:
        import torch
        import transformers

        from icefall_fusion.lm import CausalLm
        from icefall_fusion.lm.fused import FusedModel
        from icefall_fusion.lm.fused_loading import try_kernels
        from icefall_fusion.lm.loading import Vocabulary, check_tree

        torch.manual_seed(4)
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        if device == "cpu":
            sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
        config = transformers.MistralConfig(
            vocab_size=500,
            num_hidden_layers=2,
            num_key_value_heads=sizes["num_attention_heads"] // 4,
            **sizes,
        )
        kind = torch.float16 if device == "cpu" and dtype == "bfloat16" else getattr(torch, dtype)
        model = transformers.MistralForCausalLM(config).to(device, kind)  # the interpreter has no bfloat16
        lm = CausalLm(model, Vocabulary(None, None, 1, 2), f"two layers in {dtype}", self_check=False)
        if lm.fused is None:  # here what is wrong is raised
            lm.fused = FusedModel(model)
            try_kernels(lm.fused)
        check_tree(lm)
        return 0.0

    return run


def _graphs(device: str) -> float:
    """Capture events of a small model as CUDA graphs; scores by them are those of plain forwards."""
    import torch
    import transformers

    from icefall_fusion.lm import CausalLm
    from icefall_fusion.lm.fused import FusedModel
    from icefall_fusion.lm.fused_loading import use_graphs
    from icefall_fusion.lm.loading import Vocabulary

    torch.manual_seed(5)
    config = transformers.LlamaConfig(vocab_size=504, hidden_size=64, intermediate_size=96,
                                      num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(config).to(device)
    lm = CausalLm(model, Vocabulary(None, None, 1, 2), "two layers", self_check=False)
    if lm.fused is None:
        lm.fused = FusedModel(model)
    use_graphs(lm)
    if lm.fused.graphs is None:
        raise RuntimeError("no graphs: see the warning above")
    return 0.0


TRIALS: dict[str, Trial] = {
    "native": Trial(_native),
    **{f"search-{form}": Trial(_search(form), f"{SEARCH}:{form}", SEARCH) for form in FORMS},
    "lm-norm": Trial(_norm, LM, LM, 0.1),
    "lm-gate": Trial(_gate, LM, LM, 0.3),
    **{f"lm-products-{part}": Trial(_products(part), PRODUCTS, PRODUCTS) for part in range(PRODUCT_PARTS)},
    "lm-tree-bfloat16": Trial(_tree("bfloat16"), LM, LM),
    "lm-tree-float32": Trial(_tree("float32"), LM, LM),
    "lm-graphs": Trial(_graphs, GRAPHS, LM),
}


def try_one(name: str, device: str) -> dict[str, Any]:
    """Run one trial twice in this process; return its row."""
    trial = TRIALS[name]
    row: dict[str, Any] = {"kernel": name, "good": False, "switch": trial.switch}
    try:
        for key in ("first_seconds", "next_seconds"):
            begun = time.perf_counter()
            row["worst"] = trial.run(device)
            _wait(device)
            row[key] = round(time.perf_counter() - begun, 3)
        row["good"] = row["worst"] <= trial.most  # not where it is NaN
        if not row["good"]:
            row["error"] = f"differs by {row['worst']:g} from plain tensors, allowed are {trial.most:g}"
        row["compiled"] = compiled(trial.module)
    except BaseException:
        row["error"] = traceback.format_exc()
    return row


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def compiled(module: str) -> list[dict[str, Any]]:
    """Return what Triton tells of the kernels of a module that this process has compiled."""
    found = []
    for name, function in sorted(vars(sys.modules.get(module, sys)).items()):
        caches = getattr(function, "device_caches", {}).values() if module else ()
        for kernel in (kernel for cache in caches for kernel in cache[0].values()):
            found.append(
                {
                    "name": name,
                    "warps": kernel.metadata.num_warps,
                    "shared": kernel.metadata.shared,
                    "registers": getattr(kernel, "n_regs", None),
                    "spills": getattr(kernel, "n_spills", None),
                }
            )
    return found


def in_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one trial in a new process; return its row, whatever becomes of the process."""
    under = shlex.split(args.under)
    command = [*under, sys.executable, __file__, "--one", name, "--device", args.device]
    begun = time.perf_counter()
    row: dict[str, Any] = {"kernel": name, "good": False, "switch": TRIALS[name].switch}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
        lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
        if lines:
            row = json.loads(lines[-1][len(_MARK) :])
        if done.returncode or not lines:
            row["good"] = False
            row.setdefault("error", f"exit code {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
        if under:
            row["tool"] = (done.stdout + done.stderr)[-3000:]
    except OSError as error:
        row["error"] = f"{under[:1]} cannot be run: {error}"
    except subprocess.TimeoutExpired as error:
        said = ((error.stdout or b"") + (error.stderr or b"")).decode(errors="replace")
        row["error"] = f"not done after {args.limit:g} s: {said[-2000:]}"
    row["seconds"] = round(time.perf_counter() - begun, 2)
    return row


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    """Run all trials, several at once; write rows as they come; return 1 if any is bad."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--limit", type=float, default=70.0, help="seconds of one trial")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="at once")
    parser.add_argument("--under", default="", help="a program with options that runs each trial")
    parser.add_argument("--one", default="", help="a trial in this process; prints its row")
    parser.add_argument("--output", default="bench/smoke.json")
    args = parser.parse_args()
    if args.one:
        row = try_one(args.one, args.device)
        print(f"{_MARK}{json.dumps(row)}", flush=True)
        return 0 if row["good"] else 1
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed([pool.submit(in_process, name, args) for name in args.kernels]):
            row = done.result()
            rows.append(row)
            rows.sort(key=lambda one: args.kernels.index(one["kernel"]))
            write(Path(args.output), rows)
            print(
                f"{row['kernel']:20}{'good' if row['good'] else 'BAD':6}{row['seconds']:7.1f} s  "
                f"{row.get('error', '').strip().splitlines()[-1:]}",
                flush=True,
            )
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
