// Exact CTC prefix beam search on a CPU, one utterance after the other: what frame_step.py, candidates.py and
// children.py do with tensors, in one loop whose state stays in the cache. Built by native_build.py, called by native.py.
//
// Masses are linear doubles relative to a power of two (in `offset`), so that no logarithm stands in the loop.
// Prefixes below 2^-900 of the best mass are dropped.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../../common/guarded.h"

namespace {

constexpr double kTiny = 1e-30;                      // of the best mass: children with less are forgotten
constexpr double kLost = 0x1p-900, kScaleBelow = 0x1p-100, kLeastDecay = 1e-200;
constexpr double kImpossible = 230.0;  // nats: n-grams write 0 as 10^-99
constexpr double kWide = 300.0;  // nats of language models apart, from which on logarithms rank, not products
constexpr float kFarBelow = 200.0f;  // nats below a frame's best; what lies further down is found without a floor
constexpr double kLn2 = 0.693147180559945309417;

uint64_t mix(uint64_t x) {  // splitmix64: a random key for every piece
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
    size_t contexts = 1, places = 16;
    for (int n = 0; n + 1 < orders; ++n) contexts += counts[n];
    while (places < 2 * contexts) places *= 2;
    numbers_.assign(places, 0), states_.reserve(contexts);
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
    for (size_t place = 0; place < room; ++place)
      if (keys_[place] != kEmpty) {
        float &most = most_[keys_[place] / base];
        most = std::max(most, scores_[place]);
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
      for (size_t place = mix(key) & mask_; keys_[place] != kEmpty; place = (place + 1) & mask_)
        if (keys_[place] == key) return backoff + scores_[place];
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

  // The place in numbers_ of a context, or the free one where it belongs.
  size_t place_of(int length, int64_t key) const {
    size_t place = mix(uint64_t(key) * 16 + length) & (numbers_.size() - 1);
    for (; numbers_[place] != 0; place = (place + 1) & (numbers_.size() - 1)) {
      const Context &context = states_[numbers_[place]];
      if (context.key == key && context.length == length) break;
    }
    return place;
  }

  int state(int length, int64_t key) {  // made if need be
    if (length == 0) return 0;
    if (2 * states_.size() >= numbers_.size()) {  // contexts that are no n-grams themselves
      numbers_.assign(2 * numbers_.size(), 0);
      for (size_t i = 1; i < states_.size(); ++i) numbers_[place_of(states_[i].length, states_[i].key)] = int(i);
    }
    int &number = numbers_[place_of(length, key)];
    if (number == 0) number = int(states_.size()), states_.push_back({length, 0, key, 0.0f});
    return number;
  }

  // The longest known context of these pieces' end; power is base to length - 1.
  int longest(int length, int64_t key, int64_t power) const {
    for (; length > 0; --length, key %= power, power = std::max<int64_t>(1, power / base_)) {
      const int number = numbers_[place_of(length, key)];
      if (number != 0) return number;
    }
    return 0;
  }

  void insert(uint64_t key, float score) {
    size_t place = mix(key) & mask_;
    while (keys_[place] != kEmpty) place = (place + 1) & mask_;
    keys_[place] = key, scores_[place] = score;
  }
};

// What other language models have search/fusion.py say: when an utterance stops for them, how it is ranked meanwhile.
struct StopRule {
  int64_t every;     // frames between two looks; 0: never
  int unit;          // a look stops always (0), or if the shortest hypothesis has more words (1) or pieces (2)
  const Ngram *ahead;  // ranks what they have not scored yet; null: nothing does
  float weight, bonus;
  int64_t ahead_every;
};

// As in search/beam.py.
struct Numbers {
  uint64_t hash_factor, root_hash, no_parent_hash;
  double rounding;  // nats
};

struct Settings {
  Numbers numbers;
  int64_t batch;
  int beam, pieces, blank, columns;
  bool recover, ranks;  // ranks: language models take part in the ranking
  double score_beam;  // below 0: none
  const Ngram *ngram;  // joins at every extension; null: there is none
  double weight, bonus;
  StopRule rule;
  std::vector<uint64_t> keys;
};

struct Slot {  // a live prefix
  double blank, open, total;  // mass of alignments that end in blank, of others, of all
  uint64_t hash, parent_hash;
  int64_t node;
  int32_t last;     // piece
  int32_t row;      // of children
  int32_t context;  // state of the n-gram
  bool repeats;     // the last piece is that before it
  // of language models
  bool grew;               // since the last stop
  int32_t origin, opened;  // slot at the last stop, words begun since then
  int32_t length;          // words or pieces begun, of which the rule asks
  float fused;             // what they add to the ranking
  double gain;             // raw score of the n-gram since the last stop
  // of the look-ahead: state; estimates since the root: all, those of closed words, those of what is scored; how much
  // of the rest `fused` holds
  int32_t ahead_context;
  float ahead, ahead_closed, ahead_scored, ahead_estimate;
};

struct Way {  // a way on: a stay (below K) or K + slot * columns + column
  double key;
  int32_t index;
  bool operator<(const Way &other) const { return key > other.key || (key == other.key && index < other.index); }
};

struct Tree {  // where prefixes are spelled out: [rows, B, K] of search/arena.py
  int64_t *parents, *pieces, *boundaries;
  const uint8_t *starts;
};

struct Frames {  // of one utterance
  const float *rows;  // log-probs
  int64_t stride;
  const float *best;
  const uint8_t *searched;
  int64_t ids, ids_a_frame;  // of the nodes born in a frame: from ids + frame * ids_a_frame
};

struct Work {  // what a frame needs and leaves nothing of
  std::vector<double> stay_blank, stay_open, stay_total, probability, total, open, factor;
  std::vector<int32_t> columns, column_of, column_before, was, parent, used, kept;
  std::vector<uint8_t> struck;
  std::vector<Way> ways;
  std::vector<float> maxima;
  std::vector<std::pair<float, int32_t>> found;
  std::vector<Slot> next;

  explicit Work(const Settings &set) {
    const size_t slots = set.beam, all = slots * set.columns;
    stay_blank.resize(slots), stay_open.resize(slots), stay_total.resize(slots), factor.resize(slots);
    parent.resize(slots), used.resize(slots), kept.resize(slots), next.resize(slots);
    probability.resize(set.columns), was.resize(set.columns), total.resize(all), open.resize(all), struck.resize(all);
    columns.reserve(set.pieces), ways.reserve(slots + all), found.reserve(set.pieces);
    column_of.assign(set.pieces, -1);
    column_before.assign(set.pieces, set.columns);  // a column of zeros
  }
};

// Return a floor that at least `wanted` of the values reach, and not many more.
float floor_of(const float *values, int count, int wanted) {
  const auto reach = [&](float floor) {
    int n = 0;
    for (int i = 0; i < count; ++i) n += values[i] >= floor;
    return n;
  };
  float high = values[0];
  for (int i = 1; i < count; ++i) high = values[i] > high ? values[i] : high;
  float low = high - kFarBelow;
  if (reach(low) < wanted) return -INFINITY;
  for (int step = 0; step < 16; ++step) {
    const float middle = 0.5f * (low + high);
    const int n = reach(middle);
    (n >= wanted ? low : high) = middle;
    if (n >= wanted && n <= wanted + wanted / 4) break;
  }
  return low;
}

// Call found(v) for all values that reach a floor.
template <class Found>
void where_reached(const float *values, int count, float floor, Found found) {
  int v = 0;
#if defined(__AVX512F__)
  const __m512 least = _mm512_set1_ps(floor);
  for (; v + 16 <= count; v += 16)
    for (unsigned bits = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + v), least, _CMP_GE_OQ); bits; bits &= bits - 1)
      found(v + __builtin_ctz(bits));
#elif defined(__AVX2__)
  const __m256 least = _mm256_set1_ps(floor);
  for (; v + 8 <= count; v += 8)
    for (unsigned bits = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values + v), least, _CMP_GE_OQ)); bits;
         bits &= bits - 1)
      found(v + __builtin_ctz(bits));
#endif
  for (; v < count; ++v)
    if (values[v] >= floor) found(v);
}

// Find the best pieces of a frame but blank that reach a floor, in no order. The best n lie in the n groups with the
// largest maxima, so a floor that n maxima reach is one that n pieces reach, and few more do.
void best_pieces(const float *row, float floor, const Settings &set, Work &work) {
  const int pieces = set.pieces, wanted = set.columns;
  auto &columns = work.columns;
  columns.clear();
  if (wanted >= pieces - 1) {
    where_reached(row, pieces, floor, [&](int v) {
      if (v != set.blank) columns.push_back(v);
    });
    return;
  }
  const int groups = std::min(pieces, (2 * wanted + 31) / 16 * 16);
  auto &maxima = work.maxima;
  maxima.assign(row, row + groups);
  float *top = maxima.data();
  int start = groups;
  for (; start + groups <= pieces; start += groups) {
    const float *part = row + start;
    for (int g = 0; g < groups; ++g) top[g] = part[g] > top[g] ? part[g] : top[g];
  }
  for (int v = start; v < pieces; ++v) top[v - start] = std::max(top[v - start], row[v]);
  auto &found = work.found;
  found.clear();
  floor = std::max(floor, floor_of(top, groups, wanted + 1));  // one more: blank may be among them
  where_reached(row, pieces, floor, [&](int v) {
    if (v != set.blank) found.emplace_back(-row[v], v);
  });
  if (int(found.size()) > wanted) {
    std::nth_element(found.begin(), found.begin() + wanted, found.end());
    found.resize(wanted);
  }
  for (const auto &entry : found) columns.push_back(entry.second);
}

class Utterance {
 public:
  double offset = 0.0;
  std::vector<Slot> slots;

  int64_t at = 0;  // the next frame
  bool fired = false;  // it stopped at `at`, so that language models could score

  void begin(const Settings &set, int64_t number) {
    Slot root{};
    root.blank = root.total = 1.0, root.hash = set.numbers.root_hash, root.parent_hash = set.numbers.no_parent_hash;
    root.node = number * set.beam, root.last = set.blank;
    if (set.ngram) root.context = set.ngram->start();
    if (set.rule.ahead) root.ahead_context = set.rule.ahead->start();
    slots = {root};
    slots.reserve(set.beam);
    longest_ = set.rule.unit == 1 ? 1 : 0;  // with one word begun none is closed; a piece is closed at once
    if (!set.recover) return;
    width_ = set.columns + 1;
    child_.assign(size_t(set.beam) * set.pieces, 0.0);
    open_.assign(size_t(set.beam) * width_, 0.0);
  }

  // Go on, from where it stands, before frame `until` or to where the rule stops it; `fused` is what language models add.
  void run(const Settings &set, Work &work, const Frames &frames, int64_t until, bool paced, const float *fused,
           const Tree &tree) {
    for (size_t k = 0; k < slots.size(); ++k) {
      Slot &slot = slots[k];
      slot.origin = int(k), slot.opened = 0, slot.grew = false, slot.gain = 0.0;
      if (set.ranks) slot.fused = fused[k];
      if (fired) slot.ahead_scored = slot.ahead_closed;
    }
    if (fired) look_ahead(set);
    fired = false;
    while (at < until && !fired) {
      const int64_t t = at++;
      if (frames.searched[t])
        step(set, work, frames.rows + t * frames.stride, frames.best[t], frames.ids + t * frames.ids_a_frame, tree);
      else
        hear_blank();
      if (!paced) continue;
      fired = stops(set);
      if (!fired && set.rule.ahead && at % set.rule.ahead_every == 0) look_ahead(set);
    }
  }

 private:
  // Children of live prefixes by row: mass = child * decay; `open_` is what does not end in blank, of the pieces
  // `before_` (and a column of zeros).
  double decay_ = 1.0;
  int width_ = 0;
  std::vector<double> child_, open_;
  std::vector<int32_t> before_;
  bool wide_ = false, rests_ = false;
  int longest_ = 0;  // length of the shortest hypothesis at the last stop

  void hear_blank() {  // a piece may repeat after frames that were left out
    if (rests_) return;
    rests_ = true;
    for (auto &slot : slots) slot.blank = slot.total, slot.open = 0.0;
    std::fill(open_.begin(), open_.end(), 0.0);
  }

  void step(const Settings &set, Work &work, const float *row, float best, int64_t first_id, const Tree &tree) {
    rests_ = false;
    const double blank = std::exp(double(row[set.blank]) - best);
    weigh(set, work);
    stay(set, work, row, best, blank);
    best_pieces(row, least_score(set, work, best), set, work);
    if (set.ngram)
      std::sort(work.columns.begin(), work.columns.end(), [&](int one, int other) { return row[one] > row[other]; });
    const int columns = int(work.columns.size());
    for (int j = 0; j < columns; ++j) {
      work.probability[j] = std::exp(double(row[work.columns[j]]) - best);
      work.column_of[work.columns[j]] = j;
    }
    extend(set, work, tree, blank);
    choose(set, work);
    move(set, work, first_id, tree);
    if (set.recover) keep_children(set, work, blank);
    slots.swap(work.next);
    for (const int v : work.columns) work.column_of[v] = -1;
    rescale();
  }

  // Whether language models score after the frame before `at`.
  bool stops(const Settings &set) {
    const StopRule &rule = set.rule;
    if (rule.every == 0 || at % rule.every != 0) return false;
    if (rule.unit == 0) return true;
    if (slots.empty()) return false;
    int shortest = std::numeric_limits<int>::max();
    for (const Slot &slot : slots) shortest = std::min(shortest, slot.length);
    if (shortest <= longest_) return false;
    longest_ = shortest;
    return true;
  }

  // Let `fused` hold the estimates of all that is not scored.
  void look_ahead(const Settings &set) {
    if (!set.rule.ahead) return;
    for (Slot &slot : slots) {
      const float ahead = slot.ahead - slot.ahead_scored;
      slot.fused += ahead - slot.ahead_estimate;
      slot.ahead_estimate = ahead;
    }
  }

  double with_nats(double key, double nats) const { return wide_ ? key + nats : key * std::exp(nats); }

  double key(double mass, double factor) const { return wide_ ? std::log(mass) + factor : mass * factor; }

  // What language models add to the ranking: a factor, or nats where those are far apart.
  void weigh(const Settings &set, Work &work) {
    const double reach = set.ngram ? set.weight * kImpossible + std::abs(set.bonus) : 0.0;
    wide_ = !(reach < kWide);
    if (!set.ranks || slots.empty()) {
      std::fill(work.factor.begin(), work.factor.end(), wide_ ? 0.0 : 1.0);
      return;
    }
    double least = slots[0].fused, most = least;
    for (const Slot &slot : slots) least = std::min(least, double(slot.fused)), most = std::max(most, double(slot.fused));
    wide_ = !(most - least + reach < kWide);
    for (size_t k = 0; k < slots.size(); ++k)
      work.factor[k] = wide_ ? double(slots[k].fused) : std::exp(double(slots[k].fused) - most);
  }

  void stay(const Settings &set, Work &work, const float *row, float best, double blank) {
    const int count = int(slots.size());
    work.ways.clear();
    for (int k = 0; k < count; ++k) {
      const Slot &slot = slots[k];
      int parent = -1;
      for (int j = 0; j < count; ++j) parent = slots[j].hash == slot.parent_hash ? j : parent;
      work.parent[k] = parent;
      double open = slot.open;
      if (parent >= 0) {
        open += slot.repeats ? slots[parent].blank : slots[parent].total;
        // a live child's own total is the better one
        if (set.recover) child_[size_t(slots[parent].row) * set.pieces + slot.last] = slot.total / decay_;
      }
      work.stay_blank[k] = slot.total * blank;
      work.stay_open[k] = open > 0 ? open * std::exp(double(row[slot.last]) - best) : 0.0;
      work.stay_total[k] = work.stay_blank[k] + work.stay_open[k];
      if (work.stay_total[k] > 0) work.ways.push_back({key(work.stay_total[k], work.factor[k]), k});
    }
  }

  // The floor of the keys: a way must beat the worst stay where there is one in every slot.
  double floor_key(const Settings &set, const Work &work) const {
    double floor = std::numeric_limits<double>::infinity();
    for (const Way &way : work.ways) floor = std::min(floor, way.key);
    return int(work.ways.size()) == set.beam ? floor : -std::numeric_limits<double>::infinity();
  }

  // The least log-prob of a piece that could survive if the n-gram were certain of it; -inf without an n-gram or with
  // mass to recover, where the number of pieces is bounded instead.
  float least_score(const Settings &set, const Work &work, float best) const {
    if (!set.ngram || !weighs(set) || set.recover || slots.empty()) return -INFINITY;
    double most = -std::numeric_limits<double>::infinity();
    for (size_t k = 0; k < slots.size(); ++k) most = std::max(most, key(slots[k].total, work.factor[k]));
    const double floor = floor_key(set, work);
    const double needed = wide_ ? floor - most : std::log(std::max(floor, 0.0) / most);
    return float(needed - std::max(0.0, set.bonus) + best - set.numbers.rounding);
  }

  bool weighs(const Settings &set) const { return set.weight != 0 || set.bonus != 0; }

  bool opens(const Tree &tree, const Slot &slot, int piece, const Settings &set) const {
    return tree.starts && (tree.starts[piece] || slot.last == set.blank);
  }

  // All slots by all columns. What is a live prefix itself is struck out.
  void extend(const Settings &set, Work &work, const Tree &tree, double blank) {
    const int count = int(slots.size()), columns = int(work.columns.size());
    const int32_t *pieces = work.columns.data();
    const double *probability = work.probability.data();
    std::fill_n(work.struck.begin(), size_t(count) * columns, 0);
    for (int k = 0; k < count; ++k) {
      const int place = work.parent[k] < 0 ? -1 : work.column_of[slots[k].last];
      if (place >= 0) work.struck[size_t(work.parent[k]) * columns + place] = 1;
    }
    double floor = floor_key(set, work);
    if (set.recover) {
      for (size_t j = 0; j < before_.size(); ++j) work.column_before[before_[j]] = int(j);
      for (int j = 0; j < columns; ++j) work.was[j] = work.column_before[pieces[j]];
      for (const int v : before_) work.column_before[v] = set.columns;
    }
    const double shrink = decay_ * blank;
    for (int k = 0; k < count; ++k) {
      const Slot &slot = slots[k];
      double *total = work.total.data() + size_t(k) * columns, *open = work.open.data() + size_t(k) * columns;
      const int same = slot.last == set.blank ? -1 : work.column_of[slot.last];
      if (set.recover) {
        const double *child = child_.data() + size_t(slot.row) * set.pieces;
        const double *was_open = open_.data() + size_t(slot.row) * width_;
        const int32_t *was = work.was.data();
        for (int j = 0; j < columns; ++j) open[j] = (was_open[was[j]] + slot.total) * probability[j];
        if (same >= 0) open[same] = (was_open[was[same]] + slot.blank) * probability[same];
        for (int j = 0; j < columns; ++j) total[j] = child[pieces[j]] * shrink + open[j];
      } else {
        for (int j = 0; j < columns; ++j) total[j] = open[j] = slot.total * probability[j];
        if (same >= 0) total[same] = open[same] = slot.blank * probability[same];
      }
      const uint8_t *struck = work.struck.data() + size_t(k) * columns;
      const double factor = work.factor[k];
      const int first = set.beam + k * columns;
      if (set.ngram && weighs(set)) {
        const double ceiling = std::max(0.0, set.bonus) + set.weight * set.ngram->most(slot.context);
        double least = wide_ ? floor : std::max(floor, 0.0);
        for (int j = 0; j < columns; ++j) {  // the most probable piece first
          if (!(total[j] > 0) || struck[j]) continue;
          const double bare = key(total[j], factor);
          if (!(with_nats(bare, ceiling) > least)) {
            if (set.recover || j == same) continue;
            break;
          }
          const double gain = set.weight * set.ngram->score(slot.context, pieces[j]) +
                              (opens(tree, slot, pieces[j], set) ? set.bonus : 0.0);
          const double full = with_nats(bare, gain);
          if (!(full > least)) continue;
          work.ways.push_back({full, first + j});
          if (int(work.ways.size()) < 3 * set.beam) continue;
          best_ways(set, work);  // a way must beat all of these
          least = work.ways.back().key;
        }
        floor = least;
      } else if (wide_) {
        for (int j = 0; j < columns; ++j)
          if (total[j] > 0 && !struck[j] && std::log(total[j]) + factor > floor)
            work.ways.push_back({std::log(total[j]) + factor, first + j});
      } else {
        const double least = std::max(floor, 0.0);
        for (int j = 0; j < columns; ++j)
          if (total[j] * factor > least && !struck[j]) work.ways.push_back({total[j] * factor, first + j});
      }
    }
    if (set.recover) remember_live(work, columns);
  }

  // A child that is live itself is remembered as what it is in the beam, for when it dies.
  void remember_live(Work &work, int columns) {
    for (size_t k = 0; k < slots.size(); ++k) {
      const int place = work.parent[k] < 0 ? -1 : work.column_of[slots[k].last];
      if (place < 0) continue;
      work.total[size_t(work.parent[k]) * columns + place] = work.stay_total[k];
      work.open[size_t(work.parent[k]) * columns + place] = work.stay_open[k];
    }
  }

  double mass(const Settings &set, const Work &work, const Way &way) const {
    return way.index < set.beam ? work.stay_total[way.index] : work.total[way.index - set.beam];
  }

  // Leave the best K ways, the worst of them last.
  void best_ways(const Settings &set, Work &work) const {
    std::nth_element(work.ways.begin(), work.ways.begin() + set.beam - 1, work.ways.end());
    work.ways.resize(set.beam);
  }

  // Leave the best K ways that are good enough, best first.
  void choose(const Settings &set, Work &work) {
    auto &ways = work.ways;
    if (int(ways.size()) > set.beam) best_ways(set, work);
    std::sort(ways.begin(), ways.end());
    if (ways.empty()) return;
    const double best = ways[0].key, beam = set.score_beam;
    const double least = beam < 0 ? -INFINITY : wide_ ? best - beam : best * std::exp(-beam);
    double most = 0.0;
    for (const Way &way : ways) most = std::max(most, mass(set, work, way));
    const auto lost = [&](const Way &way) { return way.key < least || mass(set, work, way) < kLost * most; };
    ways.erase(std::remove_if(ways.begin(), ways.end(), lost), ways.end());
  }

  // Let the slots of the next frame go these ways.
  void move(const Settings &set, Work &work, int64_t first_id, const Tree &tree) {
    const int columns = int(work.columns.size());
    work.next.clear();
    for (const Way &way : work.ways) {
      const int k = int(work.next.size());
      const bool grew = way.index >= set.beam;
      const int place = way.index - set.beam, from = grew ? place / columns : way.index;
      const Slot &old = slots[from];
      work.kept[k] = grew ? -1 : from;
      work.next.push_back(old);
      Slot &slot = work.next.back();
      if (!grew) {
        slot.blank = work.stay_blank[from], slot.open = work.stay_open[from], slot.total = work.stay_total[from];
        continue;
      }
      const int piece = work.columns[place % columns];
      slot.total = work.total[place], slot.open = work.open[place], slot.blank = std::max(0.0, slot.total - slot.open);
      slot.hash = (old.hash * set.numbers.hash_factor) ^ set.keys[piece], slot.parent_hash = old.hash;
      slot.node = first_id + k, slot.last = piece, slot.row = -1, slot.repeats = piece == old.last;
      tree.parents[slot.node] = old.node, tree.pieces[slot.node] = piece;
      if (tree.boundaries) tree.boundaries[slot.node] = tree.starts[piece] ? old.node : tree.boundaries[old.node];
      tell_models(set, tree, old, piece, slot);
    }
  }

  // Let language models know that a slot grew by a piece.
  void tell_models(const Settings &set, const Tree &tree, const Slot &old, int piece, Slot &slot) const {
    slot.grew = true;
    const bool opened = opens(tree, old, piece, set);
    slot.length += set.rule.unit == 1 ? opened : 1;
    if (set.ngram) {
      const float gain = set.ngram->score(old.context, piece);
      slot.context = set.ngram->next(old.context, piece);
      slot.gain += gain, slot.opened += opened;
      if (set.weight != 0) slot.fused += float(set.weight) * gain;
      if (set.bonus != 0) slot.fused += float(set.bonus) * opened;
    }
    if (!set.rule.ahead) return;
    slot.ahead += set.rule.weight * set.rule.ahead->score(old.ahead_context, piece) + set.rule.bonus * opened;
    slot.ahead_context = set.rule.ahead->next(old.ahead_context, piece);
    if (tree.starts[piece]) slot.ahead_closed = old.ahead;
  }

  // Bring the children of those that stay to this frame; newborn prefixes have none.
  void keep_children(const Settings &set, Work &work, double blank) {
    const int columns = int(work.columns.size());
    double most = 0.0;
    for (const Slot &slot : work.next) most = std::max(most, slot.total);
    const double now = decay_ * blank, tiny = kTiny * most;
    const bool renew = now < kLeastDecay;
    decay_ = renew ? 1.0 : now;
    std::fill(work.used.begin(), work.used.end(), 0);
    for (size_t k = 0; k < work.next.size(); ++k) {
      if (work.kept[k] < 0) continue;
      const int row = work.next[k].row;
      work.used[row] = 1;
      double *child = child_.data() + size_t(row) * set.pieces, *open = open_.data() + size_t(row) * width_;
      if (renew)
        for (int v = 0; v < set.pieces; ++v) child[v] = child[v] * now < tiny ? 0.0 : child[v] * now;
      const double *total = work.total.data() + size_t(work.kept[k]) * columns;
      const double *out = work.open.data() + size_t(work.kept[k]) * columns, unit = 1.0 / decay_;
      for (int j = 0; j < columns; ++j) {
        child[work.columns[j]] = total[j] < tiny ? 0.0 : total[j] * unit;
        open[j] = out[j] < tiny ? 0.0 : out[j];
      }
    }
    int free = 0;
    for (Slot &slot : work.next) {
      if (slot.row >= 0) continue;
      while (work.used[free]) ++free;
      slot.row = free++;
      std::fill_n(child_.begin() + size_t(slot.row) * set.pieces, set.pieces, 0.0);
      std::fill_n(open_.begin() + size_t(slot.row) * width_, width_, 0.0);
    }
    before_.assign(work.columns.begin(), work.columns.end());
  }

  // Bring masses back to around 1; relative to a frame's best piece they can grow, too.
  void rescale() {
    for (;;) {
      double most = 0.0;
      for (const Slot &slot : slots) most = std::max(most, slot.total);
      if (!(most > 0) || (most >= kScaleBelow && most <= 1 / kScaleBelow)) return;
      const int power = std::min(1000, -std::ilogb(most));  // 2^1074, of the least number, is none
      const double by = std::ldexp(1.0, power);
      for (Slot &slot : slots) slot.blank *= by, slot.open *= by, slot.total *= by;
      for (double &mass : open_) mass *= by;
      decay_ *= by;
      offset -= power * kLn2;
    }
  }

};

struct Search {
  Settings set;
  std::vector<Utterance> utterances;
  std::unique_ptr<Work> work;  // of the one thread that searches all utterances
};

}  // namespace

extern "C" {

void *ngram_open(int64_t base, int64_t start, int orders, const int64_t *counts, const int64_t *const *keys,
                 const float *const *scores, const float *const *backoffs) {
  return icefall::guarded_pointer([&]() -> void * {
    return new Ngram(base, start, orders, counts, keys, scores, backoffs);
  });
}

void ngram_close(void *ngram) { delete static_cast<Ngram *>(ngram); }

// ngram (or null) must live as long as the search; its score counts `weight`, a word that begins `bonus`. So must
// `ahead` (or null), the n-gram of the look-ahead. For what begins with rule, see StopRule.
void *prefix_search_open(int64_t hash_factor, int64_t root_hash, int64_t no_parent_hash, double rounding, int64_t batch, int64_t beam, int64_t pieces, int64_t blank, int64_t columns, int recover,
                         int ranks, double score_beam, const void *ngram, double weight, double bonus,
                         int64_t rule_every, int rule_unit, const void *ahead, double ahead_weight,
                         double ahead_bonus, int64_t ahead_every) {
  return icefall::guarded_pointer([&]() -> void * {
    auto search = std::make_unique<Search>();
    const StopRule rule{rule_every, rule_unit, static_cast<const Ngram *>(ahead), float(ahead_weight), float(ahead_bonus),
                    ahead_every};
    const Numbers numbers{uint64_t(hash_factor), uint64_t(root_hash), uint64_t(no_parent_hash), rounding};
    search->set = {numbers, batch, int(beam), int(pieces), int(blank), int(columns), recover != 0, ranks != 0, score_beam,
                   static_cast<const Ngram *>(ngram), weight, bonus, rule, {}};
    for (int64_t v = 0; v < pieces; ++v) search->set.keys.push_back(mix(uint64_t(v) + 20250109));
    search->utterances.resize(batch);
    for (int64_t b = 0; b < batch; ++b) search->utterances[b].begin(search->set, b);
    return search.release();
  });
}

void prefix_search_close(void *handle) { delete static_cast<Search *>(handle); }

// Let the utterances first..last go on from where they stand: before frame `until` or their end, if `paced` no further
// than to where the rule stops them.
//
// log_probs: float [B, T, V] by strides; best: float [B, T]; searched: bool [B, T]; lens: int64 [B]; parents,
// pieces, boundaries (or null): int64 [rows, B, K]; starts (or null): bool [V]. Of the slots, [B, K]: fused: float, in
// and out; source: int64, the slots they come from; grew: bool; opened: int64, words begun; gain: float, raw score of
// the n-gram; estimate: float, the look-ahead's part of fused. Of the utterances, [B]: at: int64, frames searched; fired:
// bool, whether the rule has stopped them. Returns 0.
int prefix_search_run(void *handle, const float *log_probs, int64_t row_stride, int64_t frame_stride,
                       const float *best, const uint8_t *searched, const int64_t *lens, int64_t frames, int64_t until,
                       int paced, int64_t first, int64_t last, int64_t *parents, int64_t *pieces, int64_t *boundaries,
                       const uint8_t *starts, float *fused, int64_t *source, uint8_t *grew, int64_t *opened,
                       float *gain, float *estimate, int64_t *at, uint8_t *fired) {
  return icefall::guarded([&] {
    auto &search = *static_cast<Search *>(handle);
    const Settings &set = search.set;
    const Tree tree{parents, pieces, boundaries, starts};
    std::unique_ptr<Work> own;  // several threads may each search some of the utterances
    auto &work = last - first == set.batch ? search.work : own;
    if (!work) work = std::make_unique<Work>(set);
    for (int64_t b = first; b < last; ++b) {
      auto &utterance = search.utterances[b];
      const int64_t row = b * set.beam;
      const Frames of{log_probs + b * row_stride, frame_stride, best + b * frames, searched + b * frames,
                      row + set.batch * set.beam, set.batch * set.beam};
      utterance.run(set, *work, of, std::min(until, lens[b]), paced != 0, fused + row, tree);
      at[b] = utterance.at, fired[b] = utterance.fired;
      for (int64_t k = 0; k < set.beam; ++k) {
        const bool alive = k < int64_t(utterance.slots.size());
        source[row + k] = k, grew[row + k] = false, opened[row + k] = 0, gain[row + k] = estimate[row + k] = 0.0f;
        if (!alive) continue;
        const Slot &slot = utterance.slots[k];
        source[row + k] = slot.origin, grew[row + k] = slot.grew, opened[row + k] = slot.opened;
        gain[row + k] = float(slot.gain), estimate[row + k] = slot.ahead_estimate;
        if (set.ranks) fused[row + k] = slot.fused;
      }
    }
    return 0;
  });
}

// Write the live slots' nodes and last pieces, int64 [B, K]; log masses, float [B, K], -inf for dead slots; offsets,
// double [B].
void prefix_search_show(void *handle, int64_t first, int64_t last, int64_t *node, int64_t node_stride, int64_t *piece,
                        int64_t piece_stride, float *total, float *blank, int64_t mass_stride, double *offset) {
  const auto &search = *static_cast<Search *>(handle);
  for (int64_t b = first; b < last; ++b) {
    const auto &slots = search.utterances[b].slots;
    for (int64_t k = 0; k < search.set.beam; ++k) {
      const bool alive = k < int64_t(slots.size());
      if (alive) node[b * node_stride + k] = slots[k].node, piece[b * piece_stride + k] = slots[k].last;
      total[b * mass_stride + k] = alive ? float(std::log(slots[k].total)) : -INFINITY;
      blank[b * mass_stride + k] = alive ? float(std::log(slots[k].blank)) : -INFINITY;
    }
    offset[b] = search.utterances[b].offset;
  }
}

}  // extern "C"
