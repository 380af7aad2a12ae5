"""Prefix search without language model: speed and quality of ours and of what else can be imported.
Knows: emissions, decoders as functions, exact log-probabilities. Must not know: how any decoder works.

    OMP_NUM_THREADS=1 python tools/bench/search.py               # synthetic sets, beams 4 to 50
    PYTHONPATH=.cache/peers python tools/bench/search.py ...     # more decoders: see tools/bench/peers.txt
    python tools/bench/search.py --emissions FILE.npz --beams 10 --output bench/search-real.json

Quality: the gap in exact log P(pieces | emissions) (torch's ctc_loss) to the best hypothesis that any decoder
found, mean over utterances; token error rate against the spoken pieces where they are known (synthetic sets),
and the oracle of the beam's list. Speed: the least of the rounds, decoders taking turns, one thread. With a
GPU as --device, decoders that know the CPU alone are left out unless --peers names them, and so are our
searches by tensors; --peers all takes every one. "floor" is the time to read the log-probs once at the
measured copy bandwidth.
"""
from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Sequence

import numpy as np
import torch
from kaldialign import edit_distance
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import figures  # noqa: E402
from decoders import Decoder, all_decoders, try_to_make  # noqa: E402
from rates import rates  # noqa: E402
from synthetic_emissions import synthetic_emissions  # noqa: E402

from icefall_fusion.common.files import write_json  # noqa: E402


class Data(NamedTuple):
    """A set of emissions: log_probs [B, T, V], lens [B], spoken pieces if known, seconds of audio."""

    name: str
    log_probs: Tensor
    lens: Tensor
    references: Optional[list[list[int]]]
    seconds: float


def load(path: str, frame_shift: float, limit: int) -> Data:
    """Read saved log-probs: one array [T, V] per utterance."""
    with np.load(path) as archive:
        names = [name for name in archive.files if archive[name].ndim == 2][:limit]
        rows = [torch.from_numpy(archive[name].astype(np.float32)) for name in names]
    lens = torch.tensor([len(row) for row in rows])
    log_probs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).log_softmax(-1)
    return Data(Path(path).stem, log_probs, lens, None, float(lens.sum()) * frame_shift)


def exact_log_probs(
    data: Data, found: Sequence[Sequence[int]], blank: int, scores: Optional[Tensor] = None
) -> Tensor:
    """Return log P(pieces | emissions) of one hypothesis per utterance (all alignments): [B].

    ``scores`` are the log-probs [T, B, V] in float64, where they are at hand.
    """
    width = max(1, *(len(pieces) for pieces in found)) if found else 1
    targets = torch.tensor([list(pieces) + [0] * (width - len(pieces)) for pieces in found])
    lengths = torch.tensor([len(pieces) for pieces in found])
    scores = data.log_probs.transpose(0, 1).double() if scores is None else scores
    return -torch.nn.functional.ctc_loss(scores, targets, data.lens, lengths, blank=blank, reduction="none")


def error_rate(found: Sequence[Sequence[Sequence[int]]], references: Sequence[Sequence[int]]) -> float:
    """Return the token error rate in percent of the best of each list."""
    errors = sum(min(edit_distance(ref, h)["total"] for h in hyps) for hyps, ref in zip(found, references))
    return 100.0 * errors / max(1, sum(map(len, references)))


def measure(
    data: Data, decoders: Sequence[Decoder], blank: int, rounds: int, budget: float, device: str,
    save: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """Decode with every decoder, judge and time them; those that cannot be imported are reported as such.

    Decoders that know one device only get the log-probs on the CPU. All return lists, so that a time holds
    the device's work too. ``save`` gets all rows whenever one has changed.
    """
    rows, functions, results = [], {}, {}
    on_device = data.log_probs.to(device), data.lens.to(device)
    for decoder in decoders:
        decode, why = try_to_make(decoder)
        row = {"set": data.name, "decoder": decoder.name, "beam": decoder.beam, "settings": decoder.settings}
        rows.append(row)
        if decode is None:
            row["missing"] = why
            continue
        row["device"] = device if decoder.any_device else "cpu"
        inputs = on_device if decoder.any_device else (data.log_probs, data.lens)
        decode = functools.partial(decode, *inputs)
        started = time.perf_counter()
        try:
            results[len(rows) - 1] = decode()  # also the warm-up
        except Exception as error:
            if decoder.name.startswith(("ours", "greedy")):
                raise
            row["missing"] = f"{type(error).__name__}: {error}"  # other people's: no decoder stops the others
            continue
        functions[len(rows) - 1] = decode
        row["first_seconds"] = time.perf_counter() - started
        save(rows)
    wide = data.log_probs.transpose(0, 1).double()
    firsts = {i: [hyps[0] for hyps in found] for i, found in results.items()}
    exact = {i: exact_log_probs(data, first, blank, wide) for i, first in firsts.items()}
    best = torch.stack(list(exact.values())).amax(0)
    for i, found in results.items():
        rows[i]["gap_nats"] = float((best - exact[i]).mean())
        rows[i]["best_found"] = int((best - exact[i] < 1e-3).sum())
        if data.references is not None:
            rows[i]["error_rate"] = error_rate([hyps[:1] for hyps in found], data.references)
            rows[i]["oracle_error_rate"] = error_rate(found, data.references)
    times: dict[int, list[float]] = {i: [] for i in functions}
    for _ in range(rounds):
        for i, decode in functions.items():
            if rows[i]["first_seconds"] * rounds > budget and times[i]:
                continue
            started = time.perf_counter()
            decode()
            times[i].append(time.perf_counter() - started)
    save(rows)
    for i, taken in times.items():
        rows[i]["ms_per_second"] = 1000.0 * min(taken) / data.seconds
        rows[i]["rounds"] = len(taken)
    return rows


def show(rows: Sequence[dict]) -> None:
    """Print one table per set."""
    for name in dict.fromkeys(row["set"] for row in rows):
        titles = f"{'ms/s':>9}{'gap nats':>10}{'best found':>12}{'TER %':>8}{'oracle':>8}"
        floor = next(row["floor_ms_per_second"] for row in rows if row["set"] == name)
        print(f"\n{name}: floor {floor:.5f} ms/s\n{'decoder':24}{'beam':>5}{titles}")
        for row in (row for row in rows if row["set"] == name):
            if "missing" in row:
                print(f"{row['decoder']:24}{row['beam']:>5}  cannot be had: {row['missing']}")
                continue
            keys = ("error_rate", "oracle_error_rate")
            rates = "".join(f"{row[key]:8.2f}" if key in row else f"{'-':>8}" for key in keys)
            figures = f"{row['ms_per_second']:9.3f}{row['gap_nats']:10.4f}{row['best_found']:>12}{rates}"
            print(f"{row['decoder']:24}{row['beam']:>5}{figures}")


def main() -> None:
    """Parse the command line, measure, print, write JSON."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--emissions", action="append", default=[], help=".npz of [T, V] arrays; may repeat")
    parser.add_argument("--blank", type=int, default=0)
    parser.add_argument("--frame-shift", type=float, default=0.04, help="seconds")
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 10, 20, 50])
    parser.add_argument("--batch", type=int, default=32, help="utterances")
    parser.add_argument("--frames", type=int, default=400, help="frames of a synthetic utterance")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a decoder; slower ones run once")
    parser.add_argument("--only", default="", help="only decoders whose name has this in it")
    parser.add_argument("--leave-out", nargs="+", default=[], help="decoders by name, e.g. slow ones")
    parser.add_argument("--peers", nargs="+", default=[], help="decoders that a GPU leaves out; or all")
    parser.add_argument("--device", default="cpu", help="of decoders that know more than the CPU, e.g. cuda")
    parser.add_argument("--output", default="bench/search.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets = [load(path, args.frame_shift, args.batch) for path in args.emissions]
    if not sets:
        for name, smeared in (("peaky", 0.01), ("smeared", 0.08)):
            made = synthetic_emissions(args.batch, args.frames, smeared=smeared)
            sets.append(Data(name, *made, seconds=args.batch * args.frames * 0.04))
    decoders = all_decoders(args.beams, args.blank)
    decoders = [d for d in decoders if args.only in d.name and d.name not in args.leave_out]
    if figures.on_gpu(args.device) and args.peers != ["all"]:
        decoders = [d for d in decoders if d.on_gpu or d.name in args.peers]
    settings = (args.blank, args.rounds, args.budget, args.device)
    machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version(),
               "torch": torch.__version__, "threads": torch.get_num_threads()}
    bandwidth = rates(args.device, "bfloat16")[0]
    rows: list[dict] = []

    def save(more: list[dict]) -> None:
        write_json(args.output, {"machine": machine, "options": vars(args), "rows": rows + more,
                                 "copy_bytes_a_second": bandwidth})

    for data in sets:
        floor = 1000.0 * 4 * float(data.lens.sum()) * data.log_probs.shape[2] / bandwidth / data.seconds
        measured = measure(data, decoders, *settings, save)
        rows += [{**row, "floor_ms_per_second": floor} for row in measured]
        show([row for row in rows if row["set"] == data.name])
        save([])
    print(f"\nwritten: {args.output}; machine: {json.dumps(machine)}")


if __name__ == "__main__":
    main()
