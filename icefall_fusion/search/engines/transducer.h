// One utterance of the search of a transducer on a CPU: what engines/transducer.py does with tensors.
//
// In a frame `Slot.open` is the mass of alignments that may emit more pieces in it, `Slot.blank` that of those that have
// ended it. The log-probs of a step come from outside: a row for each slot with open mass.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

#include "best_pieces.h"
#include "search_types.h"
#include "utterance.h"

namespace icefall::search {

// What a step asks of the joiner and the predictor. transducer_native.py has the same fields in the same order.
struct Rows {
  int64_t *encoder, *predictor;  // [B * K] of the encoder's outputs, and of the contexts in the order of their coming
  int64_t *contexts;             // [B * K] new ones
  int64_t *counts;               // rows, new contexts
  int64_t *marks;                // [nodes] of the arena: the frame in which most of a prefix's mass came from its parent
  uint8_t *lost;                 // [B] a log-prob was no number, or no hypothesis is left
};

// The last pieces as one number: each is a digit, one more than the piece, the newest last.
struct Contexts {
  int64_t base, power;  // pieces + 1; base^(size - 1)
  std::unordered_map<int64_t, int64_t> rows;

  int64_t next(int64_t context, int64_t piece) const { return context % power * base + piece + 1; }

  int64_t row(int64_t context, const Rows &out) {
    const auto found = rows.emplace(context, int64_t(rows.size()));
    if (found.second) out.contexts[out.counts[1]++] = context;
    return found.first->second;
  }
};

class TransducerUtterance : public Utterance {
 public:
  void begin_at(const Settings &set, int64_t number, int64_t symbols, int64_t context, int64_t row) {
    begin(set, number);
    symbols_ = symbols, contexts_ = {{context, row}};
    least_.resize(set.beam), log_probs_.resize(set.beam);
  }

  using Utterance::resume;

  // Write the rows that the next step needs, none at a stop or at frame `until`; return their number.
  int64_t ask(int64_t until, int64_t first_frame, const Rows &out) {
    if (slots.empty()) out.lost[number_] = 1, at = std::max(at, until);
    if (fired || at >= until) return 0;
    if (step_ == 0)
      for (Slot &slot : slots) slot.open = slot.total, slot.blank = 0.0;
    const int64_t before = out.counts[0];
    for (size_t k = 0; k < slots.size(); ++k) {
      if (!(slots[k].open > 0)) continue;
      out.encoder[out.counts[0]] = first_frame + at, out.predictor[out.counts[0]++] = contexts_[k].row;
    }
    return out.counts[0] - before;
  }

  // Do a step with the log-probs of these rows. Nodes that are born have ids from `first_id` on in the arena's first row.
  void advance(const Settings &set, Scratch &scratch, const float *log_probs, int64_t stride, bool stopping,
               int64_t first_id, int64_t row_size, const Batch &batch, Contexts &known, const Rows &out) {
    for (size_t k = 0; k < slots.size(); ++k) {
      log_probs_[k] = nullptr;
      if (!(slots[k].open > 0)) continue;
      log_probs_[k] = log_probs, log_probs += stride;
      if (std::isnan(log_probs_[k][set.blank])) out.lost[number_] = 1;
    }
    const bool ends_alone = symbols_ > 1 && step_ == symbols_;
    weigh(set, scratch);
    stay_or_end(set, scratch, ends_alone, out);
    scratch.columns.clear();
    if (!ends_alone) grow_or_not(set, scratch, batch);
    choose(set, scratch);
    move(set, scratch, first_id + (at * symbols_ + step_ + 1) * row_size, batch);
    follow(set, scratch, known, out);
    slots.swap(scratch.next);
    joined.swap(scratch.joined);
    for (const int v : scratch.columns) scratch.column_of[v] = -1;
    rescale();
    ++step_;
    const auto is_open = [](const Slot &slot) { return slot.open > 0; };
    if (symbols_ > 1 && !ends_alone && std::any_of(slots.begin(), slots.end(), is_open)) return;
    step_ = 0, ++at;
    if (stopping) stop_or_look(set);
  }

 private:
  struct Context {
    int64_t pieces, row;
  };

  int64_t symbols_ = 1, step_ = 0;
  std::vector<Context> contexts_, moved_;  // of each slot
  std::vector<const float *> log_probs_;   // of each slot, null without open mass
  std::vector<float> least_;               // of each slot: log-prob that a piece must reach

  void stay_or_end(const Settings &set, Scratch &scratch, bool ends_alone, const Rows &out) {
    const int count = int(slots.size());
    scratch.ways.clear();
    for (int k = 0; k < count; ++k) {
      const Slot &slot = slots[k];
      const int parent = scratch.parent[k] = slot_of(slot.parent_hash);
      const double ended = log_probs_[k] ? slot.open * std::exp(double(log_probs_[k][set.blank])) : 0.0;
      double incoming = 0.0;
      if (!ends_alone && parent >= 0 && log_probs_[parent])
        incoming = slots[parent].open * std::exp(double(log_probs_[parent][slot.last]));
      if (incoming > (ended + slot.blank) * (1 + set.rounding)) out.marks[slot.node] = at;
      scratch.stay_blank[k] = symbols_ == 1 ? 0.0 : slot.blank + ended;
      scratch.stay_open[k] = symbols_ == 1 ? ended + incoming : incoming;
      scratch.stay_total[k] = scratch.stay_blank[k] + scratch.stay_open[k];
      if (scratch.stay_total[k] > 0) scratch.ways.push_back({key(scratch.stay_total[k], scratch.factor[k]), k});
    }
  }

  // Extend all slots by all pieces with which they could be among the best.
  void grow_or_not(const Settings &set, Scratch &scratch, const Batch &batch) {
    double floor = floor_key(set, scratch);
    for (int k = 0; k < int(slots.size()); ++k)
      if (log_probs_[k]) choose_columns(set, scratch, k, floor);
    const int columns = int(scratch.columns.size());
    strike_out(scratch, columns);
    for (int k = 0; k < int(slots.size()); ++k) {
      double *total = scratch.total.data() + size_t(k) * columns;
      const float *row = log_probs_[k];
      if (!row) continue;
      for (int j = 0; j < columns; ++j) {
        const float log_prob = row[scratch.columns[j]];
        total[j] = log_prob >= least_[k] ? slots[k].open * std::exp(double(log_prob)) : 0.0;
      }
      std::copy(total, total + columns, scratch.open.data() + size_t(k) * columns);
      floor = offer(set, scratch, batch, k, columns, floor, -1, false);
    }
  }

  // Add the pieces of slot `k` that could survive to the columns. If scores of extensions do not matter, these are at
  // most K, beside those that lead to live prefixes.
  void choose_columns(const Settings &set, Scratch &scratch, int k, double floor) {
    double limit = 0.0;
    for (int64_t s = 0; s < set.scorer_count; ++s) limit += set.scorers[s].limit(number_, state(set, k, s));
    const double most = with_nats(key(slots[k].open, scratch.factor[k]), limit);
    const double needed = wide_ ? floor - most : std::log(std::max(floor, 0.0) / most);
    least_[k] = float(needed - set.rounding);
    auto &reached = scratch.reached;
    reached.clear();
    where_reached(log_probs_[k], int(set.pieces), least_[k], [&](int v) {
      if (v != set.blank) reached.emplace_back(-log_probs_[k][v], v);
    });
    const size_t wanted = set.beam + std::count(scratch.parent.begin(), scratch.parent.begin() + slots.size(), k);
    if (!set.weighs && reached.size() > wanted) {
      std::nth_element(reached.begin(), reached.begin() + wanted, reached.end());
      reached.resize(wanted);
    }
    for (const auto &entry : reached) {
      if (scratch.column_of[entry.second] >= 0) continue;
      scratch.column_of[entry.second] = int(scratch.columns.size());
      scratch.columns.push_back(entry.second);
    }
  }

  // Give the slots of the next step their contexts.
  void follow(const Settings &set, const Scratch &scratch, Contexts &known, const Rows &out) {
    const int64_t columns = int64_t(scratch.columns.size());
    moved_.clear();
    for (size_t k = 0; k < scratch.ways.size(); ++k) {
      const int64_t cell = scratch.ways[k].index - set.beam;
      if (cell < 0) {
        moved_.push_back(contexts_[scratch.ways[k].index]);
        continue;
      }
      const int64_t pieces = known.next(contexts_[cell / columns].pieces, scratch.columns[cell % columns]);
      moved_.push_back({pieces, known.row(pieces, out)});
      out.marks[scratch.next[k].node] = at;
    }
    contexts_.swap(moved_);
  }
};

}  // namespace icefall::search
