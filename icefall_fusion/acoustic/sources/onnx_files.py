"""Transducers of sherpa-onnx: an encoder, a decoder (the predictor) and a joiner in ONNX files.
Knows: those files, onnxruntime. Must not know: how they were made, search, fusion, manifests.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence, Union

import torch
from torch import Tensor

from icefall_fusion.acoustic.loading import loading
from icefall_fusion.acoustic.sources.base import FeatureSource, tokens_of
from icefall_fusion.acoustic.sources.chunked import ChunkedEncoder
from icefall_fusion.acoustic.sources.stateless import start_of
from icefall_fusion.common.checks import check
from icefall_fusion.common.unavailable import Unavailable
from icefall_fusion.text.tokens import AcousticTokens

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources import EmissionOptions

#: Inputs and outputs of the files, as icefall's ``export-onnx.py`` names them.
NAMES = {
    "encoder": (("x", "x_lens"), ("encoder_out", "encoder_out_lens")),
    "decoder": (("y",), ("decoder_out",)),
    "joiner": (("encoder_out", "decoder_out"), ("logit",)),
}


class OnnxSource(FeatureSource):
    """A transducer of icefall or sherpa-onnx: ``encoder*.onnx``, ``decoder*.onnx``, ``joiner*.onnx``.

    ``EmissionOptions.model`` is their folder, or the file of the encoder: a folder may hold several, whose
    names go on alike. The vocabulary is ``tokens.txt`` or ``bpe.model`` beside them. It has no CTC head. A
    streaming encoder (``export-onnx-streaming.py``) works chunk by chunk, as in a stream.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken, or the three do not belong together.
        Unavailable: onnxruntime is not installed.
    """

    least_frames = 9  # as for TorchScript exports
    has_ctc = False

    def __init__(self, options: EmissionOptions) -> None:
        files = files_of(Path(options.model))
        self.tokens = tokens_of(options)
        _check_table(files["encoder"].with_name("tokens.txt"), self.tokens, options.tokens or options.model)
        self.device = torch.device(options.device)
        check(self.device.type == "cpu", "EmissionOptions.device", "be cpu for ONNX files", options.device)
        parts = {part: OnnxPart(path) for part, path in files.items()}
        self._encoder: Union[OnnxPart, ChunkedEncoder] = parts["encoder"]
        if "decode_chunk_len" in parts["encoder"].metadata:
            self._encoder = self.chunked = StreamingOnnxEncoder.chunked(parts["encoder"])
        else:
            parts["encoder"].check_names(*NAMES["encoder"])
        self.transducer = OnnxTransducer(parts, self.tokens.blank_id)
        size = self.transducer.vocab_size
        if size != self.tokens.size:
            path = files["decoder"]
            raise ValueError(f"the vocabulary has {self.tokens.size} pieces, but {path} has {size}")
        measured = self.measured_frame_shift(options.model)
        self.frame_shift = options.frame_shift or measured

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        encoder_out, out_lens = self._encoder(features.float(), lens.long())
        return encoder_out, out_lens.long()


class OnnxTransducer:
    """Predictor and joiner in ONNX files; see `Transducer`.

    Args:
        parts: encoder, decoder and joiner.
        blank_id: id of the blank.
    """

    def __init__(self, parts: dict[str, OnnxPart], blank_id: int) -> None:
        encoder, self._predictor, self._joiner = (parts[name] for name in NAMES)
        for part in ("decoder", "joiner"):
            parts[part].check_names(*NAMES[part])
        values = self._predictor.metadata
        name = str(self._predictor.path)
        with loading(name, "a predictor with context_size and vocab_size in its metadata"):
            self.context_size, self.vocab_size = int(values["context_size"]), int(values["vocab_size"])
        self.blank_id = blank_id
        with loading(name, "a predictor"):
            self.start = start_of(self.predict, self.context_size, self.vocab_size, blank_id)
            size = self.predict(torch.tensor([self.start])).shape[1]
        for part, places in ((encoder, encoder.outputs), (self._joiner, self._joiner.inputs)):
            rule = f"be of the joiner size {size} of {self._predictor.path.name}"
            found = next(place.shape[-1] for place in places if place.name == "encoder_out")
            check(found == size or not isinstance(found, int), f"{part.path}", rule, found)

    def project(self, encoder_out: Tensor) -> Tensor:
        return encoder_out  # the encoder's file has the projection in it

    def predict(self, contexts: Tensor) -> Tensor:
        return self._predictor(contexts.long())[0]

    def join(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        pairs = torch.broadcast_tensors(encoder, predictor)
        flat = (pair.reshape(-1, pair.shape[-1]) for pair in pairs)
        logits = self._joiner(*flat)[0]
        return logits.log_softmax(dim=-1).view(*pairs[0].shape[:-1], -1)


class OnnxPart:
    """One ONNX file: called with tensors in the order of its inputs, it returns those of its outputs.

    Args:
        path: of the file.

    Attributes:
        inputs, outputs: their names, types and shapes.
        metadata: what the file tells of itself, by name.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable("ONNX models need onnxruntime: pip install onnxruntime") from error
        self.path = path
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3  # errors
        try:
            self._session = onnxruntime.InferenceSession(str(path), settings, ["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            raise ValueError(f"{path} cannot be loaded as an ONNX model: {str(error)[:400]}") from error
        self.inputs, self.outputs = self._session.get_inputs(), self._session.get_outputs()
        self.metadata: dict[str, Any] = self._session.get_modelmeta().custom_metadata_map
        self._names = [one.name for one in self.inputs], [one.name for one in self.outputs]

    def check_names(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Take inputs and return outputs in this order; raise ValueError if the file has others."""
        for kind, wanted, found in zip(("inputs", "outputs"), (inputs, outputs), self._names):
            rule = f"have the {kind} {list(wanted)}"
            check(sorted(found) == sorted(wanted), str(self.path), rule, found[:8])
        self._names = list(inputs), list(outputs)

    def __call__(self, *values: Tensor) -> list[Tensor]:
        names, outputs = self._names
        feeds = {name: value.detach().contiguous().numpy() for name, value in zip(names, values)}
        return [torch.from_numpy(value) for value in self._session.run(outputs, feeds)]


class StreamingOnnxEncoder:
    """An encoder's file with states as inputs, each with an output ``new_NAME``; see `ChunkedEncoder`.

    Raises:
        ValueError: an input has no such output, or a number in the metadata is missing.
    """

    def __init__(self, part: OnnxPart) -> None:
        self._part = part
        self._states = [one for one in part.inputs if one.name != "x"]
        names = [one.name for one in self._states]
        part.check_names(["x", *names], ["encoder_out", *(f"new_{name}" for name in names)])

    @classmethod
    def chunked(cls, part: OnnxPart) -> ChunkedEncoder:
        """Return the encoder as one of whole utterances."""
        with loading(part.path, "a streaming encoder with decode_chunk_len and T in its metadata"):
            return ChunkedEncoder(cls(part), int(part.metadata["decode_chunk_len"]), int(part.metadata["T"]))

    def get_init_states(self, batch: int, device: torch.device) -> list[Tensor]:
        """Return the states before the first chunk: zeros."""
        types = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64}
        shapes = [[size if isinstance(size, int) else batch for size in one.shape] for one in self._states]
        return [torch.zeros(shape, dtype=types[one.type]) for shape, one in zip(shapes, self._states)]

    def __call__(
        self, features: Tensor, lens: Tensor, states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        out, *states = self._part(features, *states)
        return out, torch.full_like(lens, out.shape[1]), states


def files_of(model: Path) -> dict[str, Path]:
    """Return the three files of a folder, or of an encoder's file.

    Of a folder with files in int8 (``*.int8.onnx``) and others, the others are taken.

    Raises:
        FileNotFoundError: one is missing.
        ValueError: a folder holds several models.
    """
    if model.is_file():
        rule = "be a folder, or a file encoder*.onnx"
        check(model.name.startswith("encoder"), "EmissionOptions.model", rule, str(model))
        found = {part: model.with_name(part + model.name[len("encoder") :]) for part in NAMES}
    else:
        found = {part: _only(model, part) for part in NAMES}
    for part, path in found.items():
        if not path.is_file():
            raise FileNotFoundError(f"{model} is no transducer: {path.name} is missing (the {part})")
    return found


def _check_table(path: Path, tokens: AcousticTokens, name: str) -> None:
    """Raise ValueError unless ``tokens.txt`` beside a model, if it is there, has the pieces of ``tokens``."""
    pieces = AcousticTokens.load(path).pieces if path.is_file() else tokens.pieces
    odd = [pair for pair in zip(pieces, tokens.pieces) if pair[0] != pair[1]][:1]
    check(pieces == tokens.pieces, str(path), f"hold the pieces of {name}, in its order", odd or len(pieces))


def _only(folder: Path, part: str) -> Path:
    names = sorted(path.name for path in folder.glob(f"{part}*.onnx"))
    names = [name for name in names if not name.endswith(".int8.onnx")] or names
    rule = f"hold one {part}*.onnx (a file encoder*.onnx names one of several)"
    check(len(names) < 2, f"EmissionOptions.model {folder}", rule, names)
    return folder / (names[0] if names else f"{part}.onnx")
