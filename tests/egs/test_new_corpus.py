"""egs/README.md's new corpus: its files are made as they stand there, and run from manifests to the table.
Knows: the page's code blocks. Must not know: what stages do.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import tiny
import torch
import yaml
from torch import nn

from tests.acoustic.test_transducer_sources import Encoder, Export, write

EGS = Path(__file__).resolve().parents[2] / "egs"


def make_recipe(folder: Path) -> Path:
    """Write the page's files beside copies of what they source; return the recipe's folder."""
    recipe = folder / "egs" / "mycorpus" / "ASR"
    page = (EGS / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"```\w+ file=(\S+)\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in files] == ["local/manifests.py", "prepare.sh", "train.sh", "decode.sh"]
    for name, content in files:
        (recipe / name).parent.mkdir(parents=True, exist_ok=True)
        (recipe / name).write_text(content)
    for script in EGS.glob("*.sh"):
        shutil.copy(script, folder / "egs" / script.name)
    (folder / "icefall_fusion").symlink_to(EGS.parent / "icefall_fusion")
    shutil.copytree(EGS / "libriheavy" / "ASR" / "conf" / "tiny", recipe / "conf")
    shutil.copy(EGS / "libriheavy" / "ASR" / "conf" / "decode.yaml", recipe / "conf")
    for name, more in (("ctc_aed", {"avg": 1}), ("nlm", {})):
        options = {**yaml.safe_load((recipe / "conf" / f"{name}.yaml").read_text()), **more}
        options["trainer"].update(max_steps=2, valid_every_steps=2, save_every_steps=2)
        (recipe / "conf" / f"{name}.yaml").write_text(yaml.safe_dump(options))
    return recipe


def make_corpus(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    for split, count in (("train", 24), ("dev", 3), ("test", 3)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            path = folder / split / f"{split}-{number}.flac"
            soundfile.write(path, rng.normal(0, 0.1, 24000 + 1000 * number), 16000)
            text = tiny.LINES[number % 4].capitalize() + "."
            path.with_suffix(".txt").write_text(f"{text} {text}" if split == "train" else text)
    return folder


def test_a_new_corpus_is_the_files_of_the_page(tmp_path: Path) -> None:
    recipe, corpus = make_recipe(tmp_path), make_corpus(tmp_path / "corpus")
    llm = tiny.language_model(tmp_path / "llm", 3, pieces=False)
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def run(*command: str, code: int = 0) -> str:
        done = subprocess.run(["bash", *command], cwd=recipe, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def rows(exp: str = "exp") -> list[tuple[str, str, int]]:
        content = json.loads((recipe / exp / "report" / "results.json").read_text())
        return [(row["method"], row["test_set"], row["words"]) for row in content]

    run("prepare.sh", "--source", str(corpus), "--pieces", "40", "--workers", "1")
    options = ("--stop-stage", "0", "--world-size", "2", "--", "--trainer.max_minutes", "0.001")
    assert "the training was stopped" in run("train.sh", *options, code=4)  # torchrun itself ends with 1
    assert not (recipe / "exp" / ".ctc_aed.done").exists()
    run("train.sh")
    steps = [json.loads(line)["step"] for line in (recipe / "exp" / "ctc_aed" / "log.jsonl").open()]
    assert max(steps) == 2 and "stage 0 (ctc_aed) is done" in run("train.sh")
    mark = recipe / "data" / ".features.done"  # prepare.sh with other options that gave the same data
    mark.write_text(mark.read_text() + "max_missing: 0.1\n")
    assert "stage 0 (ctc_aed) is done" in run("train.sh")
    said = run("train.sh", "--acoustic", "--model.ctc_weight 0.4")
    assert "stage 0: ctc_aed, again" in said
    assert (recipe / "exp" / "ctc_aed.1" / "log.jsonl").exists()
    methods = "ctc-prefix,llm-delayed-shortest-ahead"
    decode = ("decode.sh", "--methods", methods, "--confirm", "2", "--llm")
    run(*decode, str(llm))
    words = sum(len(line.split()) for line in tiny.LINES[:3])
    assert rows() == [(method, "test", words) for method in methods.split(",")]
    weights = yaml.safe_load((recipe / "exp" / "weights.yaml").read_text())["weights"]
    assert list(weights) == ["llm-delayed-shortest-ahead"]

    other = tiny.language_model(tmp_path / "other-llm", 4, pieces=False)
    said = run(*decode, str(other))
    assert "stage 0: tune-decode, again" in said and "stage 2: decode, again" in said
    for folder, used in (("decode.1", llm), ("decode", other)):
        record = json.loads((recipe / "exp" / folder / "run.json").read_text())
        assert record["options"]["llm"]["path"] == str(used)
    said = run(*decode, str(other), "--methods", "ctc-greedy")  # beside the rows that are there
    assert "stage 0 (tune-decode) is done" in said
    assert {row[0] for row in rows()} == {"ctc-greedy", *methods.split(",")}

    path = recipe / "exp" / "weights.yaml"  # as if the method had been tuned anew, together with others
    path.write_text(yaml.safe_dump({"weights": {"llm-delayed-shortest-ahead": {"llm": 0.123, "words": 0.5}}}))
    said = run(*decode, str(other), "--stage", "2")
    assert "nbest-test-llm-delayed-shortest-ahead.jsonl was made with other options" in said
    with (recipe / "exp" / "decode" / "nbest-test-llm-delayed-shortest-ahead.jsonl").open() as file:
        assert json.loads(file.readline())["options"]["weights"]["llm"] == 0.123
    assert {row[0] for row in rows()} == {"ctc-greedy", *methods.split(",")}

    tiny.hugging_face_ctc(tmp_path / "wav2vec2")
    said = run("decode.sh", "--llm", str(llm), "--emissions", str(tmp_path / "wav2vec2"), "--emissions-kind",
               "huggingface", "--exp-dir", "exp-hf", "--confirm", "0")
    assert "attention-rescoring is left out" in said and "methods with nlm are left out" in said
    left = [row[0] for row in rows("exp-hf")]
    assert {"ctc-prefix", "llm-nbest-rescoring", "llm-delayed-shortest"} <= set(left)
    assert not [name for name in left if "attention" in name or "nlm" in name or "ngram" in name]

    torch.manual_seed(6)
    folder = tiny.write_bpe(tmp_path / "rnnt").parent
    export = Export(tiny.piece_count(), Encoder()).eval()
    export.ctc_output = nn.Sequential(nn.Linear(24, tiny.piece_count()), nn.LogSoftmax(dim=-1))
    transducer = write(export, folder)
    methods = "rnnt-beam,rnnt-llm-delayed-shortest"
    run("decode.sh", "--llm", str(llm), "--emissions", transducer, "--methods", methods, "--confirm", "2",
        "--exp-dir", "exp-rnnt")
    assert [row[0] for row in rows("exp-rnnt")] == methods.split(",")
    weights = yaml.safe_load((recipe / "exp-rnnt" / "weights.yaml").read_text())["weights"]
    assert list(weights) == ["rnnt-llm-delayed-shortest"]
    run("decode.sh", "--llm", str(llm), "--emissions", transducer, "--methods", "ctc-prefix",
        "--confirm", "2", "--exp-dir", "exp-rnnt")  # another search: beside the rows that are there
    assert {row[0] for row in rows("exp-rnnt")} == {"ctc-prefix", *methods.split(",")}

    for pieces in ("39", "38"):  # what was set aside stays as it is
        run("prepare.sh", "--source", str(corpus), "--pieces", pieces, "--workers", "1", "--stop-stage", "1")
    folders = sorted(path.name for path in (recipe / "data").glob("lang_bpe_*"))
    assert folders == ["lang_bpe_38", "lang_bpe_39.1", "lang_bpe_40.1"]
