"""Lattices: k2's graphs and lattices, and the searches and N-best lists along them.
Knows: graphs, lattices, fusions. Must not know: test sets, files of a run.

    graph.py           a decoding graph as plain tensors, its output labels as a vocabulary, its file
    compose.py         H, HL, HLG and G, composed by k2 from pieces, a lexicon and an ARPA file (kaldilm)
    make_graph.py      job make-graph
    k2_fsas.py         the one importer of k2; small steps with its FSAs; its CTC loss
    k2_lattice.py      options; from a graph and log-probs to k2's lattices
    lattices.py        lattices of a batch as plain tensors
    paths.py           best and random paths of k2's lattices
    word_ngram.py      an n-gram over words: scores of sentences, whole lattices rescored
    ctc_forward.py     CTC scores of piece sequences, summed over alignments
    beam.py            beam search along lattices, with delayed fusion
    nbest_lists.py     N-best lists of a beam, of paths, of the best path
    source.py          options and sources: k2 in this process, or saved lattices
    saved.py           lattices and lists in files
    npz.py             the form of all files here: arrays with a head
    make_lattices.py   job make-lattices
    methods.py         the names k2-*, and how each decodes a batch

A new lattice method is an entry of `methods.K2_SEARCHES`. If it is only a second pass over lists that exist,
the entry is all. Another way to search is a branch of `methods.decode_lattices`. A new kind of lists that k2
makes is a branch of `source.K2Source.lists_of` and a name in its ``list_kinds``; make-lattices then saves it.
"""
from __future__ import annotations
