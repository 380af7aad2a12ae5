"""The models that the repository ships: where they lie, and decoding options that use them.
Knows: folder names under egs/minibooks/ASR. Must not know: how models are made or used.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from icefall_fusion.common.files import PathLike
from icefall_fusion.decode.language_models import LmOptions
from icefall_fusion.decode.recognizer import RecognizerOptions

RECIPE = Path(__file__).resolve().parents[2] / "egs" / "minibooks" / "ASR"
FOLDER = RECIPE / "pretrained"
WEIGHTS = "weights.yaml"
WORDS = "words.yaml"
NGRAM, LODR = "ngram.arpa.gz", "lodr.arpa.gz"
Options = TypeVar("Options", bound=RecognizerOptions)


def with_pretrained(
    options: Options, folder: PathLike = FOLDER, remedy: str = "name one (--emissions.model)"
) -> Options:
    """Return options in which every model that is not named is the shipped one.

    Where the options name no weights, those of the folder's ``weights.yaml`` are used.

    Args:
        options: of a recognizer.
        folder: has ``ctc_aed``, ``nlm``, ``llm``, ``matched_llm``, ``ngram.arpa.gz``, ``lodr.arpa.gz`` and
            ``weights.yaml``.
        remedy: for the message, an alternative to training a model.

    Raises:
        FileNotFoundError: the acoustic model is not there.
    """
    folder = Path(folder)
    if options.emissions.model:
        return options
    if not (folder / "ctc_aed" / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no pretrained model in {folder}; train one (egs/minibooks/ASR/run.sh) or {remedy}"
        )
    emissions = replace(options.emissions, model=str(folder / "ctc_aed"))
    return replace(with_shipped_lms(options, folder), emissions=emissions)


def with_shipped_lms(options: Options, folder: PathLike = FOLDER) -> Options:
    """Return options in which every language model, n-gram and weight that is not named is the shipped one.

    What the folder (see `with_pretrained`) does not have is left unnamed.
    """
    folder = Path(folder)
    lms = {
        name: replace(getattr(options, name), path=_path(getattr(options, name), folder / name))
        for name in ("nlm", "llm", "matched_llm")
    }
    ngram, shipped = options.ngram, folder / NGRAM
    if not ngram.path and shipped.is_file():
        ngram = replace(ngram, path=str(shipped))
    lodr = options.lodr or (str(folder / LODR) if (folder / LODR).is_file() else "")
    weights = options.weights
    if not weights and (folder / WEIGHTS).is_file():
        weights = str(folder / WEIGHTS)
    return replace(options, weights=weights, ngram=ngram, lodr=lodr, **lms)


def _path(options: LmOptions, shipped: Path) -> str:
    there = any((shipped / file).is_file() for file in ("config.json", "adapter_config.json"))
    return options.path or (str(shipped) if there else "")
