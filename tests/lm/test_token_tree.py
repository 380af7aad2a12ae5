"""The token tree's integers against a naive tree of tuples: nodes, scores, slots, rows, masks.
Knows: TokenTree. Must not know: models.
"""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.common.native_build import load_native
from icefall_fusion.lm.token_tree import NativeTokenTree, TokenTree, make_tree

VOCAB = 4
paths = st.lists(st.integers(0, VOCAB - 1), max_size=6).map(tuple)
steps = st.lists(
    st.tuples(
        st.sampled_from(["insert", "score", "forward", "release"]),
        st.lists(st.tuples(st.integers(0, 1), paths), min_size=1, max_size=5),
    ),
    max_size=12,
)


def native_tree(vocab_size: int, utterances: int) -> TokenTree:
    return NativeTokenTree(load_native(), vocab_size, utterances)


each_tree = pytest.mark.parametrize("new_tree", [TokenTree, native_tree], ids=["python", "native"])


class NaiveTree:
    """The same bookkeeping with sets of (utterance, path); slow and obvious."""

    def __init__(self, prompts: list[tuple[int, ...]]) -> None:
        self.prompts = prompts
        self.scored = {(b, prompt[:n]) for b, prompt in enumerate(prompts) for n in range(1, len(prompt) + 1)}
        self.cached: set = set()
        self.stored: set = set()

    def above(self, key: tuple) -> list[tuple]:
        b, path = key
        return [(b, path[:n]) for n in range(1, len(path) + 1)]  # itself included

    def release(self, live: set) -> None:
        roots = set(enumerate(self.prompts))
        needed = {up for key in live | roots for up in self.above(key)}
        self.cached &= needed
        self.stored = {key for key in self.stored & self.cached if live & set(self.above(key))}


def arrays(nodes: list[int]) -> np.ndarray:
    return np.array(nodes, np.int64)


@each_tree
@settings(max_examples=150, deadline=None)
@given(script=steps)
def test_the_tree_agrees_with_a_naive_tree(new_tree, script: list) -> None:
    prompts = [(0,), (1, 2, 3)]
    tree, naive = new_tree(VOCAB, 2), NaiveTree(prompts)
    for b, prompt in enumerate(prompts):
        tree.add_root(b, prompt)
    known = {}  # (utterance, prompt + path) -> node
    most_cached = 0
    for action, targets in script:
        nodes = []
        for b, path in targets:
            node = tree.insert(int(tree.roots[b]), path)
            key = (b, prompts[b] + path)
            assert known.setdefault(key, node) == node
            nodes.append(node)
        tree.check_nodes(arrays(nodes))
        for (b, path), node in zip(targets, nodes):
            assert tree.path(node) == list(path)
            assert tree.depth[node] == len(prompts[b]) + len(path) - 1
        keys = [(b, prompts[b] + path) for b, path in targets]
        above = {up for key in keys for up in naive.above(key)}
        if action == "score":
            new = tree.unscored(arrays(nodes))
            assert {key_of(tree, node) for node in new} == above - naive.scored
            tree.set_scores(new, -(tree.token[new] + 1.0))
            naive.scored |= above
            expected = [-sum(token + 1.0 for token in path) for _, path in targets]
            np.testing.assert_allclose(tree.score[nodes], expected)
        elif action == "forward":
            todo = tree.uncached(arrays(nodes))
            assert {key_of(tree, node) for node in todo} == (above - naive.cached) | set(keys)
            assert (np.diff(todo) > 0).all()  # distinct, parents first
            tree.assign_slots(todo)
            naive.cached |= above
            store = arrays(sorted({n for n, key in zip(nodes, keys) if key not in naive.stored}))
            tree.assign_rows(store, store)  # any distinct numbers serve as rows
            naive.stored |= set(keys)
        elif action == "release":
            freed = tree.release(arrays(nodes))
            before = set(naive.stored)
            naive.release(set(keys))
            assert {key_of(tree, node) for node in freed} == before - naive.stored
        most_cached = max(most_cached, len(naive.cached))
        check_slots(tree, naive)
    assert tree.slots.used.max() <= most_cached  # slots are reused before new ones are taken


def key_of(tree: TokenTree, node: int) -> tuple:
    tokens, up = [], int(node)
    while up >= 0:
        tokens.append(int(tree.token[up]))
        up = int(tree.parent[up])
    return int(tree.utterance[node]), tuple(tokens[::-1])


def check_slots(tree: TokenTree, naive: NaiveTree) -> None:
    cached = [node for node in range(len(tree)) if tree.slots.of_node[node] >= 0]
    assert {key_of(tree, node) for node in cached} == naive.cached
    cells = {(int(tree.utterance[node]), int(tree.slots.of_node[node])) for node in cached}
    assert len(cells) == len(cached)  # nobody shares a slot
    if not cached:
        return
    length = tree.slots.capacity
    owner = tree.utterance[cached]
    seen = tree.slots.visible(owner, arrays(cached), length)
    near = tree.slots.in_window(owner, tree.depth[cached], length, window=2)
    for node, row, window in zip(cached, seen, near):
        ancestors, up = [], node
        while up >= 0:
            ancestors.append(int(tree.slots.of_node[up]))
            up = int(tree.parent[up])
        assert set(np.flatnonzero(row)) == set(ancestors)
        assert set(np.flatnonzero(row & window)) == set(ancestors[:2])


@each_tree
def test_many_slots_grow_and_keep_their_masks(new_tree) -> None:
    tree = new_tree(VOCAB, 1)
    node = tree.add_root(0, [0])
    deep = tree.insert(node, [1, 2, 3] * 60)
    tree.check_nodes(arrays([deep]))
    todo = tree.uncached(arrays([deep]))
    tree.assign_slots(todo)
    assert len(todo) == 181 == tree.slots.used[0] <= tree.slots.capacity
    assert tree.slots.visible(arrays([0]), arrays([deep]), 192).sum() == 181


@each_tree
def test_children_in_bulk_equal_single_inserts_and_count_what_is_new(new_tree) -> None:
    tree = new_tree(VOCAB, 1)
    root = tree.add_root(0, [0])
    first = tree.insert(root, [2])
    nodes, made = tree.children(arrays([root, root, first, root]), arrays([1, 2, 1, 1]))
    assert made == 2 and nodes[1] == first and nodes[0] == nodes[3]
    assert tree.path(int(nodes[2])) == [2, 1]


@each_tree
@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_of_the_vocabulary_is_refused(new_tree, token: int) -> None:
    tree = new_tree(VOCAB, 1)
    root = tree.add_root(0, [0])
    with pytest.raises(ValueError, match="token ids must lie between 0 and 3"):
        tree.insert(root, [1, token])
    with pytest.raises(ValueError, match="token ids must lie between 0 and 3"):
        tree.children(arrays([root]), arrays([token]))


@each_tree
def test_an_empty_prompt_is_refused(new_tree) -> None:
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        new_tree(VOCAB, 1).add_root(0, [])


def test_thousands_of_nodes_are_the_same_in_both_trees() -> None:
    rng = np.random.default_rng(0)
    trees = [TokenTree(50, 3), native_tree(50, 3)]
    for b in range(3):
        assert len({tree.add_root(b, [b, 7]) for tree in trees}) == 1
    for _ in range(40):
        nodes = rng.integers(0, len(trees[0]), 60)
        tokens = rng.integers(0, 50, 60)
        for tree in trees:
            tree.check_nodes(nodes)
        (one, made), (other, also) = (tree.children(nodes, tokens) for tree in trees)
        assert made == also and (one == other).all()
    assert len(trees[0]) == len(trees[1]) > 2000
    for tree in trees:
        tree.check_nodes(one)
        new = tree.unscored(one)
        tree.set_scores(new, -np.arange(len(new), dtype=float))
        tree.assign_slots(tree.uncached(one[:9]))
    for name in ("parent", "token", "depth", "utterance", "score"):
        size = len(trees[0])
        np.testing.assert_array_equal(*(getattr(tree, name)[:size] for tree in trees))
    for tree in trees:
        assert tree.uncached(one[5:20]).tolist() == trees[0].uncached(one[5:20]).tolist()


def test_without_a_compiler_the_tree_is_that_of_python(monkeypatch) -> None:
    load_native.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert type(make_tree(VOCAB, 1)) is TokenTree
    load_native.cache_clear()
