"""The section "On a GPU" of the results page, from the files that a day on a GPU brings back.
Knows: gpu.json of tools/gpu_day.sh, rows of the benchmarks. Must not know: how anything was measured.

    python tools/bench/gpu_page.py bench/gpu/gpu.json --page egs/minibooks/ASR/RESULTS.md
    python tools/bench/gpu_page.py a/gpu.json b/gpu.json          # both calls; prints the section alone
    python tools/bench/gpu_page.py --counts bench/counts.json --page egs/minibooks/ASR/RESULTS.md

--counts are the rows of `fusion.py --apart --shape tiny` on a CPU: calls and tokens of each method, from
which the floors of a 7B model are predicted. Without it the predictions that stand on the page stay. What a
run did not measure has no row; nothing is carried over from an earlier day.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from gpu_tables import COLUMNS, MB, Column, Row, aims, any_columns, program_of, rows_of, table  # noqa: E402

from icefall_fusion.common.files import write_text  # noqa: E402

MEASURED, PREDICTED, END = (f"<!-- gpu_page.py: {name} -->" for name in ("measured", "predicted", "end"))
#: Mistral 7B in bfloat16, without its table of embeddings, which is read by rows.
PARAMETERS, BYTES, KV_BYTES_A_TOKEN = 7.11e9, 14.22e9, 131_072
#: Of an H200: bytes a second of a copy, read and written; operations a second of a large bfloat16 product.
COPY, PRODUCT = 4.3e12, 7.8e14


def predicted(counts: Sequence[Row]) -> list[str]:
    """Return the table of floors, from calls and tokens that were counted on a CPU."""
    rows = []
    for row in counts:
        if not row.get("lm_forwards"):
            continue
        reading = BYTES / COPY * row["lm_forwards"]
        products = 2 * PARAMETERS / PRODUCT * row["lm_tokens_forwarded"]
        scale = KV_BYTES_A_TOKEN / row["kv_bytes_a_token"] if row.get("kv_bytes_a_token") else None
        floor = max(reading, products)
        rows.append({
            **row, "reading": reading, "products": products, "floor": floor,
            "floor_rtf": floor / row["audio_seconds"],
            "kv": None if scale is None else row["kv_bytes_peak"] * scale,
        })
    columns = [
        Column("method", "method"), Column("batch", "batch"), Column("LM calls", "lm_forwards", "{:,}"),
        Column("tokens", "lm_tokens_forwarded", "{:,}"), Column("reading s", "reading", "{:.2f}"),
        Column("products s", "products", "{:.2f}"), Column("floor as RTF", "floor_rtf", "{:.5f}"),
        Column("1.6 times it", "floor_rtf", "{:.5f}", 1.6), Column("KV MB", "kv", "{:,.0f}", MB),
        Column("of rows", "kv_of_rows", "{:.2f}"),
    ]
    return table(rows, columns)


def measured(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section of what was measured, from one or several files of a day."""
    steps = {name: entry for state in states for name, entry in state.get("steps", {}).items()}
    lines = [line for state in states for line in _machine(state)]
    lines += ["", *table(aims(steps), [
        Column("aim", "said"), Column("best measured", "figure"), Column("", "met"),
    ]), ""]
    overview = [Column("step", "name"), Column("status", "status"), Column("s", "seconds", "{:.0f}"),
                Column("command", "command")]
    shown = [{"name": name, **entry, "command": _command(entry)} for name, entry in steps.items()]
    lines += table(shown, overview)
    for name, entry in steps.items():
        rows = rows_of(entry)
        if rows:
            lines += ["", f"#### {name}", "", *_of_program(program_of(entry, name), rows)]
    return lines


def _of_program(program: str, rows: list[dict[str, Any]]) -> list[str]:
    if program == "profile_fusion":
        return _profile(rows)
    return table(rows, COLUMNS.get(program) or any_columns(rows))


def _profile(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for row in rows:
        calls = ", ".join(
            f"{name.replace('_', ' ')} {call['count']:,}" for name, call in row["calls"].items()
        )
        idle = ", ".join(f"{name} {us / 1e3:.2f} ms" for name, us in row["idle_us_by_mark"].items())
        lines += [
            f"**{row['section']}** of {row['method']}, {row['batch']} utterances: "
            f"{row['wall_us'] / 1e3:.2f} ms; the device has nothing to do for "
            f"{100 * row['idle_share']:.0f} % ({idle}); {calls}.", "",
            *table(row["kernels"], COLUMNS["kernels"]), "",
        ]
    return lines[:-1]


def _command(entry: Mapping[str, Any]) -> str:
    """Return a step's command from its program on, without the folders of the machine."""
    words = re.sub(r" --output \S+", "", str(entry.get("command", ""))).split()
    start = next((at for at, word in enumerate(words) if word.endswith(".py")), 0)
    kept = [word for word in words[start:] if not word.startswith("/")]
    return f"`{' '.join(kept)[:300]}`"


def _machine(state: Mapping[str, Any]) -> list[str]:
    machine = state.get("machine") or {}
    packed = state.get("packed") or {}
    commit = packed.get("commit") or next(
        (entry["result"]["machine"]["git_commit"] for entry in state.get("steps", {}).values()
         if (entry.get("result") or {}).get("machine", {}).get("git_commit")), "unknown")
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("python", "torch", "triton", "transformers", "numpy")
        if name in machine
    )
    memory = f", {machine['gpu_bytes'] / 2**30:.0f} GiB" if machine.get("gpu_bytes") else ""
    card = machine.get("gpu") or f"no GPU: a rehearsal on a CPU ({state.get('device')})"
    off = state.get("switched_off")
    return [
        f"- Call {state.get('call')}: {card}{memory}; {versions}; commit {commit}; "
        f"{state.get('seconds', 0):.0f} s"
        + (f"; switched off, so that fallbacks were measured: {', '.join(off)}" if off else "") + "."
    ]


def put(page: str, start: str, end: str, lines: Sequence[str]) -> str:
    """Return a page with what is between two marks replaced.

    Raises:
        ValueError: the page lacks a mark.
    """
    for mark in (start, end):
        if mark not in page:
            raise ValueError(f"the page must have the line {mark!r}")
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    return before + start + "\n" + "\n".join(lines).strip("\n") + "\n" + end + after


def main(given: Optional[Sequence[str]] = None) -> None:
    """Write the section into the page, or print it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("files", nargs="*", help="gpu.json of each call")
    parser.add_argument("--counts", default="", help="JSON of fusion.py --apart --shape tiny")
    parser.add_argument("--page", default="", help="page to change; none: print")
    args = parser.parse_args(given)
    parts = []
    if args.counts:
        counts = json.loads(Path(args.counts).read_text(encoding="utf-8"))["rows"]
        parts.append((PREDICTED, MEASURED, predicted(counts)))
    if args.files:
        states = [json.loads(Path(path).read_text(encoding="utf-8")) for path in args.files]
        parts.append((MEASURED, END, measured(states)))
    if not args.page:
        print("\n\n".join("\n".join(lines) for _, _, lines in parts))
        return
    page = Path(args.page).read_text(encoding="utf-8")
    for start, end, lines in parts:
        page = put(page, start, end, lines)
    write_text(args.page, page)
    print(f"{args.page}: {', '.join(start for start, _, _ in parts)} written")


if __name__ == "__main__":
    main()
