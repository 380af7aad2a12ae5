"""A vocabulary of acoustic pieces for a foreign LM: start embeddings, stored folders, refusals.
Knows: CausalLm, adapters. Must not know: search, fusion, training.
"""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from icefall_fusion.lm import CausalLm, adapters, transplant
from icefall_fusion.text.tokens import AcousticTokens
from tests import tiny

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> AcousticTokens:
    return AcousticTokens.load(tiny.write_bpe(tmp_path_factory.mktemp("pieces")))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.language_model(tmp_path_factory.mktemp("transplant") / "llm", 3, pieces=False)
    if not request.param:
        config = LlamaConfig.from_pretrained(folder)
        config.tie_word_embeddings = False
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def transplanted(base: Path, pieces: AcousticTokens) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    transplant.transplant(
        model, pieces, lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"], (0, 1)
    )
    return model


def save(model: torch.nn.Module, base: Path, folder: Path, pieces: AcousticTokens) -> torch.nn.Module:
    """Store a transplanted model with a random adapter, and return its PEFT model."""
    source = AutoModelForCausalLM.from_pretrained(base)
    adapted = adapters.add_adapter(model, 2, 4.0, 0.0, "all-linear", str(base))
    transplant.train_embeddings(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    made_for = {"name": str(base), "sha256": "", "sample": adapters.sample_of(source)}
    adapters.save_adapter(adapted, folder, made_for, torch.float32, "a card", pieces)
    return adapted.eval()


def test_a_piece_starts_as_the_mean_of_the_tokens_of_its_text(base: Path, pieces: AcousticTokens) -> None:
    plain, model = AutoModelForCausalLM.from_pretrained(base), transplanted(base, pieces)
    tokenizer = AutoTokenizer.from_pretrained(base)
    own = [plain.get_input_embeddings().weight, plain.get_output_embeddings().weight]
    new = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for old, weight in zip(own, new):
        assert weight.shape == (pieces.size, 16)
        torch.testing.assert_close(weight[1], old[:2].mean(0))
        for index in range(3, pieces.size):
            ids = tokenizer(pieces.pieces[index].replace("▁", " "), add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(weight[index], old[ids].mean(0))
    tied = plain.config.tie_word_embeddings
    assert (new[0] is new[1]) == tied and model.config.vocab_size == pieces.size


def test_a_stored_vocabulary_scores_as_the_trained_model(
    base: Path, pieces: AcousticTokens, tmp_path: Path
) -> None:
    adapted = save(transplanted(base, pieces), base, tmp_path / "adapter", pieces)
    lm = CausalLm.from_pretrained(base, adapter=tmp_path / "adapter")  # compares its tree with plain forwards
    assert lm.pieces is not None and lm.tokenizer is None and lm.vocab_size == pieces.size
    assert lm.bos_id == lm.eos_id == pieces.sos_eos_id
    ids = torch.tensor([[1, *pieces.encode("the cat sat on the mat")]])
    torch.testing.assert_close(lm.model(ids).logits, adapted(ids).logits, atol=2e-5, rtol=1e-5)
    half = CausalLm.from_pretrained(base, adapter=tmp_path / "adapter", dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}


def test_broken_vocabularies_are_refused(base: Path, pieces: AcousticTokens, tmp_path: Path) -> None:
    save(transplanted(base, pieces), base, tmp_path / "adapter", pieces)
    weights = load_file(tmp_path / "adapter" / transplant.EMBEDDINGS_FILE)

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CausalLm.from_pretrained(base, adapter=folder)

    def copy(name: str) -> Path:
        return shutil.copytree(tmp_path / "adapter", tmp_path / name)

    folder = copy("less")
    shorter = {name: weight[1:].contiguous() for name, weight in weights.items()}
    save_file(shorter, folder / transplant.EMBEDDINGS_FILE)
    refused(folder, rf"'input' of .* of shape \({pieces.size}, 16\), but is \({pieces.size - 1}, 16\)")
    lost = {name: weight * torch.nan for name, weight in weights.items()}
    save_file(lost, folder / transplant.EMBEDDINGS_FILE)
    refused(folder, "'input' of .* must be finite")
    save_file({"other": weights["input"]}, folder / transplant.EMBEDDINGS_FILE)
    refused(folder, "'input' of .*, but is None")
    (folder / transplant.EMBEDDINGS_FILE).write_bytes(b"no tensors")
    refused(folder, "must be a safetensors file")
    folder = copy("plain")  # pieces alone are no vocabulary: the embeddings are the base's
    (folder / transplant.EMBEDDINGS_FILE).unlink()
    assert CausalLm.from_pretrained(base, adapter=folder).pieces is None
    folder = copy("pieceless")
    (folder / "bpe.model").unlink()
    with pytest.raises(FileNotFoundError, match="SentencePiece model not found"):
        CausalLm.from_pretrained(base, adapter=folder)
