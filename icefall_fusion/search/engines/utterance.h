// One utterance of the prefix search on a CPU: what frame_step.py, candidates.py and children.py do with tensors.
//
// Masses are linear doubles relative to a power of two (in `offset`), so that no logarithm stands in the loop.
// Prefixes below 2^-900 of the best mass are dropped.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "best_pieces.h"
#include "children.h"
#include "search_types.h"

namespace icefall::search {

constexpr double kLost = 0x1p-900, kScaleBelow = 0x1p-100;
constexpr double kImpossible = 230.0;  // nats: n-grams write 0 as 10^-99
constexpr double kWide = 300.0;  // nats of language models apart, from which on logarithms rank, not products
constexpr double kLn2 = 0.693147180559945309417;

class Utterance {
 public:
  double offset = 0.0;
  std::vector<Slot> slots;
  std::vector<Joined> joined;  // of each slot and scorer

  int64_t at = 0;  // the next frame
  bool fired = false;  // it stopped at `at`, so that language models could score

  void begin(const Settings &set, int64_t number) {
    Slot root{};
    root.blank = root.total = 1.0, root.hash = set.root_hash, root.parent_hash = set.no_parent_hash;
    root.node = number * set.beam, root.last = set.blank;
    number_ = number;
    joined.clear();
    for (int64_t s = 0; s < set.scorer_count; ++s) joined.push_back({0.0, set.scorers[s].start(number)});
    if (set.ahead) root.ahead_context = set.ahead->start();
    slots = {root};
    slots.reserve(set.beam);
    longest_ = int(set.first_length);
    if (set.recover) children_.begin(set);
  }

  // Count frames from `frames` on, give the hypotheses other arena nodes [K], and drop those that get none (-1).
  void forget(int64_t frames, const int64_t *nodes) {
    at -= frames;
    const size_t scorers = slots.empty() ? 0 : joined.size() / slots.size();
    size_t kept = 0;
    for (size_t k = 0; k < slots.size(); ++k) {
      if (nodes[k] < 0) continue;
      slots[kept] = slots[k];
      std::copy_n(joined.begin() + k * scorers, scorers, joined.begin() + kept * scorers);
      slots[kept++].node = nodes[k];
    }
    slots.resize(kept), joined.resize(kept * scorers);
  }

  // Search the next frames, up to frame `until` or the next stop of the rule. `fused` holds the scores of language
  // models.
  void run(const Settings &set, Scratch &scratch, const Frames &frames, int64_t until, bool stopping,
           const float *fused, const Batch &batch) {
    resume(set, fused, batch);
    while (at < until && !fired) {
      const int64_t t = at++;
      if (frames.searched[t])
        step(set, scratch, frames.rows + t * frames.stride, frames.best[t], frames.ids + t * frames.ids_a_frame, batch);
      else
        take_blank();
      if (stopping) stop_or_look(set);
    }
  }

 protected:
  Children children_;  // where mass is recovered
  bool wide_ = false, rests_ = false;
  int64_t number_ = 0;
  int longest_ = 0;  // length of the shortest hypothesis at the last stop

  void take_blank() {  // a piece may repeat after frames that were left out
    if (rests_) return;
    rests_ = true;
    for (auto &slot : slots) slot.blank = slot.total, slot.open = 0.0;
    children_.take_blank();
  }

  void step(const Settings &set, Scratch &scratch, const float *row, float best, int64_t first_id, const Batch &batch) {
    rests_ = false;
    const double blank = std::exp(double(row[set.blank]) - best);
    weigh(set, scratch);
    stay(set, scratch, row, best, blank);
    best_pieces(row, least_score(set, scratch, best), set, scratch);
    if (set.scorer_count)
      std::sort(scratch.columns.begin(), scratch.columns.end(),
                [&](int one, int other) { return row[one] > row[other]; });
    const int columns = int(scratch.columns.size());
    for (int j = 0; j < columns; ++j) {
      scratch.probability[j] = std::exp(double(row[scratch.columns[j]]) - best);
      scratch.column_of[scratch.columns[j]] = j;
    }
    extend(set, scratch, batch, blank);
    choose(set, scratch);
    move(set, scratch, first_id, batch);
    if (set.recover) children_.keep(set, scratch, blank);
    slots.swap(scratch.next);
    joined.swap(scratch.joined);
    for (const int v : scratch.columns) scratch.column_of[v] = -1;
    rescale();
  }

  // Go on from a stop; `fused` holds the scores of language models.
  void resume(const Settings &set, const float *fused, const Batch &batch) {
    const bool landed = set.late_ahead && batch.landed[number_], due = !set.late_ahead || at % set.ahead_every == 0;
    for (size_t k = 0; k < slots.size(); ++k) {
      Slot &slot = slots[k];
      slot.origin = int(k), slot.opened = 0, slot.grew = false;
      if (set.ranks) slot.fused = fused[k];
      if (landed) slot.ahead_scored = batch.scored[number_ * set.beam + k];
      if (fired && !set.late_ahead) slot.ahead_scored = slot.ahead_closed;
    }
    for (Joined &one : joined) one.gain = 0.0;
    if (landed || (fired && due)) look_ahead(set);
    fired = false;
  }

  void stop_or_look(const Settings &set) {
    fired = stops(set);
    if (!fired && set.ahead && at % set.ahead_every == 0) look_ahead(set);
  }

  // Whether language models score after the frame before `at`.
  bool stops(const Settings &set) {
    if (set.every == 0 || at % set.every != 0) return false;
    if (set.unit == 0) return true;
    if (slots.empty()) return false;
    int shortest = std::numeric_limits<int>::max();
    for (const Slot &slot : slots) shortest = std::min(shortest, slot.length);
    if (shortest <= longest_) return false;
    longest_ = shortest;
    return true;
  }

  // Let `fused` hold the estimates of all that is not scored.
  void look_ahead(const Settings &set) {
    if (!set.ahead) return;
    for (Slot &slot : slots) {
      const float ahead = slot.ahead - slot.ahead_scored;
      slot.fused += ahead - slot.ahead_estimate;
      slot.ahead_estimate = ahead;
    }
  }

  double with_nats(double key, double nats) const { return wide_ ? key + nats : key * std::exp(nats); }

  double key(double mass, double factor) const { return wide_ ? std::log(mass) + factor : mass * factor; }

  // What language models add to the ranking: a factor, or nats where those are far apart.
  void weigh(const Settings &set, Scratch &scratch) {
    double reach = 0.0;
    for (int64_t s = 0; s < set.scorer_count; ++s) {
      const Scorer &scorer = set.scorers[s];
      reach += std::abs(scorer.weight) * (scorer.ngram ? kImpossible : scorer.reach) + std::abs(scorer.bonus);
    }
    wide_ = !(reach < kWide);
    if (!set.ranks || slots.empty()) {
      std::fill(scratch.factor.begin(), scratch.factor.end(), wide_ ? 0.0 : 1.0);
      return;
    }
    double least = slots[0].fused, most = least;
    for (const Slot &slot : slots)
      least = std::min(least, double(slot.fused)), most = std::max(most, double(slot.fused));
    wide_ = !(most - least + reach < kWide);
    for (size_t k = 0; k < slots.size(); ++k)
      scratch.factor[k] = wide_ ? double(slots[k].fused) : std::exp(double(slots[k].fused) - most);
  }

  // The slot of the prefix with this hash, -1 if none has it.
  int slot_of(decltype(Slot::hash) hash) const {
    int found = -1;
    for (int j = 0; j < int(slots.size()); ++j) found = slots[j].hash == hash ? j : found;
    return found;
  }

  void stay(const Settings &set, Scratch &scratch, const float *row, float best, double blank) {
    const int count = int(slots.size());
    scratch.ways.clear();
    for (int k = 0; k < count; ++k) {
      const Slot &slot = slots[k];
      const int parent = scratch.parent[k] = slot_of(slot.parent_hash);
      double open = slot.open;
      if (parent >= 0) {
        open += slot.repeats ? slots[parent].blank : slots[parent].total;
        if (set.recover) children_.set_live(set, slots[parent].row, slot);
      }
      scratch.stay_blank[k] = slot.total * blank;
      scratch.stay_open[k] = open > 0 ? open * std::exp(double(row[slot.last]) - best) : 0.0;
      scratch.stay_total[k] = scratch.stay_blank[k] + scratch.stay_open[k];
      if (scratch.stay_total[k] > 0) scratch.ways.push_back({key(scratch.stay_total[k], scratch.factor[k]), k});
    }
  }

  // The floor of the keys: a way must beat the worst stay where there is one in every slot.
  double floor_key(const Settings &set, const Scratch &scratch) const {
    double floor = std::numeric_limits<double>::infinity();
    for (const Way &way : scratch.ways) floor = std::min(floor, way.key);
    return int(scratch.ways.size()) == set.beam ? floor : -std::numeric_limits<double>::infinity();
  }

  // The state of a scorer in a slot.
  int state(const Settings &set, size_t k, int64_t s) const { return joined[k * set.scorer_count + s].state; }

  // The least log-prob of a piece that could survive if the scorers gave it the most that they can; -inf without any or
  // with mass to recover, where the number of pieces is bounded instead.
  float least_score(const Settings &set, const Scratch &scratch, float best) const {
    if (!set.weighs || set.recover || slots.empty()) return -INFINITY;
    double most = -std::numeric_limits<double>::infinity();
    for (size_t k = 0; k < slots.size(); ++k) {
      double limit = 0.0;
      for (int64_t s = 0; s < set.scorer_count; ++s) limit += set.scorers[s].limit(number_, state(set, k, s));
      most = std::max(most, with_nats(key(slots[k].total, scratch.factor[k]), limit));
    }
    const double floor = floor_key(set, scratch);
    const double needed = wide_ ? floor - most : std::log(std::max(floor, 0.0) / most);
    return float(needed + best - set.rounding);
  }

  bool opens(const Batch &batch, const Slot &slot, int piece, const Settings &set) const {
    return batch.starts && (batch.starts[piece] || slot.last == set.blank);
  }

  bool marked(const Batch &batch, int piece) const { return batch.starts && batch.starts[piece]; }

  // All slots by all columns. What is a live prefix itself is struck out.
  void extend(const Settings &set, Scratch &scratch, const Batch &batch, double blank) {
    const int count = int(slots.size()), columns = int(scratch.columns.size());
    const int32_t *pieces = scratch.columns.data();
    const double *probability = scratch.probability.data();
    strike_out(scratch, columns);
    double floor = floor_key(set, scratch);
    if (set.recover) children_.match_columns(set, scratch);
    for (int k = 0; k < count; ++k) {
      const Slot &slot = slots[k];
      double *total = scratch.total.data() + size_t(k) * columns, *open = scratch.open.data() + size_t(k) * columns;
      const int same = slot.last == set.blank ? -1 : scratch.column_of[slot.last];
      if (set.recover) {
        children_.extend(set, scratch, slot, same, blank, total, open);
      } else {
        for (int j = 0; j < columns; ++j) total[j] = open[j] = slot.total * probability[j];
        if (same >= 0) total[same] = open[same] = slot.blank * probability[same];
      }
      floor = offer(set, scratch, batch, k, columns, floor, same, !set.recover);
    }
    if (set.recover) remember_live(scratch, columns);
  }

  // Strike out the extensions that are live prefixes themselves.
  void strike_out(Scratch &scratch, int columns) const {
    std::fill_n(scratch.struck.begin(), slots.size() * columns, 0);
    for (size_t k = 0; k < slots.size(); ++k) {
      const int cell = scratch.parent[k] < 0 ? -1 : scratch.column_of[slots[k].last];
      if (cell >= 0) scratch.struck[size_t(scratch.parent[k]) * columns + cell] = 1;
    }
  }

  // Add the extensions of slot `k` that beat a floor to the ways; return the floor for the next. `falling`: the columns
  // become less probable, but `same`.
  double offer(const Settings &set, Scratch &scratch, const Batch &batch, int k, int columns, double floor, int same,
               bool falling) const {
    const Slot &slot = slots[k];
    const int32_t *pieces = scratch.columns.data();
    const double *total = scratch.total.data() + size_t(k) * columns;
    const uint8_t *struck = scratch.struck.data() + size_t(k) * columns;
    const double factor = scratch.factor[k];
    const int64_t first = set.beam + int64_t(k) * columns;
    if (set.weighs) {
      double ceiling = 0.0;
      for (int64_t s = 0; s < set.scorer_count; ++s) ceiling += set.scorers[s].most(number_, state(set, k, s));
      const double lift = std::exp(ceiling);
      double least = wide_ ? floor : std::max(floor, 0.0);
      for (int j = 0; j < columns; ++j) {
        if (!(total[j] > 0) || struck[j]) continue;
        const double bare = key(total[j], factor);
        if (!((wide_ ? bare + ceiling : bare * lift) > least)) {
          if (!falling || j == same) continue;
          break;
        }
        double gain = 0.0;
        for (int64_t s = 0; s < set.scorer_count; ++s) {
          const Scorer &scorer = set.scorers[s];
          gain += scorer.weight * scorer.score(number_, state(set, k, s), pieces[j], marked(batch, pieces[j])) +
                  (opens(batch, slot, pieces[j], set) ? scorer.bonus : 0.0);
        }
        const double full = gain == 0.0 ? bare : with_nats(bare, gain);
        if (!(full > least)) continue;
        scratch.ways.push_back({full, first + j});
        if (int(scratch.ways.size()) < 3 * set.beam) continue;
        best_ways(set, scratch);  // a way must beat all of these
        least = scratch.ways.back().key;
      }
      return least;
    }
    if (wide_) {
      for (int j = 0; j < columns; ++j)
        if (total[j] > 0 && !struck[j] && std::log(total[j]) + factor > floor)
          scratch.ways.push_back({std::log(total[j]) + factor, first + j});
      return floor;
    }
    const double least = std::max(floor, 0.0);
    for (int j = 0; j < columns; ++j)
      if (total[j] * factor > least && !struck[j]) scratch.ways.push_back({total[j] * factor, first + j});
    return floor;
  }

  // A child that is live itself is remembered as what it is in the beam, for when it dies.
  void remember_live(Scratch &scratch, int columns) {
    for (size_t k = 0; k < slots.size(); ++k) {
      const int cell = scratch.parent[k] < 0 ? -1 : scratch.column_of[slots[k].last];
      if (cell < 0) continue;
      scratch.total[size_t(scratch.parent[k]) * columns + cell] = scratch.stay_total[k];
      scratch.open[size_t(scratch.parent[k]) * columns + cell] = scratch.stay_open[k];
    }
  }

  double mass(const Settings &set, const Scratch &scratch, const Way &way) const {
    return way.index < set.beam ? scratch.stay_total[way.index] : scratch.total[way.index - set.beam];
  }

  // Leave the best K ways, the worst of them last.
  void best_ways(const Settings &set, Scratch &scratch) const {
    std::nth_element(scratch.ways.begin(), scratch.ways.begin() + set.beam - 1, scratch.ways.end());
    scratch.ways.resize(set.beam);
  }

  // Leave the best K ways that are good enough, best first.
  void choose(const Settings &set, Scratch &scratch) {
    auto &ways = scratch.ways;
    if (int(ways.size()) > set.beam) best_ways(set, scratch);
    std::sort(ways.begin(), ways.end());
    if (ways.empty()) return;
    const double best = ways[0].key, beam = set.score_beam;
    const double least = beam < 0 ? -INFINITY : wide_ ? best - beam : best * std::exp(-beam);
    double most = 0.0;
    for (const Way &way : ways) most = std::max(most, mass(set, scratch, way));
    const auto lost = [&](const Way &way) { return way.key < least || mass(set, scratch, way) < kLost * most; };
    ways.erase(std::remove_if(ways.begin(), ways.end(), lost), ways.end());
  }

  // Let the slots of the next frame go these ways.
  void move(const Settings &set, Scratch &scratch, int64_t first_id, const Batch &batch) {
    const int columns = int(scratch.columns.size());
    scratch.next.clear(), scratch.joined.clear();
    for (const Way &way : scratch.ways) {
      const int k = int(scratch.next.size());
      const bool grew = way.index >= set.beam;
      const int64_t cell = way.index - set.beam, from = grew ? cell / columns : way.index;
      const Slot &old = slots[from];
      scratch.kept[k] = grew ? -1 : int(from);
      scratch.next.push_back(old);
      Slot &slot = scratch.next.back();
      for (int64_t s = 0; s < set.scorer_count; ++s) scratch.joined.push_back(joined[from * set.scorer_count + s]);
      if (!grew) {
        slot.blank = scratch.stay_blank[from], slot.open = scratch.stay_open[from];
        slot.total = scratch.stay_total[from];
        continue;
      }
      const int piece = scratch.columns[cell % columns];
      slot.total = scratch.total[cell], slot.open = scratch.open[cell];
      slot.blank = std::max(0.0, slot.total - slot.open);
      slot.hash = (old.hash * set.hash_factor) ^ set.keys[piece], slot.parent_hash = old.hash;
      slot.node = first_id + k, slot.last = piece, slot.row = -1, slot.repeats = piece == old.last;
      batch.parents[slot.node] = old.node, batch.pieces[slot.node] = piece;
      if (batch.boundaries) batch.boundaries[slot.node] = batch.starts[piece] ? old.node : batch.boundaries[old.node];
      grow(set, batch, old, piece, slot, scratch.joined.data() + k * set.scorer_count);
    }
  }

  // Update the states and scores of language models of a slot that grew by a piece.
  void grow(const Settings &set, const Batch &batch, const Slot &old, int piece, Slot &slot,
            Joined *scored) const {
    slot.grew = true;
    const bool opened = opens(batch, old, piece, set);
    slot.length += set.unit == 1 ? opened : 1;
    if (set.scorer_count) slot.opened += opened;
    for (int64_t s = 0; s < set.scorer_count; ++s) {
      const Scorer &scorer = set.scorers[s];
      const float gain = scorer.score(number_, scored[s].state, piece, marked(batch, piece));
      scored[s].state = scorer.next(number_, scored[s].state, piece), scored[s].gain += gain;
      if (scorer.weight != 0) slot.fused += float(scorer.weight) * gain;
      if (scorer.bonus != 0) slot.fused += float(scorer.bonus) * opened;
    }
    if (!set.ahead) return;
    slot.ahead +=
        float(set.ahead_weight) * set.ahead->score(old.ahead_context, piece) + float(set.ahead_bonus) * opened;
    slot.ahead_context = set.ahead->next(old.ahead_context, piece);
    if (set.late_ahead) batch.totals[slot.node] = slot.ahead;
    if (batch.starts[piece]) slot.ahead_closed = old.ahead;
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
      children_.rescale(by);
      offset -= power * kLn2;
    }
  }
};

// Write the state of utterance `b` to the arrays, for dead slots too.
inline void show(const Settings &set, const Utterance &utterance, int64_t b, const Batch &batch) {
  batch.at[b] = utterance.at, batch.fired[b] = utterance.fired, batch.offset[b] = utterance.offset;
  for (int64_t k = 0; k < set.beam; ++k) {
    const int64_t i = b * set.beam + k;
    batch.moved_from[i] = k, batch.grew[i] = false, batch.opened[i] = 0, batch.estimate[i] = 0.0f;
    for (int64_t s = 0; s < set.scorer_count; ++s) {
      const int64_t of = s * set.batch * set.beam + i;
      const bool live = k < int64_t(utterance.slots.size());
      const Joined one = live ? utterance.joined[k * set.scorer_count + s] : Joined{0.0, 0};
      batch.gain[of] = float(one.gain), batch.states[of] = set.scorers[s].shown(b, one.state);
    }
    float &total = batch.log_total[b * batch.mass_stride + k], &blank = batch.log_blank[b * batch.mass_stride + k];
    total = blank = -INFINITY;
    if (k >= int64_t(utterance.slots.size())) continue;
    const Slot &slot = utterance.slots[k];
    batch.moved_from[i] = slot.origin, batch.grew[i] = slot.grew, batch.opened[i] = slot.opened;
    batch.estimate[i] = slot.ahead_estimate;
    if (set.ranks) batch.fused[i] = slot.fused;
    batch.node[b * batch.node_stride + k] = slot.node, batch.last[b * batch.last_stride + k] = slot.last;
    total = float(std::log(slot.total)), blank = float(std::log(slot.blank));
  }
}

}  // namespace icefall::search
