"""Job ``export``: a transducer of ours as ONNX files that sherpa-onnx and icefall's scripts read, or to ship.
Knows: our acoustic models, ONNX files. Must not know: search, fusion, training.
"""
from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from icefall_fusion.acoustic.models import CtcAed, load, save
from icefall_fusion.acoustic.models.model_folder import model_language
from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.common.files import atomic_path, write_text
from icefall_fusion.common.unavailable import Unavailable

OPSET = 17
_FRAMES = 100  # feature frames of the example that is traced


@dataclass(frozen=True)
class ExportOptions:
    """Write a transducer in another program's format, or without what training alone needs.

    Args:
        model: acoustic model folder of ours, with a transducer head.
        out: folder of the files; made if missing.
        format: "sherpa": encoder.onnx, decoder.onnx, joiner.onnx and tokens.txt, as sherpa-onnx reads them;
            "folder": a model folder of ours in float16, without the projections of the pruned loss.
    """

    model: str
    out: str
    format: str = "sherpa"

    def __post_init__(self) -> None:
        check_choice(self.format, ("sherpa", "folder"), "ExportOptions.format")
        check(bool(self.model), "ExportOptions.model", "name an acoustic model folder", self.model)
        check(bool(self.out), "ExportOptions.out", "name a folder", self.out)


class _Encoder(nn.Module):
    """Features and their lengths to frames as the joiner adds them up."""

    def __init__(self, model: CtcAed) -> None:
        super().__init__()
        self.encoder, self.projection = model.encoder, model.transducer.joiner.encoder_proj

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        frames, lens = self.encoder(x, x_lens)
        return self.projection(frames), lens


class _Predictor(nn.Module):
    """Contexts to states as the joiner adds them up."""

    def __init__(self, model: CtcAed) -> None:
        super().__init__()
        self.predictor, self.projection = model.transducer.predictor, model.transducer.joiner.decoder_proj

    def forward(self, y: Tensor) -> Tensor:
        return self.projection(self.predictor(y)[:, 0])


def run(options: ExportOptions) -> int:
    """Export a model; return 0."""
    if options.format == "folder":
        export_folder(load(options.model), options.out)
        print(f"wrote a model folder to {options.out}", file=sys.stderr)
        return 0
    export_sherpa(load(options.model), options.out)
    print(f"wrote encoder.onnx, decoder.onnx, joiner.onnx and tokens.txt to {options.out}", file=sys.stderr)
    return 0


def export_folder(model: CtcAed, folder: str) -> None:
    """Write a model folder in float16, without the projections that find the bands of the pruned loss.

    A training that starts from it has new ones.

    Raises:
        ValueError: the model has no transducer head.
    """
    rule, heads = "have a transducer head", model.options.heads
    check(model.transducer is not None, "ExportOptions.model", rule, list(heads))
    plain = replace(model.options.transducer, prune_range=0)
    made = CtcAed(replace(model.options, transducer=plain), model.bpe)
    names, weights = set(made.state_dict()), model.state_dict()
    made.load_state_dict({name: value for name, value in weights.items() if name in names})
    made.language = model_language(model)
    save(made, folder, torch.float16)


@torch.no_grad()
def export_sherpa(model: CtcAed, folder: str) -> None:
    """Write the three files and the vocabulary of a transducer.

    Raises:
        ValueError: the model has no transducer head, no vocabulary, or another blank than 0.
        Unavailable: the package onnx is not installed.
    """
    head = model.transducer
    check(head is not None, "ExportOptions.model", "have a transducer head", list(model.options.heads))
    check(head.blank_id == 0, "ExportOptions.model", "have blank 0, as sherpa-onnx takes it", head.blank_id)
    check(model.tokens is not None, "ExportOptions.model", "have a bpe.model", None)
    model = model.cpu().eval()
    bins, size = model.options.encoder.bins, model.options.transducer.joiner_size
    kind = {"model_type": "conformer", "version": "1", "model_author": "icefall_fusion",
            "comment": "non-streaming conformer", "feature_dim": bins}
    lens = torch.tensor([_FRAMES, _FRAMES - 3])
    out = Path(folder)
    _write(_Encoder(model), (torch.zeros(2, _FRAMES, bins), lens), out / "encoder.onnx",
           {"x": ("N", "T"), "x_lens": ("N",)}, {"encoder_out": ("N", "T"), "encoder_out_lens": ("N",)}, kind)
    contexts = torch.zeros(10, head.context_size, dtype=torch.int64)
    shape = {"context_size": head.context_size, "vocab_size": head.vocab_size}
    _write(_Predictor(model), (contexts,), out / "decoder.onnx", {"y": ("N",)}, {"decoder_out": ("N",)},
           shape)
    pairs = torch.zeros(11, size), torch.zeros(11, size)
    _write(head.joiner, pairs, out / "joiner.onnx", {"encoder_out": ("N",), "decoder_out": ("N",)},
           {"logit": ("N",)}, {"joiner_dim": size})
    table = "".join(f"{piece} {index}\n" for index, piece in enumerate(model.tokens.pieces))
    write_text(out / "tokens.txt", table)


def _write(
    module: nn.Module, example: Sequence[Tensor], path: Path, inputs: Mapping[str, Sequence[str]],
    outputs: Mapping[str, Sequence[str]], metadata: Mapping[str, Any],
) -> None:
    """Trace a module and write it as ONNX; names of dimensions stand for those of any size."""
    try:
        import onnx
    except ImportError as error:
        raise Unavailable("the job export needs onnx: pip install onnx") from error
    axes = {name: dict(enumerate(names)) for name, names in {**inputs, **outputs}.items()}
    with atomic_path(path) as temporary:
        with warnings.catch_warnings():  # checks of Python are traced as constants, as they should be
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(), tuple(example), str(temporary), opset_version=OPSET, dynamo=False,
                input_names=list(inputs), output_names=list(outputs), dynamic_axes=axes,
            )
        made = onnx.load(str(temporary))
        for name, value in metadata.items():
            entry = made.metadata_props.add()
            entry.key, entry.value = name, str(value)
        onnx.save(made, str(temporary))
