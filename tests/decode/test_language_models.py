"""The language models of a decode: adapters, other starts of a text, and options that do not fit together.
Knows: LanguageModels. Must not know: searches, files of a run.
"""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from icefall_fusion.decode.language_models import LanguageModels, LmOptions
from icefall_fusion.lm import adapters
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
