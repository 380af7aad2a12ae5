"""The token tree's integers against a naive tree of tuples: nodes, scores, slots, rows, masks.
Knows: TokenTree. Must not know: models.
"""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icefall_fusion.lm.token_tree import TokenTree

VOCAB = 4
paths = st.lists(st.integers(0, VOCAB - 1), max_size=6).map(tuple)
steps = st.lists(
    st.tuples(
        st.sampled_from(["insert", "score", "forward", "release"]),
        st.lists(st.tuples(st.integers(0, 1), paths), min_size=1, max_size=5),
    ),
    max_size=12,
)


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


@settings(max_examples=150, deadline=None)
@given(steps)
def test_the_tree_agrees_with_a_naive_tree(script: list) -> None:
    prompts = [(0,), (1, 2, 3)]
    tree, naive = TokenTree(VOCAB, 2), NaiveTree(prompts)
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


def test_many_slots_grow_and_keep_their_masks() -> None:
    tree = TokenTree(VOCAB, 1)
    node = tree.add_root(0, [0])
    deep = tree.insert(node, [1, 2, 3] * 60)
    tree.check_nodes(arrays([deep]))
    todo = tree.uncached(arrays([deep]))
    tree.assign_slots(todo)
    assert len(todo) == 181 == tree.slots.used[0] <= tree.slots.capacity
    assert tree.slots.visible(arrays([0]), arrays([deep]), 192).sum() == 181


def test_children_in_bulk_equal_single_inserts_and_count_what_is_new() -> None:
    tree = TokenTree(VOCAB, 1)
    root = tree.add_root(0, [0])
    first = tree.insert(root, [2])
    nodes, made = tree.children(arrays([root, root, first, root]), arrays([1, 2, 1, 1]))
    assert made == 2 and nodes[1] == first and nodes[0] == nodes[3]
    assert tree.path(int(nodes[2])) == [2, 1]


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_of_the_vocabulary_is_refused(token: int) -> None:
    tree = TokenTree(VOCAB, 1)
    root = tree.add_root(0, [0])
    with pytest.raises(ValueError, match="token ids must lie between 0 and 3"):
        tree.insert(root, [1, token])
    with pytest.raises(ValueError, match="token ids must lie between 0 and 3"):
        tree.children(arrays([root]), arrays([token]))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        TokenTree(VOCAB, 1).add_root(0, [])


def test_unscored_lengths_count_each_hypothesis() -> None:
    tree = TokenTree(VOCAB, 1)
    root = tree.add_root(0, [0])
    short, long = tree.insert(root, [1, 2]), tree.insert(root, [1, 2, 3, 3])
    tree.check_nodes(arrays([long]))
    tree.set_scores(tree.unscored(arrays([short])), np.array([-1.0, -1.0]))
    assert tree.unscored_lengths(arrays([long, long, short, root])).tolist() == [2, 2, 0, 0]
