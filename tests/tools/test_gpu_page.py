"""The section of the results page from a day's files: tables, aims met or missed, floors predicted by count.
Knows: tools/bench/gpu_page.py. Must not know: how anything is measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "bench"))
import gpu_page  # noqa: E402
import gpu_tables  # noqa: E402

RESULTS = ROOT / "egs" / "minibooks" / "ASR" / "RESULTS.md"


def fusion_row(method: str, seconds: float, **more: float) -> dict:
    return {
        "method": method,
        "batch": 32,
        "beam": 10,
        "search_seconds": 0.1,
        "lm_seconds": seconds - 0.1,
        "llm_rtf": (seconds - 0.1) / 400,
        "times_slower_than_shallow": seconds / 2.0,
        **more,
    }


def a_day(shape: str = "mistral-7b") -> dict:
    """A day's file, as tools/gpu/day.py writes it."""
    fusion = [
        fusion_row("llm-shallow", 2.0),
        fusion_row("llm-delayed-shortest", 0.6, host_share=0.3),
        fusion_row("llm-delayed-interval-16", 0.4, host_share=0.25),
    ]
    profile = {
        "section": "event",
        "method": "llm-delayed-interval-16",
        "batch": 32,
        "wall_us": 9000.0,
        "idle_share": 0.4,
        "idle_us_by_mark": {"launch": 3000.0},
        "calls": {"launches": {"count": 300, "us": 900.0}},
        "kernels": [{"name": "gemm|a", "count": 224, "us": 5000.0, "share": 0.9}],
    }
    steps = {
        "smoke": {
            "status": "done",
            "seconds": 30.2,
            "command": "tools/gpu/smoke.py --device cuda --output /tmp/a",
            "result": {"rows": [{"kernel": "alone", "good": True, "worst": 0.5}]},
        },
        "fusion-7b": {
            "status": "cut off",
            "seconds": 110,
            "command": "tools/bench/fusion.py --shape mistral-7b",
            "result": {"rows": fusion, "options": {"shape": shape}, "machine": {"git_commit": "abc"}},
        },
        "frame_loop": {
            "status": "done",
            "command": "tools/bench/frame_loop.py",
            "result": {
                "rows": [
                    {
                        "engine": "triton",
                        "batch": 128,
                        "beam": 10,
                        "every": 0,
                        "loop_us": 40.0,
                        "whole_us": 70.0,
                    },
                    {"engine": "torch", "batch": 128, "beam": 10, "every": 0, "missing": "no | memory"},
                ]
            },
        },
        "profile": {
            "status": "done",
            "command": "tools/bench/profile_fusion.py",
            "result": {"rows": [profile]},
        },
        "training": {"status": "no time"},
    }
    return {
        "call": 1,
        "device": "cuda",
        "seconds": 400.0,
        "steps": steps,
        "switched_off": ["a kernel"],
        "machine": {"gpu": "NVIDIA H200", "gpu_bytes": 150 * 2**30, "torch": "2.11.0", "python": "3.12.3"},
        "packed": {"commit": "57b227e"},
    }


def test_figures_become_tables_and_aims_are_met_or_missed() -> None:
    text = "\n".join(gpu_page.measured([a_day()]))
    assert "NVIDIA H200, 150 GiB; python 3.12.3, torch 2.11.0; commit 57b227e; 400 s; switched off" in text
    assert "beam 10 (whole call) | 70.0 us (frame_loop: batch 128) | **missed** |" in text
    assert "| 40.0 us (frame_loop: batch 128) | met |" in text
    whose = "(fusion-7b: method llm-delayed-interval-16, batch 32)"
    assert f"| LLM RTF at most 0.001 | 0.00075 {whose} | met |" in text and f"0.20 {whose} | met |" in text
    assert "| host below 20 % of the time | 0.25 " in text and "| **missed** |" in text
    assert "| an LLM event at 7B: at most 1.6 times its floor |  | not measured |" in text
    assert "| fusion-7b | cut off | 110 | `tools/bench/fusion.py --shape mistral-7b` |" in text
    assert "`tools/gpu/smoke.py --device cuda`" in text and "| training | no time |" in text
    assert "| torch | 128 | 10 | 0 | - | - | no / memory |" in text
    assert "**event** of llm-delayed-interval-16, 32 utterances: 9.00 ms" in text
    assert "| gemm/a | 224 |" in text


def test_what_another_model_took_meets_no_aim_of_a_7b_model() -> None:
    text = "\n".join(gpu_page.measured([a_day(shape="")]))
    assert "| LLM RTF at most 0.001 |  | not measured |" in text


def test_floors_are_those_of_calls_or_of_tokens() -> None:
    row = {
        "method": "llm-delayed-interval-16",
        "batch": 64,
        "audio_seconds": 100.0,
        "kv_bytes_a_token": 256,
        "kv_bytes_peak": 2**20,
    }
    few, many = {**row, "lm_forwards": 100, "lm_tokens_forwarded": 10}, {**row, "lm_forwards": 1}
    many["lm_tokens_forwarded"] = 10_000
    none = {"method": "ctc-prefix", "lm_forwards": 0}
    lines = gpu_page.predicted([few, many, none])
    assert len(lines) == 4 and lines[0].startswith("| method | batch | LM calls |")
    assert "| 100 | 10 | 0.33 | 0.00 | 0.00331 | 0.00529 | 512 |" in lines[2]
    assert "| 1 | 10,000 | 0.00 | 0.18 | 0.00182 | 0.00292 | 512 |" in lines[3]


def test_one_command_fills_the_page_and_can_fill_it_again(tmp_path) -> None:
    page, day, counts = tmp_path / "page.md", tmp_path / "gpu.json", tmp_path / "counts.json"
    page.write_text(RESULTS.read_text(encoding="utf-8"))
    day.write_text(json.dumps(a_day()))
    counts.write_text(json.dumps({"rows": []}))
    gpu_page.main([str(day), "--page", str(page)])
    once = page.read_text()
    assert "NVIDIA H200" in once and once.startswith("# Results on MiniBooks")
    assert "*Not measured yet.*\n<!--" not in once
    before = RESULTS.read_text(encoding="utf-8").split(gpu_page.MEASURED)[0]
    assert once.startswith(before)  # predictions stay
    gpu_page.main([str(day), "--page", str(page), "--counts", str(counts)])
    gpu_page.main([str(day), "--page", str(page)])
    assert page.read_text().count("NVIDIA H200") == 1 and page.read_text().count(gpu_page.END) == 1
    page.write_text("nothing")
    with pytest.raises(ValueError, match="the page must have the line '<!-- gpu_page.py: measured -->'"):
        gpu_page.main([str(day), "--page", str(page)])


def test_a_columns_number_keeps_its_kind() -> None:
    column = gpu_tables.Column("x", "x", "{:,}")
    assert [column.cell({"x": value}) for value in (1234, None, True, "a|b")] == ["1,234", "-", "yes", "a|b"]
    assert gpu_tables.table([{"x": 1}, {"y": 2}], [column, gpu_tables.Column("z", "z")]) == [
        "| x |",
        "| --- |",
        "| 1 |",
        "| - |",
    ]
