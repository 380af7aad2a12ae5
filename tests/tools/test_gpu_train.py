"""tools/gpu_train.sh from text to models and a card, on a CPU with the smallest sizes; killed and resumed.
Knows: the script and its files. Must not know: how models are trained.
"""
from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from icefall_fusion.acoustic.models import load
from icefall_fusion.common.command_line import parse_options
from icefall_fusion.train.acoustic_model import TrainOptions
from icefall_fusion.train.language_model import TrainLmOptions

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "egs/minibooks/ASR/conf"
sys.path.insert(0, str(ROOT / "tools/gpu"))

import carried  # noqa: E402

OPTIONS = ("--device", "cpu", "--tiny", "--minutes", "15", "--train-minutes", "0.1", "--lm-minutes", "0.05",
           "--workers", "1", "--speak-share", "0.005")


def begin(folder: Path, *more: str) -> subprocess.Popen:
    command = ["bash", "tools/gpu_train.sh", *OPTIONS, "--out", str(folder / "out")]
    command += ["--work", str(folder / "work")]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *more], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_text_becomes_models_and_a_card_also_after_a_kill(tmp_path: Path) -> None:
    """Killed while it trains, the newest averages are there; resumed, it keeps speech and checkpoint."""
    out = tmp_path / "out"
    first = begin(tmp_path)
    while not (out / "ctc_aed/config.json").is_file():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode != 0
    model = load(out / "ctc_aed")
    half = json.loads((out / "card.json").read_text())
    assert half["training"]["steps"] > 0 and half["hours spoken"]["dev"] > 0 and "results" not in half

    second = begin(tmp_path, "--resume")
    said = second.communicate(timeout=600)[0]
    assert second.returncode == 0, said
    assert "speech of" not in said
    card = json.loads((out / "card.json").read_text())
    assert card["training"]["steps"] >= half["training"]["steps"]
    assert 0.1 <= card["training"]["minutes"] < 1.0 and card["curve"][-1]["valid_loss"] > 0
    rows = {(row["test_set"], row["method"]) for row in card["results"]}
    assert rows == {(split, method) for split in ("dev", "test-clean", "test-other")
                    for method in ("ctc-greedy", "ctc-prefix")}
    assert card["llm"] and card["machine"] and card["books"] == 6 and card["error"] is None
    assert not card["dev and test are the recipe's"]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert all(path.stat().st_size <= 16 * 2**20 for path in files) and not (out / "log.jsonl").exists()
    assert load(out / "ctc_aed").tokens.size == model.tokens.size == 500
    whole = b"".join(path.read_bytes() for path in sorted(out.glob("llm.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(whole)) as llm:
        assert {"llm/config.json", "llm/model.safetensors", "llm/tokenizer.json"} <= set(llm.getnames())


def test_books_come_from_folders_files_and_archives(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some/one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("two")
    with tarfile.open(tmp_path / "more.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "two.txt", "deep/three.txt")
    carried.unpack([tmp_path / "some", tmp_path / "two.txt", tmp_path / "more.tar.xz"], tmp_path / "books")
    assert sorted(path.name for path in (tmp_path / "books").iterdir()) == ["one.txt", "three.txt", "two.txt"]
    with pytest.raises(FileNotFoundError, match="--text must name .*none.txt"):
        carried.unpack([tmp_path / "none.txt"], tmp_path / "books")
    assert len(carried.held_out_books(None)) == carried.HELD_OUT
    assert carried.held_out_books(tmp_path / "books") == ["one", "three", "two"]


@pytest.mark.parametrize("folder", [CONF, CONF / "tiny"])
def test_the_recipes_of_a_gpu_are_options_of_the_jobs(folder: Path) -> None:
    train = parse_options(TrainOptions, ["--config", str(folder / "ctc_aed_gpu.yaml")], "train")
    assert train.trainer.by_time and train.data.resident and train.export_weights == "ema"
    assert train.model.chunk_probability == 0.5 and not train.compile
    lm = parse_options(TrainLmOptions, ["--config", str(folder / "llm_gpu.yaml")], "train-lm")
    assert lm.trainer.by_time and lm.trainer.ema_decay > 0
    if folder == CONF:  # what comes back takes the place of the shipped model
        shipped = json.loads((folder.parent / "pretrained/ctc_aed/config.json").read_text())["options"]
        made = yaml.safe_load((folder / "ctc_aed_gpu.yaml").read_text())["model"]
        for part in ("encoder", "decoder"):
            assert {**shipped[part], "dropout": 0.1} == {**shipped[part], **made[part]}
