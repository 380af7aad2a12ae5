// The growth of the token tree (see token_tree.py). Its arrays are those of NativeTokenTree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace icefall {

struct TokenTree {
  int64_t vocab = 0, size = 0, capacity = 0;
  int64_t *parent = nullptr, *token = nullptr, *depth = nullptr, *utterance = nullptr;
  double *score = nullptr;
  const int64_t *slot = nullptr;
  std::vector<uint8_t> marked;

  explicit TokenTree(int64_t vocab_size) : vocab(vocab_size) { rehash(1024); }

  // A node without parent; -1: there is no room.
  int64_t first(int64_t of, int64_t id) {
    if (size >= capacity) return -1;
    parent[size] = -1, token[size] = id, depth[size] = 0, utterance[size] = of;
    return size++;
  }

  // The child of a node by a token, made if need be; -1: there is no room.
  int64_t child(int64_t node, int64_t id) {
    const int64_t key = node * vocab + id;
    size_t bucket = mix(key) & mask_;
    for (; keys_[bucket] >= 0; bucket = (bucket + 1) & mask_)
      if (keys_[bucket] == key) return values_[bucket];
    if (size >= capacity) return -1;
    parent[size] = node, token[size] = id, depth[size] = depth[node] + 1, utterance[size] = utterance[node];
    keys_[bucket] = key, values_[bucket] = size;
    if (2 * ++count_ > keys_.size()) rehash(2 * keys_.size());
    return size++;
  }

 private:
  std::vector<int64_t> keys_, values_;
  size_t mask_ = 0, count_ = 0;

  static size_t mix(uint64_t x) {
    x = (x ^ (x >> 31)) * 0x9E3779B97F4A7C15ULL;
    return x ^ (x >> 29);
  }

  void rehash(size_t room) {
    std::vector<int64_t> keys(room, -1), values(room);
    mask_ = room - 1;
    for (size_t i = 0; i < keys_.size(); ++i) {
      if (keys_[i] < 0) continue;
      size_t bucket = mix(keys_[i]) & mask_;
      while (keys[bucket] >= 0) bucket = (bucket + 1) & mask_;
      keys[bucket] = keys_[i], values[bucket] = values_[i];
    }
    keys_.swap(keys), values_.swap(values);
  }
};

}  // namespace icefall
