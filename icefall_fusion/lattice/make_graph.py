"""Job ``make-graph``: decoding graphs H, HL, HLG, and G for rescoring, from acoustic pieces and ARPA files.
Knows: vocabularies, lexicons, graphs. Must not know: log-probs, searches, language models.
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from icefall_fusion.common.checks import check, check_choice
from icefall_fusion.lattice.compose import arpa_words, make_g, make_h, make_hl, make_hlg
from icefall_fusion.lattice.graph import KINDS, TOPOLOGIES, save_graph
from icefall_fusion.text.lexicon import Lexicon, make_lexicon
from icefall_fusion.text.tokens import AcousticTokens


@dataclass(frozen=True)
class MakeGraphOptions:
    """Make a decoding graph.

    Args:
        tokens: the acoustic model's bpe.model, or its folder.
        out: the .npz to write.
        kind: H (pieces), HL (words of a lexicon), HLG (with an n-gram over words), or G (an n-gram over words
            for rescoring).
        arpa: the n-gram over words, for HLG and G.
        words: file of the lexicon, one word per line; empty: the words of lexicon_arpa.
        lexicon_arpa: ARPA file whose words are the lexicon; empty: that of arpa. A G must have the lexicon
            of the HLG that it is used with.
        topology: of CTC, standard or modified.
        order: longest n-gram of arpa to use; -1: all.
    """

    tokens: str
    out: str
    kind: str = "HLG"
    arpa: str = ""
    words: str = ""
    lexicon_arpa: str = ""
    topology: str = "standard"
    order: int = -1

    def __post_init__(self) -> None:
        check_choice(self.kind, KINDS, "MakeGraphOptions.kind")
        check_choice(self.topology, TOPOLOGIES, "MakeGraphOptions.topology")
        name, order = "MakeGraphOptions.", self.order
        enough = self.kind in ("H", "HL") or bool(self.arpa)
        check(enough, name + "arpa", f"name an n-gram for a graph {self.kind}", self.arpa)
        check(order == -1 or order >= 1, name + "order", "be -1 or at least 1", order)
        both = bool(self.words and self.lexicon_arpa)
        check(not both, name + "words", "be left out with lexicon_arpa", self.words)
        lexicon = self.words or self.lexicon_arpa or self.arpa
        check(self.kind == "H" or bool(lexicon), name + "words", "name a word list for HL", self.words)


def run(options: MakeGraphOptions) -> int:
    """Run the job ``make-graph``; prints the size of the graph.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: words cannot be spelled, or the n-gram has words that the lexicon lacks.
        Unavailable: k2 or kaldilm is missing; with the remedy.
    """
    begun = time.perf_counter()
    tokens = AcousticTokens.load(options.tokens)
    if options.kind == "H":
        graph = make_h(tokens, options.topology)
    else:
        lexicon = _lexicon(options, tokens)
        if options.kind == "HL":
            graph = make_hl(tokens, lexicon, options.topology)
        elif options.kind == "HLG":
            graph = make_hlg(tokens, lexicon, options.arpa, options.topology, options.order)
        else:
            graph = make_g(tokens, lexicon, options.arpa, options.order)
    save_graph(options.out, graph)
    print(f"{options.out}: {options.kind} of {len(graph.source):,} arcs and {len(graph.words):,} words, "
          f"{time.perf_counter() - begun:.0f} s")
    return 0


def _lexicon(options: MakeGraphOptions, tokens: AcousticTokens) -> Lexicon:
    if not options.words:
        return make_lexicon(arpa_words(options.lexicon_arpa or options.arpa), tokens)
    if not Path(options.words).is_file():
        raise FileNotFoundError(f"there is no word list at {options.words}")
    return make_lexicon(Path(options.words).read_text(encoding="utf-8").split(), tokens)
