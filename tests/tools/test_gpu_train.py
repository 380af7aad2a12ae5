"""tools/gpu_train.sh from text to models and a card, on a CPU with the smallest sizes; killed and resumed.
Knows: the script and its files. Must not know: how models are trained.
"""
from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
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
import processes  # noqa: E402
import train  # noqa: E402

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


def test_books_to_train_on_are_cut_to_their_beginnings(tmp_path: Path) -> None:
    """So much of each that there is enough to speak; those that dev and test are made of stay whole."""
    for number in range(carried.HELD_OUT + 3):
        text = "license\n*** START OF THIS\n" + "So it was.\n" * (1000 if number else 5)
        (tmp_path / f"{number:02d}.txt").write_text(text)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    carried.shorten(tmp_path, 3 * 300)
    after = {path.name: path.read_text() for path in tmp_path.iterdir()}
    cut = [name for name in before if after[name] != before[name]]
    assert sorted(cut) == ["01.txt", "02.txt"]
    for name in cut:
        assert before[name].startswith(after[name]) and after[name].endswith("was.\n")
        assert 280 <= len(after[name].partition("license\n")[2]) <= 300


def test_the_script_loads_no_package_to_find_out_whether_it_is_there() -> None:
    assert "import lhotse" not in (ROOT / "tools/gpu_train.sh").read_text()


def make_run(folder: Path, *more: str) -> train.Run:
    options = ["--minutes", "4", "--out", str(folder / "out"), "--work", str(folder / "work"), *more]
    return train.Run(train.parse(options), time.time())


def test_a_training_has_what_its_start_and_the_decodes_leave(tmp_path: Path) -> None:
    """Its clock begins when its features are loaded: what that takes is not the decodes'."""
    minutes = make_run(tmp_path, "--evaluation", "40").minutes_to_train()
    assert abs(minutes - (240 - 40 - train.TO_START) / 60) < 0.1
    assert make_run(tmp_path, "--train-minutes", "2.5").minutes_to_train() == 2.5


def test_all_splits_are_spoken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, together, seen = make_run(tmp_path), threading.Barrier(4), []

    def job(stage: str, *options: str, meanwhile: object) -> bool:
        together.wait(10)
        seen.append(stage)
        return True

    monkeypatch.setattr(run, "job", job)
    run.speak()
    assert sorted(seen) == sorted(f"speech of {split}" for split in (*train.SETS, "train"))


def test_where_a_task_fails_the_others_end(tmp_path: Path) -> None:
    def sleeps(meanwhile: object) -> None:
        processes.run_command(["sleep", "60"], 60, tmp_path / "said", dict(os.environ), meanwhile)

    def fails(meanwhile: object) -> None:
        raise RuntimeError("speech of dev failed")

    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="speech of dev failed"):
        processes.at_once([fails, sleeps])
    assert time.monotonic() - begun < 20


def test_minutes_too_few_for_an_llm_leave_the_log(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.out / "log.jsonl").write_text("{}\n")
    export = run.work / "llm" / "export"
    assert not run.carry_lm(export)
    assert [path.name for path in run.out.iterdir()] == ["log.jsonl"]
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    assert run.carry_lm(export)
    assert [path.name for path in run.out.iterdir()] == ["llm.tar.00"]


def test_an_export_that_changes_while_it_is_copied_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "--device", "cpu")
    (run.exp / "export").mkdir(parents=True)
    (run.exp / "export/config.json").write_text("{}")

    def vanishes(*given: object) -> None:
        raise shutil.Error([("model-00001-of-00002.safetensors", "", "no such file")])

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "copytree", vanishes)
        run.copy_export()
    assert not (run.out / "ctc_aed").exists()
    monkeypatch.setattr(train.card, "write", vanishes)  # its checkpoint, say
    run.copy_export()
    assert [path.name for path in run.out.iterdir()] == ["ctc_aed"]
    assert (run.out / "ctc_aed/config.json").is_file()


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
