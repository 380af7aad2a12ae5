"""LoRA adapters: merged weights against peft's own forward, the token tree of them, refusals.
Knows: CausalLm, peft. Must not know: search, fusion, training.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from icefall_fusion.lm import CausalLm, adapters
from tests import tiny

peft = pytest.importorskip("peft")

TEXTS = ["the cat sat on the mat", "she sold the red shells", "a sea"]
IDS = torch.tensor([[0, 40, 50, 60, 41]])


def new_adapter(base: Path, name: str = "", **more) -> peft.PeftModel:
    """Return a base with a random adapter whose second factor is not zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    asked = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "targets": "all-linear", "name": name or str(base)}
    asked.update(more)
    torch.manual_seed(1)
    adapted = adapters.add_adapter(model, **asked)
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.normal_(0, 0.3)
    return adapted.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.language_model(tmp_path_factory.mktemp("adapters") / "llm", 3, pieces=False)


@pytest.fixture
def foreign(base: Path, tmp_path: Path) -> Path:
    """A folder that peft wrote by itself."""
    new_adapter(base).save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def our_folder(base: Path, folder: Path, dtype: torch.dtype = torch.float32, **more) -> peft.PeftModel:
    adapted = new_adapter(base, **more)
    source = AutoModelForCausalLM.from_pretrained(base)
    made_for = {"name": str(base), "sha256": "", "sample": adapters.sample_of(source)}
    adapters.save_adapter(adapted, folder, made_for, dtype, "a card")
    return adapted


def test_merged_weights_score_as_pefts_own_forward(base: Path, foreign: Path, tmp_path: Path) -> None:
    expected = new_adapter(base)(IDS).logits
    our_folder(base, tmp_path / "ours")
    plain = CausalLm.from_pretrained(base)
    for folder in (foreign, tmp_path / "ours"):
        lm = CausalLm.from_pretrained(base, adapter=folder)
        torch.testing.assert_close(lm.model(IDS).logits, expected, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(plain.model(IDS).logits, expected, atol=0.1)
        assert lm.packed and isinstance(lm.model, LlamaForCausalLM)  # the very modules, which kernels know
        assert lm.model.state_dict().keys() == plain.model.state_dict().keys()
        slow = [sum(path) for path in lm.token_log_probs([lm.encode(text) for text in TEXTS], eos=True)]
        assert lm.log_probs(TEXTS, eos=True) == pytest.approx(slow, abs=1e-4)
    files = {path.name for path in (tmp_path / "ours").iterdir()}
    assert files == {adapters.CONFIG_FILE, adapters.WEIGHTS_FILE, adapters.BASE_FILE, "README.md"}
    reloaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    torch.testing.assert_close(reloaded.eval()(IDS).logits, expected, atol=1e-5, rtol=1e-5)  # peft reads ours


def test_an_adapter_in_the_place_of_a_model_brings_its_base(base, foreign, tmp_path: Path) -> None:
    our_folder(base, tmp_path / "ours")
    for folder in (foreign, tmp_path / "ours"):
        alone, both = CausalLm.from_pretrained(folder), CausalLm.from_pretrained(base, adapter=folder)
        assert torch.equal(alone.model(IDS).logits, both.model(IDS).logits)
        assert alone.name == str(folder) and alone.encode("the cat") == both.encode("the cat")
    with pytest.raises(ValueError, match="adapter must be left out, as .*foreign is an adapter itself"):
        CausalLm.from_pretrained(foreign, adapter=tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match="no package 'no_such_package' is installed"):
        CausalLm.from_pretrained(changed(foreign, base_model_name_or_path="package:no_such_package/x.gguf"))
    with pytest.raises(ValueError, match="adapter_config.json of .* must name the base, but is None"):
        CausalLm.from_pretrained(changed(foreign, base_model_name_or_path=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_knows_its_base_in_any_dtype(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    moved = shutil.copytree(base, tmp_path / "another-name")
    our_folder(base, tmp_path / "ours", torch.float16)
    assert CausalLm.from_pretrained(moved, adapter=tmp_path / "ours", dtype=dtype).model.dtype == dtype


def test_adapters_of_another_base_are_refused_with_both_names(base, foreign, tmp_path: Path) -> None:
    other = tiny.language_model(tmp_path / "other-llm", 4, pieces=False)  # the same shape
    our_folder(base, tmp_path / "ours")
    with pytest.raises(ValueError, match="ours must have been made for .*other-llm', but is '.*llm'"):
        CausalLm.from_pretrained(other, adapter=tmp_path / "ours")
    with pytest.raises(ValueError, match="must have been made for the model '.*other-llm'.*, but is '.*llm'"):
        CausalLm.from_pretrained(other, adapter=foreign)
    tuned = AutoModelForCausalLM.from_pretrained(base)  # fine-tuned a little
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.mul_(1 + 0.05 * torch.randn_like(weight))
    shutil.copytree(base, tmp_path / "llm")
    tuned.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match="must have been made for the model"):
        CausalLm.from_pretrained(tmp_path / "llm", adapter=tmp_path / "ours")
    bigger = tmp_path / "bigger" / "llm"
    shutil.copytree(base, bigger)
    LlamaForCausalLM(LlamaConfig(**{**tuned.config.to_dict(), "hidden_size": 32})).save_pretrained(bigger)
    with pytest.raises(ValueError, match="adapter .* does not fit the model .*size mismatch"):
        CausalLm.from_pretrained(bigger, adapter=foreign)


def changed(folder: Path, **more) -> Path:
    config = json.loads((folder / adapters.CONFIG_FILE).read_text())
    (folder / adapters.CONFIG_FILE).write_text(json.dumps({**config, **more}))
    return folder


def test_broken_adapters_are_refused(base: Path, foreign: Path, tmp_path: Path, monkeypatch) -> None:
    def copy(name: str) -> Path:
        return shutil.copytree(foreign, tmp_path / name)

    def refused(folder: Path, message: str, kind: type = ValueError) -> None:
        with pytest.raises(kind, match=message):
            CausalLm.from_pretrained(base, adapter=folder)

    refused(changed(copy("rank"), r=4), "does not fit the model .*size mismatch")
    refused(changed(copy("targets"), target_modules=["w_query"]), "does not fit the model .*w_query")
    refused(changed(copy("fewer"), target_modules=["q_proj"]), "must be those that adapter_config.json names")
    refused(changed(copy("kind"), peft_type="IA3"), "does not fit the model|must be of type LORA")
    weights = load_file(foreign / adapters.WEIGHTS_FILE)
    folder = copy("less")
    save_file(dict(list(weights.items())[1:]), folder / adapters.WEIGHTS_FILE)
    refused(folder, "must be those that adapter_config.json names")
    save_file({name: value * torch.nan for name, value in weights.items()}, folder / adapters.WEIGHTS_FILE)
    refused(folder, "must be finite")
    (folder / adapters.WEIGHTS_FILE).write_bytes(b"no tensors")
    refused(folder, "does not fit the model")
    (folder / adapters.CONFIG_FILE).write_text("{")
    refused(folder, "must be JSON")
    (folder / adapters.CONFIG_FILE).unlink()
    refused(folder, "must be a folder with adapter_config.json", FileNotFoundError)
    with pytest.raises(ValueError, match="adapter must not be set with a quantization"):
        CausalLm.from_pretrained(base, adapter=foreign, quantization="int8")
    with pytest.raises(ValueError, match="targets of an adapter must be linear layers .*'w_query'"):
        new_adapter(base, targets=["w_query"])
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    refused(foreign, "needs the package peft", ImportError)
