// Words of prefixes as paths in the token tree: the code of word_nodes.py, one call an event.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../common/guarded.h"
#include "../lm/token_tree.h"

using icefall::guarded;

namespace {

struct Spelling {  // pieces between two boundaries: their tokens, and how many words they are
  std::vector<int64_t> ids;
  int64_t words;
};

// Pieces (and whether they begin a text, or follow a prompt) -> tokens of the language model.
struct SpellingTable {
  std::unordered_map<std::string, Spelling> spellings;
  static std::string key(const int64_t *pieces, size_t count, bool begins, bool prompted) {
    std::string text(reinterpret_cast<const char *>(pieces), count * sizeof(int64_t));
    text.push_back(char(begins + 2 * prompted));
    return text;
  }
};

struct History {  // all words of a prefix
  int64_t node, words;  // of the tree; how many
  int64_t utterance;
};

struct Histories {
  std::unordered_map<int64_t, History> known;  // by arena node
  std::vector<int64_t> roots, chain, pieces;
};

}  // namespace

extern "C" {

void *spellings_open() {
  return icefall::guarded_pointer([]() -> void * { return new SpellingTable(); });
}

void spellings_close(void *table) { delete static_cast<SpellingTable *>(table); }

// What is known is forgotten when it is more than `most`: it is asked for again then.
int spellings_learn(void *table, const int64_t *pieces, int64_t count, int begins, int prompted, const int64_t *ids,
                    int64_t tokens, int64_t words, int64_t most) {
  auto &spellings = static_cast<SpellingTable *>(table)->spellings;
  return guarded([&] {
    if (int64_t(spellings.size()) >= most) spellings.clear();
    spellings[SpellingTable::key(pieces, size_t(count), begins, prompted)] = {{ids, ids + tokens}, words};
    return 0;
  });
}

// The roots of a batch, in the arena and in the tree, and how many words come before each.
void *histories_open(int64_t batch, const int64_t *prefixes, const int64_t *nodes, const int64_t *words) {
  return icefall::guarded_pointer([&]() -> void * {
    auto histories = std::make_unique<Histories>();
    for (int64_t b = 0; b < batch; ++b) {
      histories->roots.push_back(prefixes[b]);
      histories->known[prefixes[b]] = {nodes[b], words[b], b};
    }
    return histories.release();
  });
}

void histories_close(void *histories) { delete static_cast<Histories *>(histories); }

int64_t histories_count(const void *histories) {
  return int64_t(static_cast<const Histories *>(histories)->known.size());
}

// Find the tree node, and the number of words, of all words of prefixes: arena nodes `prefixes`, of which `parents`,
// `pieces` and `boundaries` tell (beam.py). `asked` counts the words that were looked up.
//
// Return 0: done; 1: a spelling is not known, `missing` has its pieces behind their number, whether it begins a text,
// and the utterance (room: 3 + `room`); 2: the tree has no room; 3: a spelling has more than `room` pieces. After
// 1 and 2 the call is to be repeated.
int histories_nodes(void *handle, const void *table, void *tree_, const int64_t *prefixes, int64_t count,
                    const int64_t *parents, const int64_t *piece_of, const int64_t *boundaries,
                    const uint8_t *prompted, int64_t *nodes, int64_t *words, int64_t *missing, int64_t room,
                    int64_t *asked) {
  auto &own = *static_cast<Histories *>(handle);
  const auto &spellings = static_cast<const SpellingTable *>(table)->spellings;
  auto &tree = *static_cast<icefall::TokenTree *>(tree_);
  return guarded([&] {
    for (int64_t i = 0; i < count; ++i) {
      own.chain.clear();
      int64_t prefix = prefixes[i];
      auto shorter = own.known.find(prefix);
      for (; shorter == own.known.end(); shorter = own.known.find(prefix)) {
        own.chain.push_back(prefix);
        prefix = boundaries[prefix];
      }
      History history = shorter->second;
      for (; !own.chain.empty(); own.chain.pop_back()) {
        const int64_t after = own.chain.back(), before = boundaries[after];
        own.pieces.clear();
        for (int64_t at = after; at != before; at = parents[at]) own.pieces.push_back(piece_of[at]);
        std::reverse(own.pieces.begin(), own.pieces.end());
        const bool begins = history.words == 0, goes_on = prompted[history.utterance] != 0;
        const auto key = SpellingTable::key(own.pieces.data(), own.pieces.size(), begins, goes_on);
        const auto spelling = spellings.find(key);
        if (spelling == spellings.end()) {
          if (int64_t(own.pieces.size()) > room) return 3;
          missing[0] = int64_t(own.pieces.size()), missing[1] = begins, missing[2] = history.utterance;
          std::copy(own.pieces.begin(), own.pieces.end(), missing + 3);
          return 1;
        }
        int64_t node = history.node;
        for (const int64_t id : spelling->second.ids)
          if ((node = tree.child(node, id)) < 0) return 2;
        *asked += spelling->second.words;
        history = {node, history.words + spelling->second.words, history.utterance};
        own.known.emplace(after, history);
      }
      nodes[i] = history.node, words[i] = history.words;
    }
    return 0;
  });
}

// Forget all but the roots, `prefixes` (known) and what they go back to.
int histories_keep(void *handle, const int64_t *prefixes, int64_t count, const int64_t *boundaries) {
  auto &own = *static_cast<Histories *>(handle);
  return guarded([&] {
    std::unordered_map<int64_t, History> kept;
    for (const int64_t root : own.roots) kept.emplace(root, own.known.at(root));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t prefix = prefixes[i]; !kept.count(prefix); prefix = boundaries[prefix]) {
        const auto entry = own.known.find(prefix);
        if (entry != own.known.end()) kept.insert(*entry);
      }
    own.known.swap(kept);
    return 0;
  });
}

}  // extern "C"
