// What Python calls of token_tree.h (see NativeTokenTree in token_tree.py).

#include "token_tree.h"

#include "../common/guarded.h"

#include <algorithm>
#include <cmath>

using icefall::guarded;
using icefall::TokenTree;

extern "C" {

void *token_tree_open(int64_t vocab) {
  return icefall::guarded_pointer([&]() -> void * { return new TokenTree(vocab); });
}

void token_tree_close(void *tree) { delete static_cast<TokenTree *>(tree); }

// Use arrays of `capacity` nodes. Python has copied the old entries.
int token_tree_bind(void *handle, int64_t capacity, int64_t *parent, int64_t *token, int64_t *depth,
                     int64_t *utterance, double *score, const int64_t *slot) {
  auto &tree = *static_cast<TokenTree *>(handle);
  tree.capacity = capacity, tree.parent = parent, tree.token = token, tree.depth = depth;
  tree.utterance = utterance, tree.score = score, tree.slot = slot;
  return guarded([&] {
    tree.marked.resize(capacity);
    return 0;
  });
}

int64_t token_tree_size(const void *tree) { return static_cast<const TokenTree *>(tree)->size; }

// The new node goes to `node`. These three return whether there was room; if not, call them again with more.
int token_tree_first(void *tree, int64_t utterance, int64_t token, int64_t *node) {
  return guarded([&] {
    *node = static_cast<TokenTree *>(tree)->first(utterance, token);
    return int(*node >= 0);
  });
}

// Walk or make a path from `node`, which becomes its last node.
int token_tree_insert(void *handle, int64_t *node, const int64_t *tokens, int64_t count) {
  auto &tree = *static_cast<TokenTree *>(handle);
  return guarded([&] {
    int64_t last = *node;
    for (int64_t i = 0; i < count && last >= 0; ++i) last = tree.child(last, tokens[i]);
    if (last >= 0) *node = last;
    return int(last >= 0);
  });
}

// Find or make the children of `nodes` by `tokens`.
int token_tree_children(void *handle, const int64_t *nodes, const int64_t *tokens, int64_t count, int64_t *children) {
  auto &tree = *static_cast<TokenTree *>(handle);
  return guarded([&] {
    for (int64_t i = 0; i < count; ++i)
      if ((children[i] = tree.child(nodes[i], tokens[i])) < 0) return 0;
    return 1;
  });
}

// Write the nodes at or above `nodes` up to the first that has a score, or, if `slots`, the nodes themselves and those
// above up to the first that has a slot; each once, parents before children. Return how many.
int64_t token_tree_climb(void *handle, const int64_t *nodes, int64_t count, int slots, int64_t *visited) {
  auto &tree = *static_cast<TokenTree *>(handle);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t node = nodes[i];
    bool own = slots != 0;  // cached or not, they are wanted
    for (; node >= 0 && !tree.marked[node]; node = tree.parent[node], own = false) {
      if (!own && (slots ? tree.slot[node] >= 0 : !std::isnan(tree.score[node]))) break;
      tree.marked[node] = 1;
      visited[total++] = node;
    }
  }
  for (int64_t i = 0; i < total; ++i) tree.marked[visited[i]] = 0;
  std::sort(visited, visited + total);
  return total;
}

// Fill in the scores of nodes (parents first) from the log-probs of their own tokens.
void token_tree_set_scores(void *handle, const int64_t *nodes, int64_t count, const double *log_probs) {
  auto &tree = *static_cast<TokenTree *>(handle);
  for (int64_t i = 0; i < count; ++i) tree.score[nodes[i]] = tree.score[tree.parent[nodes[i]]] + log_probs[i];
}

}  // extern "C"
