// Phrases (hot words) as an automaton, and what joins at every extension: phrases or a back-off n-gram.

#pragma once

#include <algorithm>
#include <cstdint>

#include "ngram.h"

namespace icefall::search {

// The phrases of one utterance (ngram/phrases.py): a trie whose nodes are numbered level by level, so that the children
// of a node follow one another and are sorted by piece. native.py has the same fields in the same order.
struct Phrases {
  const int32_t *piece, *first, *shorter;    // [N] piece of a node, [N + 1] first child, [N] longest shorter match
  const int32_t *from_root;                  // [V] child of the root, 0 where there is none
  const float *pending, *complete, *most;    // [N] boost on trial, boost of phrases that end here, most of any piece
  const int32_t *child;                      // node of each edge, or null: edges are numbered as nodes are
  int64_t start, base;                       // state of an empty hypothesis; what is added to states that are shown

  int next(int state, int one) const {
    for (; state != 0; state = shorter[state]) {
      const int32_t *from = piece + first[state], *to = piece + first[state + 1];
      const int32_t *found = to - from > 8 ? std::lower_bound(from, to, one) : std::find(from, to, one);
      if (found != to && *found == one) return child ? child[found - piece] : int(found - piece);
    }
    return from_root[one];
  }

  float score(int state, int one, bool begins) const {
    const float change = pending[next(state, one)] - pending[state];
    return begins ? change + complete[state] : change;
  }
};

// A score that joins at every extension. native.py has the same fields in the same order.
struct Scorer {
  const Ngram *ngram;      // null: phrases
  const Phrases *phrases;  // [B]
  double weight, bonus;
  double reach;            // the largest score in size

  int start(int64_t b) const { return ngram ? ngram->start() : int(phrases[b].start); }

  float score(int64_t b, int state, int piece, bool begins) const {
    return ngram ? ngram->score(state, piece) : phrases[b].score(state, piece, begins);
  }

  int next(int64_t b, int state, int piece) const {
    return ngram ? ngram->next(state, piece) : phrases[b].next(state, piece);
  }

  // The most that any piece scores after a state, weighted, with the bonus.
  double most(int64_t b, int state) const {
    return std::max(0.0, bonus) + weight * (ngram ? ngram->most(state) : phrases[b].most[state]);
  }

  // The same, but at least 0 without the bonus: an n-gram may be certain.
  double limit(int64_t b, int state) const {
    return std::max(0.0, bonus) + std::max(0.0, most(b, state) - std::max(0.0, bonus));
  }

  int64_t shown(int64_t b, int state) const { return ngram ? state : phrases[b].base + state; }
};

}  // namespace icefall::search
