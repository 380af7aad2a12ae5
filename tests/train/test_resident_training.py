"""Job ``train`` with all features in the device's memory, from spoken text on, against the loader's.
Knows: the jobs synthesize, compute-fbank and train. Must not know: search, fusion.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from icefall_fusion.acoustic.models import DecoderOptions, EncoderOptions, ModelOptions
from icefall_fusion.data import espeak
from icefall_fusion.data.datamodule import DataOptions
from icefall_fusion.data.fbank import FbankOptions
from icefall_fusion.data.fbank import run as compute_fbank
from icefall_fusion.data.synthesis import SynthesizeOptions
from icefall_fusion.data.synthesis import run as synthesize
from icefall_fusion.train.acoustic_model import TrainOptions, make_trainer, manifest_of, run
from icefall_fusion.train.options import TrainerOptions

pytestmark = pytest.mark.skipif(not espeak.available(), reason="espeakng-loader is not installed")
WORDS = "seven ships came home before the old keeper had counted them at breakfast".split()


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 utterances of training and 8 of dev: audio in joined files, no features."""
    folder, random = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    (folder / "text").mkdir()
    texts = []
    for split, count in (("train", 40), ("dev", 8)):
        texts = [" ".join(random.permutation(WORDS)[: int(random.integers(6, 12))]) for _ in range(count)]
        rows = [{"id": f"{split}-{at}", "text": text} for at, text in enumerate(texts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "text" / f"selected_{split}.jsonl").write_text(lines)
        assert synthesize(SynthesizeOptions(split, folder, workers=1, shard_size=20, joined=True)) == 0
    tiny.write_bpe(folder / "lang_bpe_500", [" ".join(WORDS)] * 20, 30)
    return folder


def options_for(data_dir: Path, exp: Path, **data: object) -> TrainOptions:
    small = {"size": 16, "heads": 2, "feedforward": 16}
    given = {"max_duration": 20.0, "max_seconds": 15.0, "num_buckets": 2, "workers": 0, "time_warp": 0}
    encoder = EncoderOptions(layers=(1, 1, 1), kernel=5, **small)
    decoder = DecoderOptions(layers=1, heads=2, feedforward=16)
    trainer = TrainerOptions(
        lr=5e-3, warmup_steps=2, max_steps=12, save_every_steps=6, save_every_minutes=0,
        valid_every_steps=3, log_every_steps=1, tensorboard=False,
    )
    return TrainOptions(
        data_dir=str(data_dir), exp=str(exp), avg=1, threads=1, easy_batches=2, easy_seconds=5.0,
        device="cpu", data=DataOptions(**{**given, **data}), trainer=trainer,
        model=ModelOptions(vocab_size=30, encoder=encoder, decoder=decoder),
    )


def curve(exp: Path) -> list[float]:
    lines = [json.loads(line) for line in (exp / "log.jsonl").read_text().splitlines()]
    return [line["valid_loss"] for line in lines if "valid_loss" in line]


def test_the_loss_is_that_of_the_loader_and_a_run_goes_on(spoken: Path, tmp_path: Path) -> None:
    plain = {"spec_augment": False}
    resident = options_for(spoken, tmp_path / "resident", resident=True, **plain)
    assert manifest_of(resident, "train").parent.name == "manifests"  # there are no features yet
    assert run(resident) == 0
    assert compute_fbank(FbankOptions(spoken, ("train", "dev"), workers=1)) == 0
    assert run(options_for(spoken, tmp_path / "loader", **plain)) == 0
    curves = [curve(tmp_path / name) for name in ("resident", "loader")]
    assert len(curves[0]) == 4 and curves[0][-1] < curves[0][0]
    np.testing.assert_allclose(*curves, rtol=0.01)  # lilcom rounds by 0.016, float16 by 0.004

    part = dataclasses.replace(resident, exp=str(tmp_path / "parts"))
    part = dataclasses.replace(part, trainer=dataclasses.replace(part.trainer, max_steps=6))
    again = dataclasses.replace(part, trainer=dataclasses.replace(part.trainer, max_steps=12))
    assert manifest_of(part, "train").parent.name == "fbank"  # they are there now
    assert run(part) == 0
    assert make_trainer(again, torch.device("cpu")).step == 6
    assert run(again) == 0
    assert len(curve(tmp_path / "parts")) == 4


def test_augmented_training_learns_as_with_the_loader(spoken: Path, tmp_path: Path) -> None:
    masks = {"feature_mask_size": 10, "frame_masks": 2, "frame_mask_size": 20, "frequency_warp": 0.1}
    assert run(options_for(spoken, tmp_path / "resident", resident=True, **masks)) == 0
    assert compute_fbank(FbankOptions(spoken, ("train", "dev"), workers=1)) == 0
    assert run(options_for(spoken, tmp_path / "loader", **masks)) == 0
    ends = [curve(tmp_path / name)[-1] for name in ("resident", "loader")]
    assert abs(ends[0] - ends[1]) < 0.1 * ends[1]
