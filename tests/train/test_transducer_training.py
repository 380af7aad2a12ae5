"""Job ``train`` with a transducer head: alone, beside others, on a frozen encoder; goes on after a stop.
Knows: the job. Must not know: search, fusion.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from icefall_fusion.acoustic.models import CtcAed, TransducerOptions, load
from icefall_fusion.common.command_line import UNFINISHED
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
