"""Files of a run: what a kill or a full disk leaves, files of other versions, shares of several processes.
Knows: icefall_fusion.decode.run_files. Must not know: how lists came about.
"""
from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from icefall_fusion.common.processes import Processes
from icefall_fusion.decode.run_files import RunFile, SharedRunFile
from icefall_fusion.nbest import Hypothesis, NBest, read_nbests, write_nbests


def nbest(utterance: str) -> NBest:
    scores = {"ctc": -1.0, "words": 1.0, "total": -1.0}
    return NBest(utterance, [Hypothesis(tokens=[3], text="a", scores=scores)], {"ctc": 1.0})


def test_a_run_file_drops_a_batch_that_was_cut_short(tmp_path) -> None:
    file = RunFile(tmp_path, "s", "m", {"beam": 1})
    rates = ({"retokenize_words": n, "retokenize_hits": 4, "retokenize_hit_rate": 4 / n} for n in (4, 12))
    file.append([nbest("a"), nbest("b")], {"search": 1.0, "kv_bytes_peak": 5, **next(rates)})
    file.append([nbest("c")], {"search": 2.0, "kv_bytes_peak": 3, **next(rates)})
    file.close()
    with open(file.path, "a") as end:
        end.write('{"lists": [{"utterance": "d"')  # killed here
    file = RunFile(tmp_path, "s", "m", {"beam": 1})
    assert sorted(file) == ["a", "b", "c"] and file["b"] == nbest("b")
    assert '"utterance": "d"' not in file.path.read_text()
    assert file.totals() == {
        "search": 3.0, "kv_bytes_peak": 5, "retokenize_words": 16, "retokenize_hits": 8,
        "retokenize_hit_rate": 0.5,
    }
    file.close()
    with pytest.raises(ValueError, match="run of m with beam = 1, which is now 2"):
        RunFile(tmp_path, "s", "m", {"beam": 2})
    assert [one.utterance for one in read_nbests(file.path)] == ["a", "b", "c"]


def damaged(name: str) -> list[str]:
    """Return the lines of a run file of two batches, damaged in one way."""
    batch = json.dumps({"lists": [nbest("a").as_plain()], "cost": {"search": 1.0}})
    lines = ['{"options": {"beam": 1}}', batch, batch.replace('"a"', '"b"')]
    if name == "cut":
        lines[1] = batch[:50]
    elif name == "no cost":
        lines[1] = '{"lists": []}'
    elif name == "no list":
        lines[2] = '{"lists": [{"utterance": "b"}], "cost": {}}'
    elif name == "a number":
        lines[2] = "7"
    elif name == "no options":
        del lines[0]
    return lines


@pytest.mark.parametrize(
    ("name", "line"), [("cut", 2), ("no cost", 2), ("no list", 3), ("a number", 3), ("no options", 1)]
)
def test_a_damaged_line_is_named_and_the_file_stays(name, line, tmp_path) -> None:
    path = tmp_path / "nbest-s-m.jsonl"
    path.write_text("".join(text + "\n" for text in damaged(name)))
    before = path.read_bytes()
    rule = "options" if line == 1 else "lists"
    message = f"nbest-s-m.jsonl, line {line}, must be a JSON object with \"{rule}\".*--restart true"
    with pytest.raises(ValueError, match=message):
        RunFile(tmp_path, "s", "m", {"beam": 1})
    assert path.read_bytes() == before
    assert len(RunFile(tmp_path, "s", "m", {"beam": 1}, restart=True)) == 0


def test_a_file_of_lists_without_options_is_refused(tmp_path) -> None:
    """As the first version wrote them: a list a line."""
    write_nbests(tmp_path / "nbest-s-m.jsonl", [nbest("a"), nbest("b")])
    with pytest.raises(ValueError, match='nbest-s-m.jsonl, line 1, must be a JSON object with "options"'):
        RunFile(tmp_path, "s", "m", {"beam": 1})


def test_a_disk_that_is_full_at_the_first_line_is_named(tmp_path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file of this process may grow
    try:
        with pytest.raises(OSError) as raised:
            RunFile(tmp_path, "s", "m", {"beam": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(tmp_path / "nbest-s-m.jsonl")


def shared(folder: Path) -> SharedRunFile:
    return SharedRunFile(Processes(), folder, "set", "m", {"x": 1})


def test_what_processes_left_is_taken_in_once(tmp_path) -> None:
    for rank, names in enumerate((("a", "b"), ("c",))):
        share = RunFile(tmp_path / f"rank-{rank}", "set", "m", {"x": 1})
        share.append([nbest(name) for name in names], {"search": 1.0})
        share.close()
    kept = {path: path.read_bytes() for path in tmp_path.glob("rank-*/*")}
    file = shared(tmp_path)
    assert file.done == {"a", "b", "c"} and file.whole.totals() == {"search": 2.0}
    file.whole.close()
    for path, content in kept.items():  # as if killed before they were removed
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    file = shared(tmp_path)
    assert file.done == {"a", "b", "c"} and file.whole.totals() == {"search": 2.0}
    assert not list(tmp_path.glob("rank-*"))
    file.whole.close()

    share = RunFile(tmp_path / "rank-5", "set", "m", {"x": 1})
    share.append([nbest("c"), nbest("d")], {"search": 1.0})
    share.close()
    with pytest.raises(ValueError, match=r"must hold each utterance once, but 1 .* \['c'\]"):
        shared(tmp_path)


def finish_without_b(rank: int, folder: Path) -> None:
    """Be one of two processes of which the first has decoded ``a`` and the other nothing."""
    meet = f"file://{folder / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    file = SharedRunFile(Processes(rank, 2), folder, "set", "m", {"x": 1})
    if rank == 0:
        file.append([nbest("a")], {"search": 1.0})
    file.finish(["a", "b"])
    dist.destroy_process_group()


def test_missing_utterances_are_refused(tmp_path) -> None:
    with pytest.raises(mp.ProcessRaisedException, match=r"1 utterances of set are missing .* \['b'\]"):
        mp.spawn(finish_without_b, (tmp_path,), nprocs=2)
    file = SharedRunFile(Processes(), tmp_path, "set", "m", {"x": 1})
    assert file.done == {"a"}  # what was decoded is kept
    file.whole.close()
