"""GGUF files: a tiny real one, written by the gguf package, against the model that it was made of; refusals.
Knows: CausalLm, gguf. Must not know: search, fusion.
"""
from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from icefall_fusion.lm import CausalLm
from icefall_fusion.lm import gguf_files as our_gguf
from icefall_fusion.lm.loading import model_source
from tests import tiny

gguf = pytest.importorskip("gguf")

TEXTS = ["the cat sat on the mat", " he didn't speak", "a sea"]


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return query or key weights in llama.cpp's order of the rotary pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, folder: Path, quantization: str = "F32", architecture: str = "llama") -> Path:
    """Write the Llama model of a folder as llama.cpp's converter does."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(config.vocab_size))))
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))  # control, normal
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, weight in our_names(model):
        array = weight.numpy().astype(np.float32)
        if array.ndim > 1 and quantization != "F32":
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def our_names(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the weights of a Llama model by their names in a GGUF file."""
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm"}
    state, config = model.state_dict(), model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    named = [("token_embd.weight", state["model.embed_tokens.weight"]),
             ("output_norm.weight", state["model.norm.weight"])]
    if not config.tie_word_embeddings:
        named.append(("output.weight", state["lm_head.weight"]))
    for layer in range(config.num_hidden_layers):
        for name, ours in parts.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            weight = permuted(weight, heads[name]) if name in heads else weight
            named.append((f"blk.{layer}.{name}.weight", weight.contiguous()))
    return named


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with rows of 32 weights, which quantization wants."""
    made = tiny.language_model(tmp_path_factory.mktemp("gguf") / "llm", 3, pieces=False)
    size = len(AutoTokenizer.from_pretrained(made))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0 if weight.dim() > 1 else 1.0)
    model.save_pretrained(made)
    return made


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICEFALL_FUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_a_gguf_file_scores_as_the_model_that_it_was_made_of(folder: Path, tmp_path: Path, cache) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", folder)
    lm, original = CausalLm.from_pretrained(path), CausalLm.from_pretrained(folder)
    assert (lm.bos_id, lm.eos_id, lm.name) == (0, 1, str(path))
    for text in TEXTS:
        assert lm.encode(text) == original.encode(text) and lm.tokenizer.decode(lm.encode(text)) == text
    assert lm.log_probs(TEXTS, eos=True) == pytest.approx(original.log_probs(TEXTS, eos=True), abs=1e-4)
    (made,) = [f for f in cache.iterdir() if f.is_dir()]
    assert our_gguf.source_of(made)["architecture"] == "llama" and our_gguf.source_of(folder) == {}
    before = {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    CausalLm.from_pretrained(path)  # converted once
    assert before == {file.name: file.stat().st_mtime_ns for file in made.iterdir()}
    other = write_gguf(tmp_path / "sub.gguf", folder, "Q8_0").rename(path)  # another file of this name
    CausalLm.from_pretrained(other)
    assert len([f for f in cache.iterdir() if f.is_dir()]) == 2


@pytest.mark.parametrize("quantization", ["Q4_1", "Q8_0", "BF16"])
def test_quantized_matrices_become_what_their_blocks_say(folder, tmp_path: Path, quantization: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", folder, quantization)
    lm = CausalLm.from_pretrained(path)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, weight in our_names(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)):
        if weight.dim() > 1 and not name.startswith(("blk.0.attn_q", "blk.0.attn_k")):
            blocks = gguf.quants.quantize(weight.numpy().astype(np.float32), kind)
            wanted = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
            actual = dict(our_names(lm.model))[name]
            torch.testing.assert_close(actual, wanted.view(actual.shape), rtol=2**-10, atol=1e-6)


def test_a_file_or_folder_of_an_installed_package(folder, tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "site" / "some_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    write_gguf(package / "tiny.gguf", folder)
    (package / "model").symlink_to(folder)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    scores = CausalLm.from_pretrained(folder).log_probs(TEXTS)
    for name in ("package:some_llm/tiny.gguf", "package:some_llm/model"):
        assert CausalLm.from_pretrained(name).log_probs(TEXTS) == pytest.approx(scores, abs=1e-4)
    with pytest.raises(FileNotFoundError, match="no package 'other_llm' is installed"):
        CausalLm.from_pretrained("package:other_llm/tiny.gguf")
    with pytest.raises(FileNotFoundError, match="has no 'big.gguf'"):
        CausalLm.from_pretrained("package:some_llm/big.gguf")
    for name in ("package:", "package:some_llm", "package:some_llm/../../x", "package:some-llm/tiny.gguf"):
        with pytest.raises(ValueError, match="must be package:NAME/FILE"):
            CausalLm.from_pretrained(name)


def test_broken_files_are_refused_and_nothing_is_left(folder, tmp_path: Path, cache, monkeypatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", folder)
    content = path.read_bytes()
    for size in (0, 3, 40, 2000, len(content) // 2, len(content) - 33):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"tiny.gguf .*is truncated, or no GGUF file|must have .* bytes"):
            CausalLm.from_pretrained(path)
    path.write_bytes(b"PK" + content[2:])
    with pytest.raises(ValueError, match="is truncated, or no GGUF file"):
        CausalLm.from_pretrained(path)
    write_gguf(path, folder, architecture="rwkv6")
    with pytest.raises(ValueError, match=r"architecture rwkv6\) cannot be read by transformers"):
        CausalLm.from_pretrained(path)
    assert not [f for f in cache.iterdir() if not f.name.endswith(".lock")]
    with pytest.raises(FileNotFoundError, match="GGUF file .* does not exist"):
        CausalLm.from_pretrained(tmp_path / "none.gguf")
    monkeypatch.setattr(our_gguf, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs the package gguf: pip install gguf"):
        CausalLm.from_pretrained(path)


def test_tokens_that_transformers_read_otherwise_are_refused(tmp_path: Path, caplog) -> None:
    tokens = ["<s>", "</s>", "a", "b"]
    tokenizer = SimpleNamespace(bos_token_id=0, eos_token_id=1,
                                convert_ids_to_tokens=lambda ids: [tokens[index] for index in ids])
    fields = {"tokenizer.ggml.tokens": list(tokens), "tokenizer.ggml.bos_token_id": 0,
              "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}
    our_gguf._correct_tokenizer(tmp_path, tokenizer, fields)
    assert "splits words by rule 'llama-bpe'" in caplog.text
    with pytest.raises(ValueError, match="must be read with its own ids"):
        our_gguf._correct_tokenizer(tmp_path, tokenizer, {**fields, "tokenizer.ggml.tokens": tokens[::-1]})
    our_gguf._correct_tokenizer(tmp_path, tokenizer, {**fields, "tokenizer.ggml.bos_token_id": 3})
    assert tokenizer.bos_token == "b"
    with pytest.raises(ValueError, match="bos token of .* must lie between 0 and 3, but is 4"):
        our_gguf._correct_tokenizer(tmp_path, tokenizer, {**fields, "tokenizer.ggml.bos_token_id": 4})
    with pytest.raises(ValueError, match="must have a tokenizer"):
        our_gguf._correct_tokenizer(tmp_path, tokenizer, {})


def test_processes_convert_once_and_a_killed_conversion_is_cleared(folder, tmp_path: Path, cache) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", folder)
    target = cache / "made"
    (cache / ".made.old.part" / "made").mkdir(parents=True)
    workers = [multiprocessing.get_context("fork").Process(target=our_gguf.convert, args=(path, target))
               for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(f.name for f in cache.iterdir()) == [".made.lock", "made"]
    assert model_source(target) == str(target) and CausalLm.from_pretrained(target).vocab_size > 0
