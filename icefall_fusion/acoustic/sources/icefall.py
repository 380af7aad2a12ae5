"""Log-probs and attention scores of an icefall recipe: the user's ``train.py`` and ``pretrained.pt``.
Knows: icefall's interface of recipes. Must not know: search, fusion, manifests.

Importing a recipe runs the user's own code, with all that it imports (icefall, k2, ...). Open only recipes
that you trust. The weights are read with ``torch.load(weights_only=True)`` and run no code.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Iterator, NoReturn, Sequence

import torch
from torch import Tensor

from icefall_fusion.acoustic.loading import loading
from icefall_fusion.acoustic.sources.base import FeatureSource, tokens_of
from icefall_fusion.acoustic.sources.stateless import ModuleTransducer
from icefall_fusion.common.checks import check
from icefall_fusion.data.features import DIM

if TYPE_CHECKING:
    from icefall_fusion.acoustic.sources import EmissionOptions


class IcefallSource(FeatureSource):
    """The model of an icefall recipe such as ``egs/librispeech/ASR/zipformer``.

    ``train.py`` must have ``get_params``, ``get_model`` and ``get_parser`` (or ``add_model_arguments``). Its
    model must have ``forward_encoder(features, lens)``, and ``ctc_output(frames)`` or a transducer
    (``decoder`` and ``joiner``). With an ``attention_decoder`` it scores N-best lists too, by
    ``nll(encoder_out, lens, token_ids)``.

    A causal model (``--causal 1``) needs options with one ``--chunk-size`` and one ``--left-context-frames``.
    icefall's ``ctc_decode.py`` appends 30 frames of silence for it; this source does not.

    Raises:
        FileNotFoundError: there is no recipe, no weights file or no bpe.model.
        ValueError: the recipe cannot be imported or makes neither a CTC model nor a transducer, or the
            weights do not fit it.
    """

    least_frames = 9  # the subsampling of icefall's Zipformer yields nothing for fewer

    def __init__(self, options: EmissionOptions) -> None:
        recipe, path = Path(options.recipe), Path(options.model)
        check(bool(options.recipe), "EmissionOptions.recipe", "name the folder of train.py", options.recipe)
        for file in (recipe / "train.py", path):
            if not file.is_file():
                raise FileNotFoundError(f"an icefall model needs {str(file)!r}, but there is no such file")
        self.tokens = tokens_of(options)
        self.device = torch.device(options.device)
        with _running(recipe):
            network = self._make(_import_train(recipe), recipe, options.recipe_options)
        name = f"the model of recipe {recipe}"
        if not hasattr(network, "forward_encoder"):
            raise ValueError(f"{name} must have forward_encoder, but it has none")
        self.has_ctc = hasattr(network, "ctc_output")
        joins = all(getattr(network, part, None) is not None for part in ("decoder", "joiner"))
        if not self.has_ctc and not joins:
            remedy = "add --use-ctc 1 (or --use-transducer 1) to the options"
            raise ValueError(f"{name} must have ctc_output, or decoder and joiner, but it has none: {remedy}")
        _load_weights(network, path, recipe)
        self.network = network.to(self.device).eval()
        if joins:
            with loading(name, "a transducer of icefall"):
                self.transducer = ModuleTransducer(self, name)
        if getattr(network, "attention_decoder", None) is not None:
            self.model = _AttentionScorer(network.attention_decoder)
        measured = self.measured_frame_shift(name)
        self.frame_shift = options.frame_shift or measured

    def _make(self, train: ModuleType, recipe: Path, words: str) -> torch.nn.Module:
        missing = [name for name in ("get_params", "get_model") if not hasattr(train, name)]
        if not hasattr(train, "get_parser") and not hasattr(train, "add_model_arguments"):
            missing.append("get_parser or add_model_arguments")
        if missing:
            raise ValueError(f"{recipe}/train.py must define {', '.join(missing)}, but does not")
        params = train.get_params()
        params.update(vars(_parse(train, recipe, words)))
        bins = params.get("feature_dim", DIM)
        check(bins == DIM, f"feature_dim of {recipe}/train.py", f"be {DIM} (log-mel bins)", bins)
        mark = self.tokens.sos_eos_id
        known = mark is not None or not params.get("use_attention_decoder")
        check(known, "EmissionOptions.tokens", "have <sos/eos> for the decoder", self.tokens.pieces[:5])
        params.update(vocab_size=self.tokens.size, blank_id=self.tokens.blank_id, sos_id=mark, eos_id=mark)
        return train.get_model(params)

    def encode(self, features: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.forward_encoder(features, lens)[:2]

    def log_probs(self, encoder_out: Tensor) -> Tensor:
        if not self.has_ctc:
            return super().log_probs(encoder_out)
        return self.network.ctc_output(encoder_out).float().log_softmax(dim=2)  # no change to log-probs


class _AttentionScorer:
    """Scores token lists by an attention decoder of icefall."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    @torch.no_grad()
    def score_tokens(
        self, encoder_out: Tensor, lens: Tensor, token_lists: Sequence[Sequence[Sequence[int]]]
    ) -> list[Tensor]:
        """Return the natural-log probability of each token list of each utterance, eos included.

        Args:
            encoder_out: [B,T,D]; lens: [B].
            token_lists: for each utterance any number of token lists (an N-best list).

        Returns:
            for each utterance a float32 tensor [N] on the CPU.
        """
        count = len(encoder_out)
        check(len(token_lists) == count, "token_lists", f"hold {count} utterances", len(token_lists))
        scores = []
        for frames, length, lists in zip(encoder_out, lens.tolist(), token_lists):
            if not lists:
                scores.append(torch.zeros(0))
                continue
            memory = frames[:length].expand(len(lists), -1, -1)  # [N,T,D]
            lengths = torch.full((len(lists),), length, device=frames.device)
            nll = self._decoder.nll(memory, lengths, [list(tokens) for tokens in lists])  # [N,U+1]
            scores.append(-nll.float().sum(dim=1).cpu())
        return scores


@contextlib.contextmanager
def _running(recipe: Path) -> Iterator[None]:
    """Run a recipe's code as if in its folder, and leave the process as it was before.

    ``train.py`` imports its neighbours by bare names (``model``, ``decoder``, ...) and sets the number of
    threads of PyTorch. Modules of the folder, the search path and the threads are put back at the end.

    Raises:
        ValueError: the code raises anything.
    """
    folder = recipe.absolute()
    root = folder.parents[3] if len(folder.parents) > 3 else folder  # of egs/CORPUS/ASR/NAME: has icefall/
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")}
    names -= {"icefall", *sys.stdlib_module_names}
    own = [name for name in sys.modules if name.partition(".")[0] in names]
    before = {name: sys.modules.pop(name) for name in own}
    path, threads, set_interop = list(sys.path), torch.get_num_threads(), torch.set_num_interop_threads
    sys.path[:0] = [str(folder), str(root)] if (root / "icefall").is_dir() else [str(folder)]
    torch.set_num_interop_threads = lambda count: None  # works only once in a process
    try:
        yield
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{recipe} cannot be loaded as a recipe of icefall: {what}") from error
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path
        torch.set_num_threads(threads)
        torch.set_num_interop_threads = set_interop


def _import_train(recipe: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", recipe.absolute() / "train.py")
    train = sys.modules["train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    return train


def _parse(train: ModuleType, recipe: Path, words: str) -> argparse.Namespace:
    """Return the recipe's options, as its own parser reads them.

    Raises:
        ValueError: an option is unknown or its value is wrong.
    """

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"EmissionOptions.recipe_options must be options of {recipe}/train.py: {message}")

    if hasattr(train, "get_parser"):
        parser = train.get_parser()
    else:
        parser = argparse.ArgumentParser()
        train.add_model_arguments(parser)
    parser.error = refuse
    return parser.parse_args(shlex.split(words))


def _load_weights(network: torch.nn.Module, path: Path, recipe: Path) -> None:
    """Load ``pretrained.pt``, a dict with ``model``; heads that the options leave out are skipped and logged.

    Raises:
        ValueError: the file is broken or holds more than weights, or weights are missing or of another shape.
    """
    with loading(path, "weights of icefall (pretrained.pt of export.py)"):
        content = torch.load(path, map_location="cpu", weights_only=True)
    known = isinstance(content, dict) and isinstance(content.get("model"), dict)
    check(known, f"{path}", "be a dict with the weights as 'model'", type(content).__name__)
    with loading(path, f"weights of recipe {recipe}"):
        missing, unexpected = network.load_state_dict(content["model"], strict=False)
    rule = f"have all weights of recipe {recipe} with these recipe_options, and these are missing"
    check(not missing, f"{path}", rule, missing[:5])
    modules = {name for name, _ in network.named_children()}
    foreign = [name for name in unexpected if name.partition(".")[0] in modules]
    rule = f"fit recipe {recipe} with these recipe_options, and these do not"
    check(not foreign, f"{path}", rule, foreign[:5])
    if unexpected:
        heads = sorted({name.partition(".")[0] for name in unexpected})
        logging.warning("%s also has weights of %s, which the recipe's options leave out", path, heads)
