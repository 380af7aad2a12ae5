"""Job ``train``: learns, goes on after a stop with the same result, exports a loadable average.
Knows: the job, cuts. Must not know: search, fusion.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import soundfile
import tiny
import torch
import yaml

from icefall_fusion.acoustic.models import CtcAed, DecoderOptions, EncoderOptions, ModelOptions, load
from icefall_fusion.common.command_line import UNFINISHED
from icefall_fusion.data.datamodule import DataOptions, EvalBatches
from icefall_fusion.data.manifests import cut_of, cuts_path, write_cuts
from icefall_fusion.text.language import Language
from icefall_fusion.text.tokens import AcousticTokens
from icefall_fusion.train.acoustic_model import TrainOptions, log_probs_of_noise, make_trainer, run
from icefall_fusion.train.checkpoints import (
    DoesNotFit,
    average_checkpoints,
    list_checkpoints,
    newest_checkpoint,
)
from icefall_fusion.train.curriculum import feature_statistics
from icefall_fusion.train.job import EXPORT_TOLERANCE, check_export
from icefall_fusion.train.options import TrainerOptions
from icefall_fusion.train.spelling import check_spelling

TONES = {"low": 300.0, "mid": 900.0, "high": 2500.0}  # a word sounds as its tone


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("dev", 4)):
        cuts = []
        for number in range(count):
            words = random.choice(list(TONES), size=4).tolist()
            time = np.arange(8000) / 16000
            sound = np.concatenate([0.3 * np.sin(2 * np.pi * TONES[word] * time) for word in words])
            path = folder / f"{split}-{number}.wav"
            soundfile.write(path, sound + 0.01 * random.standard_normal(len(sound)), 16000)
            utterance = {"id": path.stem, "text": " ".join(words)}
            cuts.append(cut_of(utterance, path, len(sound), {"voice": "tone"}))
        write_cuts(cuts, cuts_path(folder / "fbank", split))
    tiny.write_bpe(folder / "lang_bpe_500", [" ".join(TONES)] * 20, 20)
    return folder


def options_for(data_dir: Path, exp: Path, **trainer) -> TrainOptions:
    bpe = sentencepiece.SentencePieceProcessor(str(data_dir / "lang_bpe_500" / "bpe.model"))
    small = {"size": 16, "heads": 2, "feedforward": 16}
    return TrainOptions(
        data_dir=str(data_dir),
        exp=str(exp),
        avg=2,
        threads=1,
        stats_seconds=5.0,
        easy_batches=3,
        easy_seconds=8.0,
        device="cpu",
        data=DataOptions(max_duration=8.0, max_seconds=8.0, num_buckets=2, workers=0, time_warp=0),
        model=ModelOptions(
            vocab_size=bpe.get_piece_size(),
            encoder=EncoderOptions(layers=(1, 1, 1), kernel=5, **small),
            decoder=DecoderOptions(layers=1, heads=2, feedforward=16),
        ),
        trainer=TrainerOptions(
            **{
                "lr": 5e-3,
                "warmup_steps": 2,
                "max_steps": 8,
                "save_every_steps": 4,
                "save_every_minutes": 0,
                "valid_every_steps": 4,
                "tensorboard": False,
                **trainer,
            }
        ),
    )


def test_a_training_begins_from_a_model_folder(data_dir: Path, tmp_path: Path) -> None:
    first = options_for(data_dir, tmp_path / "first", max_steps=4)
    assert run(first) == 0
    folder = tmp_path / "first" / "export"
    second = dataclasses.replace(first, exp=str(tmp_path / "second"), init=str(folder))
    source, made = load(folder), make_trainer(second, torch.device("cpu")).model
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in source.state_dict().items())
    assert run(second) == 0  # and goes on from its own checkpoints afterwards, whatever `init` holds
    newest = torch.load(tmp_path / "second" / "checkpoint-4.pt", weights_only=True)["model"]
    again = make_trainer(dataclasses.replace(second, init=str(tmp_path)), torch.device("cpu")).model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in newest.items())
    other = dataclasses.replace(second.model, decoder=DecoderOptions(layers=2, heads=2, feedforward=16))
    with pytest.raises(ValueError, match="TrainOptions.init .*: decoder must be .*layers=2"):
        run(dataclasses.replace(second, exp=str(tmp_path / "third"), model=other))
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        run(dataclasses.replace(second, exp=str(tmp_path / "third"), init=str(tmp_path)))


def test_another_language_begins_from_the_encoder_alone(data_dir: Path, tmp_path: Path) -> None:
    first = options_for(data_dir, tmp_path / "first", max_steps=4)
    assert run(first) == 0
    folder = str(tmp_path / "first" / "export")
    tiny.write_bpe(tmp_path / "other", ["low mid high low", "otra lengua", "high mid"] * 20, 22)
    size = sentencepiece.SentencePieceProcessor(str(tmp_path / "other" / "bpe.model")).get_piece_size()
    model = dataclasses.replace(first.model, vocab_size=size)
    other = dataclasses.replace(first, exp=str(tmp_path / "second"), bpe=str(tmp_path / "other"), model=model,
                                language="es", init=folder)
    with pytest.raises(ValueError, match="vocab_size must be"):
        make_trainer(other, torch.device("cpu"))
    other = dataclasses.replace(other, init_encoder=True)
    made, source = make_trainer(other, torch.device("cpu")).model, load(folder)
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(value, made.encoder.state_dict()[name])
    assert run(other) == 0
    assert load(tmp_path / "second" / "export").language.name == "es"  # and it is kept
    with pytest.raises(ValueError, match="init_encoder must be left alone without TrainOptions.init"):
        dataclasses.replace(other, init="")


def test_text_that_pieces_or_language_do_not_spell_is_told(data_dir: Path, tmp_path: Path, caplog) -> None:
    def manifest(*texts: str) -> Path:
        cuts = [cut_of({"id": f"u{number}", "text": text}, tmp_path / "a.flac", 16000, {"voice": "v"})
                for number, text in enumerate(texts)]
        write_cuts(cuts, tmp_path / "cuts.jsonl.gz")
        return tmp_path / "cuts.jsonl.gz"

    tokens = AcousticTokens.load(data_dir / "lang_bpe_500")
    check_spelling(manifest("low mid", "high", ""), tokens, Language())
    assert not caplog.records
    check_spelling(manifest("low zebra", "mid low", "quiz"), tokens, Language())
    assert "2 of 3 texts" in caplog.text and "e.g. 'z' in u0: 'low zebra'" in caplog.text
    with pytest.raises(ValueError, match="texts must be spelled by the acoustic pieces.*'你好'"):
        check_spelling(manifest("你好", "世界"), tokens, Language("zh"))
    with pytest.raises(ValueError, match="must have words of the language 'en', but of 2 of 3"):
        check_spelling(manifest("low", "世界", "你好"), tokens, Language())
    caplog.clear()
    check_spelling(manifest("low", "世界", "mid"), tokens, Language())
    assert "the language 'en' has no word of 1 of 3, e.g. u1: '世界'" in caplog.text


def test_training_resumes_to_the_same_model_and_exports_an_average(data_dir: Path, tmp_path: Path) -> None:
    def with_dropout(exp: str) -> TrainOptions:  # its masks go on too, in the middle of an epoch
        options = options_for(data_dir, tmp_path / exp)
        encoder = dataclasses.replace(options.model.encoder, dropout=0.3)
        return dataclasses.replace(options, model=dataclasses.replace(options.model, encoder=encoder))

    whole = with_dropout("whole")
    assert run(whole) == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid_loss" in line] == [4, 8]
    assert lines[-1]["valid_loss"] < lines[0]["valid_loss"] and "valid_greedy_wer" in lines[-1]

    parted = with_dropout("parted")
    stopped = dataclasses.replace(parted, trainer=dataclasses.replace(parted.trainer, max_minutes=1e-9))
    assert run(stopped) == UNFINISHED == 4  # no script may take it for finished
    assert not (tmp_path / "parted" / "checkpoint-8.pt").exists()
    assert (tmp_path / "parted" / "stopped").read_text() == "max_minutes at step 1 of 8\n"
    assert run(parted) == 0
    assert not (tmp_path / "parted" / "stopped").exists()
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint-4.pt", tmp_path / "killed")  # what a kill after it leaves
    assert run(with_dropout("killed")) == 0
    first, *others = (
        torch.load(tmp_path / name / "checkpoint-8.pt", weights_only=True)["model"]
        for name in ("whole", "parted", "killed")
    )
    assert all(torch.equal(first[name], second[name]) for second in others for name in first)

    exported = load(tmp_path / "whole" / "export")
    assert exported.tokens.size == whole.model.vocab_size
    torch.testing.assert_close(exported.encoder.mean, first["encoder.mean"])
    assert run(dataclasses.replace(whole, export_to=str(tmp_path / "out"))) == 0
    assert torch.equal(load(tmp_path / "out").ctc.linear.weight, exported.ctc.linear.weight)


def test_a_training_by_the_clock_exports_the_moving_average_in_several_files(
    data_dir: Path, tmp_path: Path
) -> None:
    """As on a GPU: features in memory, computed from audio; the length in minutes; chunk masks in half."""
    options = options_for(data_dir, tmp_path / "exp", max_steps=None, progress="time", max_minutes=0.05,
                          save_every_steps=2, valid_every_steps=0, ema_decay=0.9)
    options = dataclasses.replace(
        options, export_weights="ema", export_shards="20KB",
        data=dataclasses.replace(options.data, resident=True),
        model=dataclasses.replace(options.model, chunk_probability=0.5),
    )
    assert run(options) == 0
    newest = torch.load(newest_checkpoint(tmp_path / "exp"), weights_only=True)
    assert newest["seconds"] >= 3.0 and newest["ema"]["updates"] == newest["step"] > 1
    exported = load(tmp_path / "exp" / "export").state_dict()
    assert len(list((tmp_path / "exp" / "export").glob("model-*.safetensors"))) > 1
    for name, mean in newest["ema"]["weights"].items():
        torch.testing.assert_close(exported[name], mean, rtol=1e-3, atol=1e-4)
    line = json.loads((tmp_path / "exp" / "log.jsonl").read_text().splitlines()[-1])
    assert line["valid_loss"] > 0 and run(options) == 0  # its time is over: it exports again
    assert newest_checkpoint(tmp_path / "exp").name == f"checkpoint-{newest['step']}.pt"
    with pytest.raises(ValueError, match="trainer.ema_decay must be above 0 for export_weights ema"):
        dataclasses.replace(options, trainer=dataclasses.replace(options.trainer, ema_decay=0.0))


def test_exports_keep_the_log_probs_of_the_trained_model(data_dir: Path, tmp_path: Path) -> None:
    """On real features; weights that a float16 cannot hold are refused before anything is written."""
    options = options_for(data_dir, tmp_path / "exp")
    assert run(options) == 0
    trained = CtcAed(options.model, data_dir / "lang_bpe_500").eval()
    trained.load_state_dict(average_checkpoints(list_checkpoints(tmp_path / "exp")[-2:]))
    batch = next(iter(EvalBatches(cuts_path(data_dir / "fbank", "dev"), options.data)))

    def change(folder: Path) -> float:
        outputs = [
            model.ctc_log_probs(model.encoder(batch["features"], batch["lens"])[0])
            for model in (trained, load(folder))
        ]
        return float((outputs[0] - outputs[1]).abs().max())

    with torch.inference_mode():
        assert 0 < change(tmp_path / "exp" / "export") < EXPORT_TOLERANCE / 10
        whole = dataclasses.replace(options, export_to=str(tmp_path / "out"), export_dtype="float32")
        assert run(whole) == 0 and change(tmp_path / "out") == 0

    path = list_checkpoints(tmp_path / "exp")[-1]
    state = torch.load(path, weights_only=True)
    state["model"]["ctc.linear.weight"][0, 0] = 1e6
    torch.save(state, path)
    refused = dataclasses.replace(options, export_to=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="export_dtype float16 must keep log-probs, on average, within 0.1"):
        run(refused)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("heads", ["ctc", "aed", "transducer"])
def test_every_head_alone_is_checked_before_an_export(heads: str) -> None:
    torch.manual_seed(0)
    encoder = EncoderOptions(layers=(1, 1, 1), kernel=5, size=16, heads=2, feedforward=16)
    decoder = DecoderOptions(layers=1, heads=2, feedforward=16)
    options = ModelOptions(vocab_size=20, encoder=encoder, decoder=decoder, heads=(heads,))
    model = CtcAed(options).eval()
    check_export(model, "float16", log_probs_of_noise)
    head = {"ctc": model.ctc, "aed": model.decoder, "transducer": model.transducer}[heads]
    with torch.no_grad():
        for weights in head.parameters():
            weights[0] = 7e4  # infinite in float16
    with pytest.raises(DoesNotFit, match="export_dtype float16 must keep log-probs"):
        check_export(model, "float16", log_probs_of_noise)


@pytest.mark.parametrize("ctc_weight, middle_weight", [(0.4, 0.3), (1.0, 0.0)])
def test_two_processes_under_torchrun_equal_one_that_accumulates(
    data_dir: Path, tmp_path: Path, ctc_weight: float, middle_weight: float
) -> None:
    """The same batches, two at a time, an epoch long; also where parts of the model are not trained at all.

    A stop in between leaves its mark, as torchrun turns exit code 4 into 1.
    """
    whole = options_for(data_dir, tmp_path / "one", accumulate=2, max_steps=3, precision="float32")
    shares = {"ctc_weight": ctc_weight, "middle_weight": middle_weight}
    model = dataclasses.replace(whole.model, **shares)
    # six batches an epoch: three steps of two
    data = dataclasses.replace(whole.data, max_duration=4.2, max_seconds=4.0, spec_augment=False)
    whole = dataclasses.replace(whole, model=model, data=data, easy_batches=0, stats_seconds=1000.0)
    assert run(whole) == 0
    trainer = dataclasses.replace(whole.trainer, accumulate=1, max_steps=None, max_epochs=1.0)
    two = dataclasses.replace(whole, exp=str(tmp_path / "two"), trainer=trainer)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(two)))))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "icefall_fusion"]
    command += ["train", "--config", str(tmp_path / "two.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    mark = tmp_path / "two" / "stopped"
    if ctc_weight < 1:
        stopped = [sys.executable, *command, "--trainer.max_minutes", "1e-9"]
        assert subprocess.run(stopped, env=environment).returncode == 1
        assert mark.read_text() == "max_minutes at step 1 of 3\n"
    subprocess.run([sys.executable, *command], check=True, env=environment)
    assert not mark.exists()
    one, two = (
        [json.loads(line)["valid_loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 1 and two[-1:] == pytest.approx(one, rel=1e-4)


def test_a_signal_to_the_whole_process_group_ends_with_a_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    """As Ctrl-C, or a scheduler that stops a job: the data loader's workers get the signal too."""
    endless = options_for(data_dir, tmp_path / "exp", max_steps=10**6, save_every_steps=2)
    endless = dataclasses.replace(endless, data=dataclasses.replace(endless.data, workers=1))
    plain = json.loads(json.dumps(dataclasses.asdict(endless)))
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(plain))
    for number in (signal.SIGTERM, signal.SIGINT):
        training = subprocess.Popen(
            [sys.executable, "-m", "icefall_fusion", "train", "--config", str(tmp_path / "options.yaml")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            start_new_session=True, stderr=subprocess.PIPE, text=True,
        )
        begun = len(list_checkpoints(tmp_path / "exp"))
        last = newest_checkpoint(tmp_path / "exp")
        while newest_checkpoint(tmp_path / "exp") == last:  # it trains
            assert training.poll() is None, training.stderr.read()
            time.sleep(0.1)
        os.killpg(training.pid, number)
        _, printed = training.communicate(timeout=120)
        assert training.returncode == UNFINISHED, printed
        assert "'reason': 'signal'" in printed and len(list_checkpoints(tmp_path / "exp")) >= max(1, begun)


def test_a_signal_while_a_worker_starts_does_not_end_it(data_dir: Path) -> None:
    """Ctrl-C may come between the fork of a worker and its first instruction."""
    code = """
import os, signal, sys
from icefall_fusion.data.datamodule import DataOptions, EvalBatches

os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
batches = list(EvalBatches(sys.argv[1], DataOptions(workers=1)))
assert batches
"""
    manifest = data_dir / "fbank" / "minibooks_cuts_dev.jsonl.gz"
    done = subprocess.run([sys.executable, "-c", code, str(manifest)], capture_output=True, text=True,
                          timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_an_error_in_a_worker_ends_the_training(data_dir: Path, tmp_path: Path) -> None:
    """Whatever workers do with signals, they must be gone when the trainer is."""
    code = """
import sys, pickle
from icefall_fusion.common.command_line import exit_code
from icefall_fusion.data import datamodule

class Broken:
    def __getitem__(self, place):
        raise RuntimeError("a worker that fails")

loader = datamodule._loader(Broken(), [0, 1, 2], datamodule.DataOptions(workers=1), False)
sys.exit(exit_code(lambda options: list(loader), None))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and "a worker that fails" in done.stderr


def test_export_without_checkpoints_says_so(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        run(dataclasses.replace(options_for(data_dir, tmp_path), export_to=str(tmp_path / "out")))


def test_avg_is_limited_by_what_is_kept(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"TrainOptions.avg must be in 1..3 .* but is 4"):
        dataclasses.replace(options_for(data_dir, tmp_path), avg=4)


def test_feature_statistics_pass_over_padding() -> None:
    features = torch.tensor([[[1.0], [3.0]], [[5.0], [float("nan")]]])
    batch = {"features": features, "lens": torch.tensor([2, 1])}
    mean, deviation = feature_statistics([batch], 1.0)
    assert mean.tolist() == [3.0] and deviation.item() == pytest.approx((8 / 3) ** 0.5)
    with pytest.raises(ValueError, match="at least one feature frame"):
        feature_statistics([], 1.0)
