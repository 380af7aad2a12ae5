"""A recipe in icefall's format, small but real: its log-probs and attention scores are the model's own.
Knows: the source `icefall`. Must not know: search, fusion, icefall itself.
"""
from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch

from icefall_fusion.__main__ import main
from icefall_fusion.acoustic.sources import EmissionOptions, open_source
from icefall_fusion.data.features import PADDING

UTILS = '''
class AttributeDict(dict):
    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


def str2bool(value):
    return str(value).lower() in ("yes", "true", "t", "y", "1")
'''
MODEL = '''
import torch
from torch import nn


class Embed(nn.Module):  # (T - 7) // 2 frames, unmasked
    def __init__(self, bins, size):
        super().__init__()
        self.conv = nn.Conv1d(bins, size, 9, stride=2)

    def forward(self, x, lens):
        return self.conv(x.transpose(1, 2)).transpose(1, 2).tanh(), (lens - 7) // 2


class Encoder(nn.Module):
    def __init__(self, size, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(layers))

    def forward(self, x, lens, mask):  # [T,N,C]
        x = x.masked_fill(mask.T[:, :, None], 0.0)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x[::2], (lens + 1) // 2


class AttentionDecoder(nn.Module):
    def __init__(self, size, vocab_size, mark):
        super().__init__()
        self.mark = mark
        self.embed = nn.Embedding(vocab_size, size)
        self.output = nn.Linear(size, vocab_size)

    def nll(self, encoder_out, encoder_out_lens, token_ids):
        assert len(encoder_out) == len(encoder_out_lens) == len(token_ids)
        width = 1 + max(map(len, token_ids))
        inputs = torch.tensor([[self.mark, *t] + [self.mark] * (width - 1 - len(t)) for t in token_ids])
        outputs = torch.tensor([[*t, self.mark] + [-1] * (width - 1 - len(t)) for t in token_ids])
        x = self.embed(inputs)
        weights = x @ encoder_out.transpose(1, 2)
        beyond = torch.arange(encoder_out.shape[1])[None] >= encoder_out_lens[:, None]
        x = x + weights.masked_fill(beyond[:, None], float("-inf")).softmax(2) @ encoder_out
        logits = self.output(x).flatten(0, 1)
        nll = nn.functional.cross_entropy(logits, outputs.flatten(), ignore_index=-1, reduction="none")
        return nll.view(outputs.shape)


class Decoder(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 8)
        self.conv = nn.Conv1d(8, 8, kernel_size=2, groups=2, bias=False)
        self.blank_id, self.context_size, self.vocab_size = 0, 2, vocab_size

    def forward(self, y, need_pad=True):
        out = self.embedding(y.clamp(min=0)) * (y >= 0).unsqueeze(-1)
        out = nn.functional.pad(out, (0, 0, 1, 0)) if need_pad else out
        return self.conv(out.permute(0, 2, 1)).permute(0, 2, 1).relu()


class Joiner(nn.Module):
    def __init__(self, vocab_size, size):
        super().__init__()
        self.encoder_proj, self.decoder_proj = nn.Linear(size, 12), nn.Linear(8, 12)
        self.output_linear = nn.Linear(12, vocab_size)

    def forward(self, encoder_out, decoder_out, project_input=True):
        if project_input:
            encoder_out, decoder_out = self.encoder_proj(encoder_out), self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class AsrModel(nn.Module):
    def __init__(self, params):
        super().__init__()
        size = int(params.encoder_dim)
        self.encoder_embed = Embed(params.feature_dim, size)
        self.encoder = Encoder(size, params.num_encoder_layers)
        if params.use_ctc:
            self.ctc_output = nn.Sequential(
                nn.Dropout(p=0.1), nn.Linear(size, params.vocab_size), nn.LogSoftmax(dim=-1)
            )
        if params.use_transducer:
            self.decoder, self.joiner = Decoder(params.vocab_size), Joiner(params.vocab_size, size)
        if params.use_attention_decoder:
            self.attention_decoder = AttentionDecoder(size, params.vocab_size, params.sos_id)

    def forward_encoder(self, x, x_lens):
        x, x_lens = self.encoder_embed(x, x_lens)
        mask = torch.arange(x.shape[1])[None] >= x_lens[:, None]
        out, lens = self.encoder(x.permute(1, 0, 2), x_lens, mask)
        assert torch.all(lens > 0)
        return out.permute(1, 0, 2), lens
'''
TRAIN = '''
import argparse

import torch
from model import AsrModel

from icefall.utils import AttributeDict, str2bool


def add_model_arguments(parser):
    parser.add_argument("--encoder-dim", type=str, default="16")
    parser.add_argument("--num-encoder-layers", type=int, default=2)
    parser.add_argument("--use-ctc", type=str2bool, default=False)
    parser.add_argument("--use-transducer", type=str2bool, default=False)
    parser.add_argument("--use-attention-decoder", type=str2bool, default=False)


def get_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--exp-dir", type=str, default="zipformer/exp")
    add_model_arguments(parser)
    return parser


def get_params():
    return AttributeDict({"feature_dim": 80, "subsampling_factor": 4})


def get_model(params):
    return AsrModel(params)


torch.set_num_threads(1)
torch.set_num_interop_threads(1)
'''
OPTIONS = "--use-ctc 1 --use-attention-decoder 1"


def write_recipe(root: Path) -> Path:
    """Write a recipe as icefall lays it out, with weights and pieces, and return its folder."""
    recipe = root / "egs" / "corpus" / "ASR" / "zipformer"
    recipe.mkdir(parents=True)
    (recipe / "train.py").write_text(TRAIN)
    (recipe / "model.py").write_text(MODEL)
    (root / "icefall").mkdir()
    (root / "icefall" / "__init__.py").write_text("")
    (root / "icefall" / "utils.py").write_text(UTILS)
    tiny.write_bpe(recipe)
    torch.manual_seed(11)
    torch.save({"model": own_model(recipe).state_dict()}, recipe / "pretrained.pt")
    return recipe


def own_model(recipe: Path) -> torch.nn.Module:
    """Make the recipe's model without our code, with the weights if they are there."""
    spec = importlib.util.spec_from_file_location("standin_model", recipe / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Params:
        feature_dim, encoder_dim, num_encoder_layers = 80, "16", 2
        vocab_size, sos_id, use_ctc, use_attention_decoder = tiny.piece_count(), 1, True, True
        use_transducer = True

    model = module.AsrModel(Params).eval()
    if (recipe / "pretrained.pt").is_file():
        model.load_state_dict(torch.load(recipe / "pretrained.pt", weights_only=True)["model"])
    return model


@pytest.fixture()
def recipe(tmp_path):
    yield write_recipe(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "icefall"]:
        del sys.modules[name]


def options(recipe: Path, **values) -> EmissionOptions:
    values = {"recipe": str(recipe), "recipe_options": OPTIONS, **values}
    return EmissionOptions(str(recipe / "pretrained.pt"), **values)


@torch.no_grad()
def test_log_probs_and_attention_scores_are_the_models_own(recipe) -> None:
    before = list(sys.path), torch.get_num_threads(), {"train", "model"} & set(sys.modules)
    source = open_source(options(recipe))
    assert before == (list(sys.path), torch.get_num_threads(), {"train", "model"} & set(sys.modules))
    assert (source.wants, source.frame_shift, source.tokens.size) == ("features", 0.04, tiny.piece_count())
    model = own_model(recipe)
    inputs = [torch.randn(n, 80) for n in (63, 8, 120, 0)]  # eight frames make none
    made = source.emit(["a", "b", "c", "d"], inputs)
    padded = torch.full((2, 120, 80), PADDING)
    padded[0, :63], padded[1] = inputs[0], inputs[2]
    encoder_out, lens = model.forward_encoder(padded, torch.tensor([63, 120]))
    log_probs = model.ctc_output(encoder_out)
    assert made.lens.tolist() == [14, 0, 28, 0] and lens.tolist() == [14, 28]
    torch.testing.assert_close(made.log_probs[[0, 2]], log_probs, atol=1e-6, rtol=0)
    lists = [[[5, 6, 7], [5], []], [[9, 8, 7, 6], [9]]]
    scores = source.model.score_tokens(made.encoder_out[[0, 2]], made.lens[[0, 2]], [*lists])
    for row, (own, tokens) in enumerate(zip(scores, lists)):
        frames = encoder_out[row : row + 1].expand(len(tokens), -1, -1)
        expected = -model.attention_decoder.nll(frames, lens[row].repeat(len(tokens)), tokens).sum(1)
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)
    assert source.model.score_tokens(made.encoder_out[:1], made.lens[:1], [[]])[0].shape == (0,)
    with pytest.raises(ValueError, match="token_lists must hold 4 utterances, but is 2"):
        source.model.score_tokens(made.encoder_out, made.lens, lists)


@torch.no_grad()
def test_a_transducer_is_the_models_own(recipe) -> None:
    both = open_source(options(recipe, recipe_options="--use-ctc 1 --use-transducer 1"))
    alone = open_source(options(recipe, recipe_options="--use-transducer 1"))
    assert both.has_ctc and not alone.has_ctc and alone.transducer.start == (-1, 0)
    model, inputs = own_model(recipe), [torch.randn(63, 80), torch.randn(120, 80)]
    made = alone.emit(["a", "b"], inputs)
    encoder_out, lens = model.forward_encoder(inputs[1][None], torch.tensor([120]))
    contexts = torch.tensor([[-1, 0], [4, 5]])
    wanted = model.joiner(encoder_out[0, :2], model.decoder(contexts, False)[:, 0]).log_softmax(-1)
    found = alone.transducer.join(made.joiner_frames[1, :2], alone.transducer.predict(contexts))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert int(made.lens[1]) == int(lens) and bool(torch.isinf(made.log_probs).all())
    torch.testing.assert_close(both.emit(["a", "b"], inputs).joiner_frames, made.joiner_frames)


def test_heads_that_options_leave_out_are_logged(recipe, caplog) -> None:
    source = open_source(options(recipe, recipe_options="--use-ctc 1"))
    assert source.model is None
    assert "also has weights of ['attention_decoder', 'decoder', 'joiner']" in caplog.text


def test_a_recipe_needs_no_parser_of_its_own(recipe) -> None:
    train = (recipe / "train.py").read_text()
    (recipe / "train.py").write_text(train.replace("def get_parser", "def another_parser"))
    assert open_source(options(recipe, kind="icefall")).model is not None


def test_the_command_line_decodes_with_a_recipe(recipe, tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    arguments = {
        "test_sets": f"{{noise: {tiny.manifest(data)}}}", "out": str(tmp_path / "out"),
        "methods": "ctc-prefix,attention-rescoring", "emissions.model": str(recipe / "pretrained.pt"),
        "emissions.recipe": str(recipe), "emissions.recipe_options": OPTIONS,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    assert main(["decode", *words]) == 0
    files = list((tmp_path / "out").rglob("*attention-rescoring*.jsonl"))
    assert files and all(re.search('"attention": ?-', file.read_text()) for file in files)


def edited(name: str, old: str, new: str):
    def damage(recipe: Path) -> None:
        text = (recipe / name).read_text()
        assert old in text
        (recipe / name).write_text(text.replace(old, new))

    return damage


def saved(content):
    return lambda recipe: torch.save(content(recipe), recipe / "pretrained.pt")


def weights(recipe: Path) -> dict:
    return torch.load(recipe / "pretrained.pt", weights_only=True)["model"]


def without_bias(recipe: Path) -> dict:
    return {"model": {k: v for k, v in weights(recipe).items() if k != "ctc_output.1.bias"}}


def cut_short(recipe: Path) -> None:
    content = (recipe / "pretrained.pt").read_bytes()
    (recipe / "pretrained.pt").write_bytes(content[: len(content) // 2])


BAD = {
    "no train.py": (lambda r: (r / "train.py").unlink(), {}, "an icefall model needs .*train.py"),
    "no weights": (lambda r: (r / "pretrained.pt").unlink(), {}, "an icefall model needs .*pretrained.pt"),
    "no pieces": (lambda r: (r / "bpe.model").unlink(), {}, "EmissionOptions.tokens must name a bpe.model"),
    "missing package": (
        edited("model.py", "import torch\n", "import torch\nimport no_such_package\n"), {},
        "zipformer cannot be loaded as a recipe .*ModuleNotFoundError.*no_such_package",
    ),
    "syntax": (edited("train.py", "def get_params():", "def get_params(:"), {}, "as a recipe .*SyntaxError"),
    "exits": (edited("train.py", "torch.set_num_threads(1)", "exit(3)"), {}, "as a recipe .*SystemExit: 3"),
    "no get_model": (edited("train.py", "def get_model", "def get"), {}, "train.py must define get_model"),
    "no parser": (
        edited("train.py", "def add_model_arguments", "def add"),
        {"recipe_options": ""}, "as a recipe .*add_model_arguments",
    ),
    "bins": (edited("train.py", '"feature_dim": 80', '"feature_dim": 40'), {}, "feature_dim .* must be 80"),
    "unknown option": ((lambda r: None), {"recipe_options": "--depth 3"}, "recipe_options must be .*--depth"),
    "quotes": ((lambda r: None), {"recipe_options": "--depth '3"}, "as a recipe .*quotation"),
    "no CTC head": ((lambda r: None), {"recipe_options": ""}, "must have ctc_output, .*add --use-ctc 1"),
    "other size": (
        (lambda r: None), {"recipe_options": f"{OPTIONS} --encoder-dim 24"},
        "pretrained.pt cannot be loaded as weights of recipe .*zipformer: .*size mismatch",
    ),
    "other depth": (
        (lambda r: None), {"recipe_options": f"{OPTIONS} --num-encoder-layers 1"},
        "pretrained.pt must fit recipe .*zipformer.*encoder.layers.1.weight",
    ),
    "a weight is missing": (saved(without_bias), {}, "must have all weights .*ctc_output.1.bias"),
    "no dict": (saved(lambda r: [1, 2]), {}, "pretrained.pt must be a dict with the weights as 'model'"),
    "code": (saved(lambda r: {"model": re.compile("x")}), {}, "pretrained.pt cannot be loaded as weights"),
    "cut short": (cut_short, {}, "pretrained.pt cannot be loaded as weights of icefall"),
    "text": (lambda r: (r / "pretrained.pt").write_text("weights"), {}, "cannot be loaded as weights"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_recipes_and_weights_are_refused_by_name(kind, recipe) -> None:
    damage, values, message = BAD[kind]
    damage(recipe)
    before = list(sys.path), torch.get_num_threads()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_source(options(recipe, **values))
    assert before == (list(sys.path), torch.get_num_threads())
    assert len(str(caught.value)) < 1500


def test_options_of_a_recipe_need_a_recipe(tmp_path) -> None:
    with pytest.raises(ValueError, match="EmissionOptions.recipe must name the folder of train.py"):
        open_source(EmissionOptions("pretrained.pt", kind="icefall"))
    with pytest.raises(ValueError, match="EmissionOptions.recipe must be empty for kind torchscript"):
        EmissionOptions("a.pt", kind="torchscript", recipe="zipformer")
    with pytest.raises(ValueError, match="EmissionOptions.recipe_options must be empty without recipe"):
        EmissionOptions("a.pt", recipe_options="--use-ctc 1")
