"""Another vocabulary for a causal LM: its layers stay, its embeddings become those of acoustic pieces.
Knows: transformers models, acoustic pieces. Must not know: adapters, trees, search, fusion, training.

So an LLM of any vocabulary can be adapted to take part in shallow fusion, where it must score each piece.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from icefall_fusion.common.checks import check
from icefall_fusion.common.files import PathLike
from icefall_fusion.text.tokens import AcousticTokens

EMBEDDINGS_FILE = "embeddings.safetensors"
INPUT, OUTPUT = "input", "output"  # tensors of the file; an output layer that is tied has none


def transplant(
    model: Any, pieces: AcousticTokens, encode: Callable[[list[str]], Sequence[Sequence[int]]],
    marks: tuple[int, int],
) -> None:
    """Give a model a vocabulary of acoustic pieces; the layers between are left as they are.

    A piece starts as the mean of the tokens of its text, after Gee et al. 2022 ("Fast Vocabulary Transfer for
    Language Model Compression", section 3); the sentence mark as that of the model's bos and eos.

    Args:
        model: transformers model with a tokenizer of its own; changed in place.
        pieces: the new vocabulary, with a sentence mark.
        encode: the model's own tokenizer: texts -> ids of each.
        marks: ids of the model's bos and eos.

    Raises:
        ValueError: the pieces have no sentence mark.
    """
    check(pieces.sos_eos_id is not None, "pieces", "have the piece <sos/eos>", None)
    ids = encode([piece.replace(pieces.word_start, " ") for piece in pieces.pieces])
    rows = [tuple(some) for some in ids]
    rows[pieces.sos_eos_id] = tuple(marks)
    new = {}
    for name, layer in _embeddings(model).items():
        old = layer.weight.detach().float()
        means = [old[list(some)].mean(0) if some else old.mean(0) for some in rows]
        new[name] = torch.stack(means)
    _replace(model, new, pieces.sos_eos_id)


def save_embeddings(model: Any, folder: PathLike, dtype: torch.dtype) -> None:
    """Write the embeddings of a model as `EMBEDDINGS_FILE` of a folder.

    Raises:
        ValueError: they do not fit ``dtype``; nothing is written.
    """
    state = {name: layer.weight.detach().to("cpu", dtype).contiguous()
             for name, layer in _embeddings(model).items()}
    finite = all(bool(weight.isfinite().all()) for weight in state.values())
    check(finite, "dtype", "be one in which the embeddings are finite", str(dtype))
    save_file(state, Path(folder) / EMBEDDINGS_FILE, metadata={"format": "pt"})


def load_embeddings(model: Any, folder: PathLike) -> None:
    """Give a model the embeddings that a folder has (see `save_embeddings`), with its pieces' sentence mark.

    Raises:
        ValueError: they are of a model of another shape, or of other pieces than the folder's ``bpe.model``.
    """
    path = Path(folder) / EMBEDDINGS_FILE
    pieces = AcousticTokens.load(folder)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} must be a safetensors file, but is not: {error}") from error
    for name, layer in _embeddings(model).items():
        weight, wanted = state.get(name), (pieces.size, layer.weight.shape[1])
        good = weight is not None and tuple(weight.shape) == wanted and bool(weight.isfinite().all())
        shape = None if weight is None else tuple(weight.shape)
        check(good, f"tensor {name!r} of {path}", f"be finite and of shape {wanted}", shape)
    _replace(model, state, pieces.sos_eos_id)


def train_embeddings(model: Any) -> None:
    """Let the embeddings of a transplanted model be trained, in float32; the layers keep their dtype."""
    for layer in _embeddings(model).values():
        layer.weight = nn.Parameter(layer.weight.detach().float())
    _tie(model)


class _Inputs(nn.Embedding):
    """Embeddings whose weights may have another dtype than the layers behind them."""

    def __init__(self, size: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(size, width, dtype=dtype, device=device)
        self.layers = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., D] in the dtype of the layers."""
        return super().forward(ids).to(self.layers)


class _Outputs(nn.Linear):
    """An output layer that computes in the dtype of its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V]."""
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype))


def _embeddings(model: Any) -> dict[str, Any]:
    """Return the layers that know the vocabulary: the output layer only if it has weights of its own."""
    layers = {INPUT: model.get_input_embeddings()}
    if not model.config.get_text_config(decoder=True).tie_word_embeddings:
        layers[OUTPUT] = model.get_output_embeddings()
    return layers


def _replace(model: Any, state: dict[str, Tensor], mark: int) -> None:
    """Put in new embeddings, in dtype and on the device of the old ones."""
    old = model.get_input_embeddings()
    size, width = state[INPUT].shape
    like = {"dtype": old.weight.dtype, "device": old.weight.device}
    inputs = _Inputs(size, width, **like)
    inputs.weight = nn.Parameter(state[INPUT].to(**like), requires_grad=False)
    outputs = _Outputs(width, size, bias=False, **like)
    outputs.weight = nn.Parameter(state.get(OUTPUT, state[INPUT]).to(**like), requires_grad=False)
    model.set_input_embeddings(inputs)
    model.set_output_embeddings(outputs)
    config = model.config.get_text_config(decoder=True)
    for one in {id(config): config, id(model.config): model.config}.values():
        one.vocab_size, one.bos_token_id, one.eos_token_id = size, mark, mark
        one.pad_token_id = None
    _tie(model)


def _tie(model: Any) -> None:
    """Let a tied output layer have the very weights of the input layer."""
    if model.config.get_text_config(decoder=True).tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
