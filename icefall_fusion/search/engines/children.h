// Masses of the children of live prefixes: a pruned child that is born again gets its due mass (see children.py).

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "search_types.h"

namespace icefall::search {

constexpr double kLeastDecay = 1e-200;

class Children {
 public:
  void begin(const Settings &set) {
    width_ = int(set.columns) + 1;
    child_.assign(size_t(set.beam) * set.pieces, 0.0);
    open_.assign(size_t(set.beam) * width_, 0.0);
  }

  // Let all alignments end in blank.
  void take_blank() { std::fill(open_.begin(), open_.end(), 0.0); }

  // Take the beam's total of a child that is live itself; `row` is that of its parent.
  void set_live(const Settings &set, int row, const Slot &child) {
    child_[size_t(row) * set.pieces + child.last] = child.total / decay_;
  }

  // Write to scratch.was the column that each piece of the frame had in the last one.
  void match_columns(const Settings &set, Scratch &scratch) const {
    for (size_t j = 0; j < before_.size(); ++j) scratch.column_before[before_[j]] = int(j);
    for (size_t j = 0; j < scratch.columns.size(); ++j) scratch.was[j] = scratch.column_before[scratch.columns[j]];
    for (const int v : before_) scratch.column_before[v] = int(set.columns);
  }

  // Write the masses of the extensions of a slot by all columns; `same` is the column of its last piece, or -1.
  void extend(const Settings &set, const Scratch &scratch, const Slot &slot, int same, double blank, double *total,
              double *open) const {
    const int columns = int(scratch.columns.size());
    const int32_t *was = scratch.was.data(), *pieces = scratch.columns.data();
    const double *probability = scratch.probability.data(), shrink = decay_ * blank;
    const double *child = child_.data() + size_t(slot.row) * set.pieces;
    const double *was_open = open_.data() + size_t(slot.row) * width_;
    for (int j = 0; j < columns; ++j) open[j] = (was_open[was[j]] + slot.total) * probability[j];
    if (same >= 0) open[same] = (was_open[was[same]] + slot.blank) * probability[same];
    for (int j = 0; j < columns; ++j) total[j] = child[pieces[j]] * shrink + open[j];
  }

  // Bring the children of those that stay to this frame; newborn prefixes have none.
  void keep(const Settings &set, Scratch &scratch, double blank) {
    const int columns = int(scratch.columns.size());
    double most = 0.0;
    for (const Slot &slot : scratch.next) most = std::max(most, slot.total);
    const double now = decay_ * blank, tiny = set.tiny_mass * most;
    const bool renew = now < kLeastDecay;
    decay_ = renew ? 1.0 : now;
    std::fill(scratch.used.begin(), scratch.used.end(), 0);
    for (size_t k = 0; k < scratch.next.size(); ++k) {
      if (scratch.kept[k] < 0) continue;
      const int row = scratch.next[k].row;
      scratch.used[row] = 1;
      double *child = child_.data() + size_t(row) * set.pieces, *open = open_.data() + size_t(row) * width_;
      if (renew)
        for (int v = 0; v < set.pieces; ++v) child[v] = child[v] * now < tiny ? 0.0 : child[v] * now;
      const double *total = scratch.total.data() + size_t(scratch.kept[k]) * columns;
      const double *out = scratch.open.data() + size_t(scratch.kept[k]) * columns, unit = 1.0 / decay_;
      for (int j = 0; j < columns; ++j) {
        child[scratch.columns[j]] = total[j] < tiny ? 0.0 : total[j] * unit;
        open[j] = out[j] < tiny ? 0.0 : out[j];
      }
    }
    int free = 0;
    for (Slot &slot : scratch.next) {
      if (slot.row >= 0) continue;
      while (scratch.used[free]) ++free;
      slot.row = free++;
      std::fill_n(child_.begin() + size_t(slot.row) * set.pieces, set.pieces, 0.0);
      std::fill_n(open_.begin() + size_t(slot.row) * width_, width_, 0.0);
    }
    before_.assign(scratch.columns.begin(), scratch.columns.end());
  }

  void rescale(double by) {
    for (double &mass : open_) mass *= by;
    decay_ *= by;
  }

 private:
  // By row of a slot: mass = child * decay; `open_` is the mass that does not end in blank, of the pieces `before_`
  // (and a column of zeros).
  double decay_ = 1.0;
  int width_ = 0;
  std::vector<double> child_, open_;
  std::vector<int32_t> before_;
};

}  // namespace icefall::search
