"""A model that remembers trees scores as any other, and forwards what is new alone.
Knows: RememberingLm, recognizers, tiny models. Must not know: tuning.
"""
from __future__ import annotations

import pytest
import tiny

from icefall_fusion.acoustic.sources import EmissionOptions
from icefall_fusion.decode.language_models import LmOptions
from icefall_fusion.decode.options import NgramOptions, RecognizerOptions
from icefall_fusion.decode.recognizer import Recognizer
from icefall_fusion.decode.segments import Recognized
from icefall_fusion.decode.utterances import read_cuts
from icefall_fusion.lm import CausalLm
from icefall_fusion.lm.remembered import RememberingLm
from icefall_fusion.search import PrefixSearchOptions

METHODS = ("llm-delayed-shortest", "llm-delayed-interval-8-ahead", "nlm-shallow+llm-delayed-shortest")
WEIGHTS = (
    {"ctc": 1.0, "llm": 0.4, "nlm": 0.2, "words": 1.0}, {"ctc": 1.0, "llm": 0.9, "nlm": 0.4, "words": 0.0},
)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecognizerOptions, str]:
    made = tiny.everything(tmp_path_factory.mktemp("remembered"))
    return RecognizerOptions(
        emissions=EmissionOptions(model=made["model"]), ngram=NgramOptions(made["ngram"]),
        nlm=LmOptions(made["nlm"]), llm=LmOptions(made["llm"]),
        search=PrefixSearchOptions(beam=4), batch_size=3,
    ), made["cuts"]


def decode(options: RecognizerOptions, cuts: str, remember: bool) -> list[tuple[dict, float]]:
    """Return lists and tokens forwarded of each method under each weights, twice."""
    recognizer = Recognizer(options, METHODS)
    if remember:
        recognizer.models.remember()
    utterances = read_cuts(cuts, recognizer.source.wants)
    batches = [emitted for some in recognizer.batches(utterances) for emitted in recognizer.emit(some)]
    assert len(batches) > 1
    done = []
    for weights in WEIGHTS * 2:
        for name in METHODS:
            used = {source: value for source, value in weights.items() if source != "nlm" or "nlm" in name}
            method, result = recognizer.make_method(name, used), Recognized()
            for batch in batches:
                recognizer.decode(method, batch, range(len(batch.segments)), result)
            lists = {nbest.utterance: [(h.text, h.scores) for h in nbest] for nbest in result.join()}
            done.append((lists, result.cost["lm_tokens_forwarded"]))
    return done


def test_lists_are_those_of_a_model_that_forgets(options) -> None:
    options, cuts = options
    fresh, kept = decode(options, cuts, False), decode(options, cuts, True)
    for (lists, _), (others, _) in zip(fresh, kept):
        assert lists.keys() == others.keys()
        for utterance, hypotheses in lists.items():
            assert [text for text, _ in hypotheses] == [text for text, _ in others[utterance]]
            for (_, scores), (_, same) in zip(hypotheses, others[utterance]):
                assert same == pytest.approx(scores, abs=1e-3)
    third, fourth = kept[2 * len(METHODS)][1], kept[3 * len(METHODS)][1]
    assert third == fourth > 0  # the tree's counters go on, and nothing has been forwarded since


def test_other_prompts_and_no_names_open_new_trees(options) -> None:
    options, _ = options
    lm = RememberingLm(CausalLm.from_pretrained(options.llm.path))
    one = lm.open_tree(2, [[3], [4]], names=["a", "b"])
    node = one.insert(one.root(0), [5, 6])
    score = float(one.score([node])[0])
    before = one.stats()["lm_tokens_forwarded"]
    assert lm.open_tree(2, [[3], [4]], names=["a", "b"]) is one
    assert float(one.score([node])[0]) == score and one.stats()["lm_tokens_forwarded"] == before
    assert lm.open_tree(2, [[3], [7]], names=["a", "b"]) is not one
    assert lm.open_tree(2, [[3], [4]], names=["a", "c"]) is not one
    assert lm.open_tree(2) is not lm.open_tree(2)
