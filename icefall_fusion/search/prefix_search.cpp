// Exact CTC prefix beam search on a CPU, one utterance after the other: what frame_step.py, candidates.py and
// children.py do with tensors, in one loop whose state stays in the cache. Built and called by native.py.
//
// Masses are linear doubles relative to a power of two (in `offset`), so that no logarithm stands in the loop.
// Prefixes below 2^-900 of the best mass are dropped.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr uint64_t kFactor = 0x2545F4914F6CDD1DULL;  // odd: multiplying by it loses nothing modulo 2^64
constexpr uint64_t kRootHash = 2, kNoParent = 1;     // nobody has the second one
constexpr double kTiny = 1e-30;                      // of the best mass: children with less are forgotten
constexpr double kLost = 0x1p-900, kScaleBelow = 0x1p-100, kLeastDecay = 1e-200;
constexpr double kWide = 300.0;  // nats of language models apart, from which on logarithms rank, not products
constexpr float kFarBelow = 200.0f;  // nats below a frame's best; what lies further down is found without a floor
constexpr double kLn2 = 0.693147180559945309417;

uint64_t mix(uint64_t x) {  // splitmix64: a random key for every piece
  x += 0x9E3779B97F4A7C15ULL;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31);
}

struct Settings {
  int64_t batch;
  int beam, pieces, blank, columns;
  bool recover;
  double score_beam;  // below 0: none
  std::vector<uint64_t> keys;
};

struct Slot {  // a live prefix
  double blank, open, total;  // mass of alignments that end in blank, of others, of all
  uint64_t hash, parent_hash;
  int64_t node;
  int32_t last;     // piece
  int32_t row;      // of children
  bool repeats;     // the last piece is that before it
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

struct Moves {  // of one utterance's slots in a frame, for those who follow (may be null)
  int64_t *source;
  uint8_t *grew;
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

// Find the best pieces of a frame but blank, in no order. The best n lie in the n groups with the largest maxima, so
// a floor that n maxima reach is one that n pieces reach, and few more do.
void best_pieces(const float *row, const Settings &set, Work &work) {
  const int pieces = set.pieces, wanted = set.columns;
  auto &columns = work.columns;
  columns.clear();
  if (wanted >= pieces - 1) {
    for (int v = 0; v < pieces; ++v)
      if (v != set.blank) columns.push_back(v);
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
  where_reached(row, pieces, floor_of(top, groups, wanted + 1), [&](int v) {  // one more: blank may be among them
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

  void begin(const Settings &set, int64_t number) {
    slots = {Slot{1.0, 0.0, 1.0, kRootHash, kNoParent, number * set.beam, set.blank, 0, false}};
    slots.reserve(set.beam);
    if (!set.recover) return;
    width_ = set.columns + 1;
    child_.assign(size_t(set.beam) * set.pieces, 0.0);
    open_.assign(size_t(set.beam) * width_, 0.0);
  }

  void hear_blank() {  // a piece may repeat after frames that were left out
    if (rests_) return;
    rests_ = true;
    for (auto &slot : slots) slot.blank = slot.total, slot.open = 0.0;
    std::fill(open_.begin(), open_.end(), 0.0);
  }

  void step(const Settings &set, Work &work, const float *row, float best, const float *fused, int64_t first_id,
            const Tree &tree, const Moves &moves) {
    rests_ = false;
    best_pieces(row, set, work);
    const int columns = int(work.columns.size());
    const double blank = std::exp(double(row[set.blank]) - best);
    for (int j = 0; j < columns; ++j) {
      work.probability[j] = std::exp(double(row[work.columns[j]]) - best);
      work.column_of[work.columns[j]] = j;
    }
    weigh(fused, work);
    stay(set, work, row, best, blank);
    extend(set, work, blank);
    choose(set, work);
    move(set, work, first_id, tree, moves);
    if (set.recover) keep_children(set, work, blank);
    slots.swap(work.next);
    for (const int v : work.columns) work.column_of[v] = -1;
    rescale();
  }

 private:
  // Children of live prefixes by row: mass = child * decay; `open_` is what does not end in blank, of the pieces
  // `before_` (and a column of zeros).
  double decay_ = 1.0;
  int width_ = 0;
  std::vector<double> child_, open_;
  std::vector<int32_t> before_;
  bool wide_ = false, rests_ = false;

  double key(double mass, double factor) const { return wide_ ? std::log(mass) + factor : mass * factor; }

  // What language models add to the ranking: a factor, or nats where those are far apart.
  void weigh(const float *fused, Work &work) {
    wide_ = false;
    if (!fused) {
      std::fill(work.factor.begin(), work.factor.end(), 1.0);
      return;
    }
    if (slots.empty()) return;
    const auto ends = std::minmax_element(fused, fused + slots.size());
    wide_ = !(double(*ends.second) - *ends.first < kWide);
    for (size_t k = 0; k < slots.size(); ++k)
      work.factor[k] = wide_ ? double(fused[k]) : std::exp(double(fused[k]) - *ends.second);
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

  // All slots by all columns. What is a live prefix itself is struck out.
  void extend(const Settings &set, Work &work, double blank) {
    const int count = int(slots.size()), columns = int(work.columns.size());
    const int32_t *pieces = work.columns.data();
    const double *probability = work.probability.data();
    std::fill(work.struck.begin(), work.struck.end(), 0);
    for (int k = 0; k < count; ++k) {
      const int place = work.parent[k] < 0 ? -1 : work.column_of[slots[k].last];
      if (place >= 0) work.struck[size_t(work.parent[k]) * columns + place] = 1;
    }
    double floor = -std::numeric_limits<double>::infinity();
    if (int(work.ways.size()) == set.beam) {  // a way must beat the worst stay
      floor = work.ways[0].key;
      for (const Way &way : work.ways) floor = std::min(floor, way.key);
    }
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
      if (wide_) {
        for (int j = 0; j < columns; ++j)
          if (total[j] > 0 && !struck[j] && std::log(total[j]) + factor > floor)
            work.ways.push_back({std::log(total[j]) + factor, first + j});
      } else {
        const double least = std::max(floor, 0.0);
        for (int j = 0; j < columns; ++j)
          if (total[j] * factor > least && !struck[j]) work.ways.push_back({total[j] * factor, first + j});
      }
    }
  }

  double mass(const Settings &set, const Work &work, const Way &way) const {
    return way.index < set.beam ? work.stay_total[way.index] : work.total[way.index - set.beam];
  }

  // Leave the best K ways, best first.
  void choose(const Settings &set, Work &work) {
    auto &ways = work.ways;
    if (int(ways.size()) > set.beam) {
      std::nth_element(ways.begin(), ways.begin() + set.beam, ways.end());
      ways.resize(set.beam);
    }
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
  void move(const Settings &set, Work &work, int64_t first_id, const Tree &tree, const Moves &moves) {
    const int columns = int(work.columns.size());
    work.next.clear();
    for (const Way &way : work.ways) {
      const int k = int(work.next.size());
      const bool grew = way.index >= set.beam;
      const int place = way.index - set.beam, from = grew ? place / columns : way.index;
      const Slot &old = slots[from];
      work.kept[k] = grew ? -1 : from;
      if (moves.source) moves.source[k] = from, moves.grew[k] = grew;
      if (!grew) {
        work.next.push_back(old);
        Slot &slot = work.next.back();
        slot.blank = work.stay_blank[from], slot.open = work.stay_open[from], slot.total = work.stay_total[from];
        continue;
      }
      const int piece = work.columns[place % columns];
      const int64_t id = first_id + k;
      const double total = work.total[place], open = work.open[place];
      work.next.push_back({std::max(0.0, total - open), open, total, (old.hash * kFactor) ^ set.keys[piece], old.hash,
                           id, piece, -1, piece == old.last});
      tree.parents[id] = old.node, tree.pieces[id] = piece;
      if (tree.boundaries) tree.boundaries[id] = tree.starts[piece] ? old.node : tree.boundaries[old.node];
    }
    for (int k = int(work.next.size()); moves.source && k < set.beam; ++k) moves.source[k] = k, moves.grew[k] = 0;
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
    double most = 0.0;
    for (const Slot &slot : slots) most = std::max(most, slot.total);
    if (!(most > 0) || (most >= kScaleBelow && most <= 1 / kScaleBelow)) return;
    const int power = -std::ilogb(most);
    const double by = std::ldexp(1.0, power);
    for (Slot &slot : slots) slot.blank *= by, slot.open *= by, slot.total *= by;
    for (double &mass : open_) mass *= by;
    decay_ *= by;
    offset -= power * kLn2;
  }

};

struct Search {
  Settings set;
  std::vector<Utterance> utterances;
};

}  // namespace

extern "C" {

void *prefix_search_open(int64_t batch, int64_t beam, int64_t pieces, int64_t blank, int64_t columns, int recover,
                         double score_beam) {
  auto *search = new Search();
  search->set = {batch, int(beam), int(pieces), int(blank), int(columns), recover != 0, score_beam, {}};
  for (int64_t v = 0; v < pieces; ++v) search->set.keys.push_back(mix(uint64_t(v) + 20250109));
  search->utterances.resize(batch);
  for (int64_t b = 0; b < batch; ++b) search->utterances[b].begin(search->set, b);
  return search;
}

void prefix_search_close(void *handle) { delete static_cast<Search *>(handle); }

// Search frames begin..end of the utterances first..last; return whether any slot moved or grew in the last of them.
//
// log_probs: float [B, T, V] by strides; best: float [B, T]; searched: bool [B, T]; fused (or null): float
// [B, K]; parents, pieces, boundaries (or null): int64 [rows, B, K]; starts: bool [V]; source (or null): int64 [B, K];
// grew: bool [B, K].
int prefix_search_run(void *handle, const float *log_probs, int64_t row_stride, int64_t frame_stride,
                      const float *best, const uint8_t *searched, int64_t frames, int64_t begin, int64_t end,
                      int64_t first, int64_t last, const float *fused, int64_t *parents, int64_t *pieces,
                      int64_t *boundaries, const uint8_t *starts, int64_t *source, uint8_t *grew) {
  auto &search = *static_cast<Search *>(handle);
  const Settings &set = search.set;
  const Tree tree{parents, pieces, boundaries, starts};
  Work work(set);
  bool moved = false;
  for (int64_t b = first; b < last; ++b) {
    auto &utterance = search.utterances[b];
    const Moves moves{source ? source + b * set.beam : nullptr, grew ? grew + b * set.beam : nullptr};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t place = b * frames + t;
      if (searched[place]) {
        utterance.step(set, work, log_probs + b * row_stride + t * frame_stride, best[place],
                       fused ? fused + b * set.beam : nullptr, ((t + 1) * set.batch + b) * set.beam, tree, moves);
        continue;
      }
      utterance.hear_blank();
      for (int64_t k = 0; moves.source && k < set.beam; ++k) moves.source[k] = k, moves.grew[k] = 0;
    }
    for (int64_t k = 0; source && k < set.beam; ++k) moved |= moves.grew[k] || moves.source[k] != k;
  }
  return moved;
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
