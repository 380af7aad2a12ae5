// A back-off n-gram over pieces as an automaton, for the prefix search on a CPU.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace icefall::search {

inline uint64_t mix(uint64_t x) {  // splitmix64: a random key for every piece
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

// A back-off n-gram over pieces (piece_ngram.py) as an automaton: a state is the longest context that it knows.
class Ngram {
 public:
  // For each order: n-grams as numbers in the base of all ids, their log-probs and back-off weights.
  Ngram(int64_t base, int64_t start, int orders, const int64_t *counts, const int64_t *const *keys,
        const float *const *scores, const float *const *backoffs)
      : base_(base), orders_(orders) {
    size_t entries = 0;
    for (int n = 0; n < orders; ++n) entries += counts[n];
    size_t room = 16;
    while (room < 2 * entries) room *= 2;
    mask_ = room - 1, keys_.assign(room, kEmpty), scores_.resize(room);
    size_t contexts = 1, buckets = 16;
    for (int n = 0; n + 1 < orders; ++n) contexts += counts[n];
    while (buckets < 2 * contexts) buckets *= 2;
    numbers_.assign(buckets, 0), states_.reserve(contexts);
    states_.push_back({0, 0, 0, 0.0f});
    for (int n = 1; n < orders; ++n)
      for (int64_t i = 0; i < counts[n - 1]; ++i) states_[state(n, keys[n - 1][i])].backoff = backoffs[n - 1][i];
    for (int n = 1; n <= orders; ++n)
      for (int64_t i = 0; i < counts[n - 1]; ++i) {
        const int64_t key = keys[n - 1][i];
        insert(uint64_t(state(n - 1, key / base)) * base + key % base, scores[n - 1][i]);
      }
    for (auto &context : states_)  // the next shorter context that is known
      if (context.length > 0) {
        int64_t power = 1;
        for (int n = 1; n < context.length; ++n) power *= base;
        context.shorter = longest(context.length - 1, context.key % power, power / base);
      }
    start_ = orders > 1 ? longest(1, start, 1) : 0;
    most_.assign(states_.size(), -INFINITY);
    for (size_t bucket = 0; bucket < room; ++bucket)
      if (keys_[bucket] != kEmpty) {
        float &most = most_[keys_[bucket] / base];
        most = std::max(most, scores_[bucket]);
      }
    for (int length = 1; length < orders; ++length)  // shorter contexts first
      for (size_t i = 1; i < states_.size(); ++i)
        if (states_[i].length == length)
          most_[i] = std::max(most_[i], states_[i].backoff + most_[states_[i].shorter]);
  }

  int start() const { return start_; }

  // The most that any piece scores after a context.
  float most(int state) const { return most_[state]; }

  float score(int state, int piece) const {
    float backoff = 0.0f;
    for (;; state = states_[state].shorter) {
      uint64_t key = uint64_t(state) * base_ + piece;
      for (size_t bucket = mix(key) & mask_; keys_[bucket] != kEmpty; bucket = (bucket + 1) & mask_)
        if (keys_[bucket] == key) return backoff + scores_[bucket];
      if (state == 0) return -INFINITY;  // unigrams of all ids are there
      backoff += states_[state].backoff;
    }
  }

  int next(int state, int piece) const {
    const Context &context = states_[state];
    int length = context.length + 1;
    int64_t key = context.key * base_ + piece, power = 1;
    for (int n = 0; n < context.length; ++n) power *= base_;
    if (length >= orders_) length = orders_ - 1, key %= power, power /= base_;
    return orders_ == 1 ? 0 : longest(length, key, power);
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t(0);
  struct Context {
    int length, shorter;
    int64_t key;
    float backoff;
  };
  int64_t base_;
  int orders_, start_ = 0;
  std::vector<Context> states_;
  std::vector<int> numbers_;  // of states by their hash; 0 where there is none
  size_t mask_;
  std::vector<uint64_t> keys_;
  std::vector<float> scores_, most_;

  // The bucket of numbers_ that holds a context, or the free one where it belongs.
  size_t bucket_of(int length, int64_t key) const {
    size_t bucket = mix(uint64_t(key) * 16 + length) & (numbers_.size() - 1);
    for (; numbers_[bucket] != 0; bucket = (bucket + 1) & (numbers_.size() - 1)) {
      const Context &context = states_[numbers_[bucket]];
      if (context.key == key && context.length == length) break;
    }
    return bucket;
  }

  int state(int length, int64_t key) {  // made if need be
    if (length == 0) return 0;
    if (2 * states_.size() >= numbers_.size()) {  // contexts that are no n-grams themselves
      numbers_.assign(2 * numbers_.size(), 0);
      for (size_t i = 1; i < states_.size(); ++i) numbers_[bucket_of(states_[i].length, states_[i].key)] = int(i);
    }
    int &number = numbers_[bucket_of(length, key)];
    if (number == 0) number = int(states_.size()), states_.push_back({length, 0, key, 0.0f});
    return number;
  }

  // The longest known context of these pieces' end; power is base to length - 1.
  int longest(int length, int64_t key, int64_t power) const {
    for (; length > 0; --length, key %= power, power = std::max<int64_t>(1, power / base_)) {
      const int number = numbers_[bucket_of(length, key)];
      if (number != 0) return number;
    }
    return 0;
  }

  void insert(uint64_t key, float score) {
    size_t bucket = mix(key) & mask_;
    while (keys_[bucket] != kEmpty) bucket = (bucket + 1) & mask_;
    keys_[bucket] = key, scores_[bucket] = score;
  }
};

}  // namespace icefall::search
