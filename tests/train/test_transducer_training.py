"""Job ``train`` with a transducer head: alone, beside others, on a frozen encoder; goes on after a stop.
Knows: the job. Must not know: search, fusion.
"""
from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from lhotse import CutSet

from icefall_fusion.acoustic.models import CtcAed, TransducerOptions, load
from icefall_fusion.acoustic.models.conformer import ConformerEncoder
from icefall_fusion.common.command_line import UNFINISHED
from icefall_fusion.data.datamodule import load_features
from icefall_fusion.data.manifests import cuts_path
from icefall_fusion.train import encoder_cache
from icefall_fusion.train.acoustic_model import TrainOptions, run
from tests.train.test_acoustic_model import data_dir, options_for  # noqa: F401 # a fixture


def with_heads(options: TrainOptions, heads: str, **more) -> TrainOptions:
    transducer = TransducerOptions(predictor_size=16, joiner_size=16)
    model = dataclasses.replace(options.model, transducer=transducer)
    return dataclasses.replace(options, model=model, heads=heads, **more)


def last_line(exp: Path) -> dict:
    return json.loads((exp / "log.jsonl").read_text().splitlines()[-1])


def weights(exp: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(exp / f"checkpoint-{step}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("heads", ["transducer", "aed,transducer", "transducer,ctc", "ctc", "aed"])
def test_every_choice_of_heads_trains_and_is_exported(data_dir, tmp_path, heads) -> None:  # noqa: F811
    options = with_heads(options_for(data_dir, tmp_path / "exp"), heads)
    assert run(options) == 0
    line, made = last_line(tmp_path / "exp"), load(tmp_path / "exp" / "export")
    assert set(made.options.heads) == set(heads.split(","))
    for head, terms in {"ctc": ("ctc", "greedy_wer"), "aed": ("attention",),
                        "transducer": ("transducer", "transducer_simple", "transducer_greedy_wer")}.items():
        assert all((f"valid_{term}" in line) == (head in heads) for term in terms)
    parts = {"ctc": made.ctc, "aed": made.decoder, "transducer": made.transducer}
    assert all((part is not None) == (head in heads) for head, part in parts.items())


def test_a_new_head_learns_on_a_frozen_encoder_and_moves_nothing_else(data_dir, tmp_path) -> None:  # noqa: F811
    first = options_for(data_dir, tmp_path / "first", max_steps=60, valid_every_steps=0, precision="float32")
    assert run(first) == 0
    folder = tmp_path / "first" / "export"
    second = options_for(data_dir, tmp_path / "second", max_steps=40, valid_every_steps=10, lr=2e-2)
    second = with_heads(second, "ctc,aed,transducer", init=str(folder), freeze="encoder,ctc,aed")
    assert run(second) == 0
    source, made = load(folder), load(tmp_path / "second" / "export")
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in source.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "second" / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "valid_transducer" in line]
    assert lines[-1]["valid_transducer"] < 0.9 * lines[0]["valid_transducer"]
    assert lines[-1]["valid_greedy_wer"] == lines[0]["valid_greedy_wer"]  # of the CTC head, which stays
    assert lines[-1]["valid_loss"] == pytest.approx(lines[-1]["valid_transducer"])  # of trained heads alone
    stopped = dataclasses.replace(second, exp=str(tmp_path / "parted"))
    halted = dataclasses.replace(stopped, trainer=dataclasses.replace(stopped.trainer, max_minutes=1e-9))
    assert run(halted) == UNFINISHED and run(stopped) == 0
    whole, parted = weights(tmp_path / "second", 40), weights(tmp_path / "parted", 40)
    assert all(torch.equal(value, parted[name]) for name, value in whole.items())


def on_kept_frames(data_dir, folder, exp, **trainer) -> TrainOptions:  # noqa: F811
    options = options_for(data_dir, exp, max_steps=12, valid_every_steps=4, precision="float32", **trainer)
    plain = dataclasses.replace(options.data, spec_augment=False)
    return with_heads(dataclasses.replace(options, data=plain), "ctc,aed,transducer", init=str(folder),
                      freeze="encoder,ctc,aed", encoder_cache=str(exp.parent / "frames"))


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory) -> Path:  # noqa: F811
    exp = tmp_path_factory.mktemp("trained")
    assert run(options_for(data_dir, exp, max_steps=2)) == 0
    return exp / "export"


def test_kept_frames_train_the_head_that_an_encoder_at_work_trains(
    data_dir, trained, tmp_path, monkeypatch  # noqa: F811
) -> None:
    kept = on_kept_frames(data_dir, trained, tmp_path / "kept")
    plain = dataclasses.replace(kept, encoder_cache="", exp=str(tmp_path / "plain"))
    assert run(plain) == 0
    heard, forward = [], ConformerEncoder.forward_with_middle

    def listen(self, features, *rest):
        heard.append(torch.is_grad_enabled() or self.training)
        return forward(self, features, *rest)

    monkeypatch.setattr(ConformerEncoder, "forward_with_middle", listen)
    assert run(kept) == 0
    assert heard and not any(heard)  # before the first step and in validations alone
    one, other = (weights(tmp_path / name, 12) for name in ("plain", "kept"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=2e-2, rtol=0)  # frames are in float16
    moved = [name for name in one if name.startswith("transducer.joiner")]
    start = dict(CtcAed(kept.model).state_dict())
    assert any((one[name] - start[name]).abs().max() > 2e-2 for name in moved)
    losses = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
              for name in ("plain", "kept")]
    for first, second in zip(*losses):
        for name in {"loss", "valid_loss", "valid_greedy_wer"} & set(first):
            assert second[name] == pytest.approx(first[name], rel=5e-3)


def test_frames_are_kept_once_and_a_killed_job_goes_on(data_dir, trained, tmp_path, monkeypatch) -> None:  # noqa: F811
    options = on_kept_frames(data_dir, trained, tmp_path / "exp")
    options = dataclasses.replace(options, data=dataclasses.replace(options.data, eval_duration=8.0))
    monkeypatch.setattr(encoder_cache, "GROUP", 1)
    add, seen = encoder_cache.EncoderCache.add, []

    def killed(self, ids, frames):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.extend(ids)
        add(self, ids, frames)

    monkeypatch.setattr(encoder_cache.EncoderCache, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    half = encoder_cache.EncoderCache(options.encoder_cache, 16)
    assert sorted(half) == sorted(seen) and len(half) == 4
    monkeypatch.setattr(encoder_cache.EncoderCache, "add", lambda self, ids, frames: (
        seen.extend(ids), add(self, ids, frames)))
    assert run(options) == 0
    assert len(seen) == len(set(seen)) == 12
    assert run(dataclasses.replace(options, exp=str(tmp_path / "again"))) == 0 and len(seen) == 12
    model = load(trained)
    features = load_features(next(iter(CutSet.from_file(cuts_path(data_dir / "fbank", "train")))))
    with torch.no_grad():
        frames = model.encoder(features[None], torch.tensor([len(features)]))[0][0]
    found = encoder_cache.EncoderCache(options.encoder_cache, 16)
    torch.testing.assert_close(found.read("train-0"), frames, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match="the frames of nobody must be kept in"):
        found.read("nobody")
    file = max((tmp_path / "frames").glob("*.f16"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="f16 must hold .* frames of"):
        [found.read(one) for one in found]


def test_what_does_not_go_with_kept_frames_is_refused(data_dir, trained, tmp_path) -> None:  # noqa: F811
    good = on_kept_frames(data_dir, trained, tmp_path / "exp")
    for changes, rule in (({"freeze": "ctc,aed"}, "TrainOptions.freeze must name the encoder"),
                          ({"freeze": "encoder,aed"}, "ModelOptions.middle_weight must be 0"),
                          ({"data": dataclasses.replace(good.data, spec_augment=True)},
                           "DataOptions.spec_augment must be False"),
                          ({"data": dataclasses.replace(good.data, frequency_warp=0.1)},
                           "DataOptions.frequency_warp must be 0.0"),
                          ({"model": dataclasses.replace(good.model, chunk_probability=0.5)},
                           "ModelOptions.chunk_probability must be 0")):
        with pytest.raises(ValueError, match=rule):
            dataclasses.replace(good, **changes)
    assert run(good) == 0
    assert run(options_for(data_dir, tmp_path / "second", max_steps=3)) == 0
    other = dataclasses.replace(good, init=str(tmp_path / "second" / "export"), exp=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="encoder_cache .* must be empty or of the encoder of"):
        run(other)
    resumed = dataclasses.replace(other, exp=good.exp, encoder_cache=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="TrainOptions.init must have the encoder of .*checkpoint-12.pt"):
        run(resumed)


def test_an_utterance_without_frames_is_listed_with_its_error(data_dir, trained, tmp_path) -> None:  # noqa: F811
    broken = shutil.copytree(data_dir, tmp_path / "data")
    path = cuts_path(broken / "fbank", "train")
    cuts = [json.loads(line) for line in gzip.open(path, "rt")]
    cuts[0]["recording"]["sources"][0]["source"] = str(tmp_path / "nowhere.wav")
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(cut) + "\n" for cut in cuts))
    assert run(on_kept_frames(broken, trained, tmp_path / "exp")) == 0
    [skipped] = json.loads((tmp_path / "exp" / "skipped.json").read_text())["skipped"]
    assert skipped["id"] == cuts[0]["id"] and "nowhere" in skipped["error"]


def test_a_frozen_encoder_has_no_dropout(data_dir, tmp_path) -> None:  # noqa: F811
    options = with_heads(options_for(data_dir, tmp_path), "transducer")
    encoder = dataclasses.replace(options.model.encoder, dropout=0.5)
    model = CtcAed(dataclasses.replace(options.model, encoder=encoder))
    x, lens = torch.randn(1, 40, 80), torch.tensor([40])
    model.train()
    assert not torch.equal(model.encoder(x, lens)[0], model.encoder(x, lens)[0])
    model.freeze(["encoder"])
    model.train()
    assert torch.equal(model.encoder(x, lens)[0], model.encoder(x, lens)[0])
    loss, info = model(x, lens, [[3, 4]])
    loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.transducer.parameters())
    assert {"transducer", "transducer_simple"} <= set(info)


def test_exports_without_named_heads_have_ctc_and_attention(tmp_path) -> None:
    """As those made before there was a choice."""
    import tiny

    folder = tiny.acoustic_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["options"]["heads"], config["options"]["transducer"]
    (folder / "config.json").write_text(json.dumps(config))
    made = load(folder)
    assert made.options.heads == ("ctc", "aed") and made.transducer is None


def test_wrong_heads_and_frozen_parts_are_refused(data_dir, tmp_path) -> None:  # noqa: F811
    options = options_for(data_dir, tmp_path / "exp", max_steps=1)
    with pytest.raises(ValueError, match="ModelOptions.heads must be one of .*'rnnt'"):
        dataclasses.replace(options, heads="ctc,rnnt")
    with pytest.raises(ValueError, match="TrainOptions.freeze must be empty without TrainOptions.init"):
        dataclasses.replace(options, freeze="encoder")
    assert run(options) == 0
    init = {"init": str(tmp_path / "exp" / "export"), "exp": str(tmp_path / "next")}
    for freeze, rule in (("decoder", "be one of .*'encoder', 'ctc', 'aed'"), ("ctc,aed", "leave one of")):
        with pytest.raises(ValueError, match=f"TrainOptions.freeze must {rule}"):
            run(dataclasses.replace(options, freeze=freeze, **init))
    with pytest.raises(ValueError, match="TrainOptions.freeze must name heads that .*'transducer'"):
        run(with_heads(options, "ctc,transducer", freeze="transducer", **init))
    larger = with_heads(options, "ctc,transducer", exp=str(tmp_path / "larger"))
    assert run(larger) == 0
    other = dataclasses.replace(larger, heads="transducer", init=str(tmp_path / "larger" / "export"),
                                exp=str(tmp_path / "other"))
    assert run(other) == 0  # a head that is no longer wanted is left out
    wider = dataclasses.replace(other.model, transducer=TransducerOptions(predictor_size=16, joiner_size=8))
    with pytest.raises(ValueError, match="TrainOptions.init .*: transducer must be"):
        run(dataclasses.replace(other, model=wider, exp=str(tmp_path / "wider")))
