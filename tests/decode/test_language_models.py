"""The language models of a decode: adapters, other starts of a text, and options that do not fit together.
Knows: LanguageModels. Must not know: searches, files of a run.
"""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from icefall_fusion.decode.language_models import LanguageModels, LmOptions
from icefall_fusion.lm import CausalLm, adapters, starts
from tests import tiny

pytest.importorskip("peft")


def test_a_model_is_loaded_with_its_adapter_and_marks(tmp_path: Path) -> None:
    base = tiny.language_model(tmp_path / "llm", 3, pieces=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = adapters.add_adapter(model, 2, 4.0, 0.0, "all-linear", str(base))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    options = {"llm": LmOptions(str(base), adapter=str(tmp_path / "adapter"), bos_token="</s>"),
               "nlm": LmOptions(str(base))}
    lms = LanguageModels(options)
    llm, nlm = lms.get("llm"), lms.get("nlm")
    assert (llm.bos_id, nlm.bos_id) == (1, 0)
    ids = torch.tensor([[1, 40, 50, 60]])
    torch.testing.assert_close(llm.model(ids).logits, adapted.eval()(ids).logits, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(llm.model(ids).logits, nlm.model(ids).logits, atol=0.01)


def test_an_adapter_needs_a_model_with_plain_weights() -> None:
    for more in ({"path": ""}, {"path": "x", "quantization": "int8"}):
        with pytest.raises(ValueError, match="LmOptions.adapter must be left out where LmOptions.path"):
            LmOptions(adapter="somewhere", **more)


def test_another_start_is_named_where_the_references_say_so(tmp_path: Path, monkeypatch, caplog) -> None:
    base = tiny.language_model(tmp_path / "llm", 3, pieces=False)
    pieces = tiny.language_model(tmp_path / "nlm", 4, pieces=True)
    lms = LanguageModels({"llm": LmOptions(str(base)), "nlm": LmOptions(str(pieces))})
    references = ["the cat sat on the mat", "a dog met near the old harbor"]
    lms.warn_of_starts(references)  # nothing is loaded yet
    lm, _ = lms.get("llm"), lms.get("nlm")
    tokens = sum(len(lm.encode(text)) + 1 for text in references)
    nats = {}
    for bos in ("<s>", "</s>"):
        scores = CausalLm.from_pretrained(base, bos_token=bos).log_probs(references, eos=True)
        nats[bos] = -sum(scores) / tokens
    monkeypatch.setattr(starts, "CLEARLY", -1.0)
    lms.warn_of_starts(references)
    best = min(nats, key=nats.__getitem__)
    assert f"have {nats['<s>']:.2f} nats" in caplog.text and f"--llm.bos_token '{best}'" in caplog.text
    assert f"would have {nats[best]:.2f}" in caplog.text and "nlm.path" not in caplog.text
    assert lm.bos_id == 0  # the probe leaves the model as it is
    caplog.clear()
    monkeypatch.setattr(starts, "CLEARLY", 9.0)
    lms.warn_of_starts(references)
    assert not caplog.text
