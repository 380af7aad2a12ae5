// Settings, arrays and state of the prefix search on a CPU.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "ngram.h"
#include "phrases.h"

namespace icefall::search {

// Settings of a search. native.py has the same fields in the same order.
struct Settings {
  // numbers that all engines share, see beam.py and base.py
  uint64_t hash_factor, root_hash, no_parent_hash;
  double rounding, tiny_mass;
  const int64_t *keys;  // [V], of the pieces for hashes; they outlive the search
  int64_t batch, beam, pieces, blank;
  int64_t columns;     // pieces that may extend a prefix in a frame
  int64_t recover;     // whether mass is recovered
  int64_t ranks;       // whether language models take part in the ranking
  double score_beam;   // below 0: none
  const Scorer *scorers;  // join at every extension; they outlive the search
  int64_t scorer_count, weighs;  // whether any of them has a weight or a bonus
  // The stop rule (see fusion.py): frames between two looks, 0: never; a look stops always (0), or if the shortest
  // hypothesis has begun more words (1) or pieces (2); the length that counts as scored at the start.
  int64_t every, unit, first_length;
  const Ngram *ahead;  // ranks what is not scored yet; null: nothing does; it outlives the search
  double ahead_weight, ahead_bonus;
  int64_t ahead_every;
  int64_t late_ahead;  // whether what a stop scores is told later, by `landed`
};

// The arrays of a batch. native.py has the same fields in the same order. Those that are not const are written.
struct Batch {
  const float *log_probs;  // [B, T, V] by strides
  int64_t row_stride, frame_stride;
  const float *best;        // [B, T]
  const uint8_t *searched;  // [B, T]
  const int64_t *lens;      // [B]
  int64_t frames;
  int64_t *parents, *pieces, *boundaries;  // [rows, B, K] of the arena; boundaries may be null
  const uint8_t *starts;                   // [V], or null
  // of the slots [B, K]
  float *fused;                    // in and out
  int64_t *moved_from, *opened;    // since the last stop: slots they come from, words begun
  uint8_t *grew;
  float *gain, *estimate;          // raw scores since the last stop [scorers, B, K]; the look-ahead's part of `fused`
  int64_t *states;                 // of the scorers [scorers, B, K]
  int64_t *node, *last;            // by a stride each
  int64_t node_stride, last_stride;
  float *log_total, *log_blank;    // -inf for dead slots, by one stride
  int64_t mass_stride;
  // of the utterances [B]
  double *offset;
  const uint8_t *landed;  // whether scores have come in, up to the look-ahead's estimate `scored` of each slot [B, K]
  const float *scored;
  float *totals;   // estimates of all prefixes of the arena, where scores come in late
  int64_t *at;     // frames searched
  uint8_t *fired;  // whether the rule has stopped them
};

struct Slot {  // a live prefix
  double blank, open, total;  // mass of alignments that end in blank, of others, of all
  uint64_t hash, parent_hash;
  int64_t node;
  int32_t last;     // piece
  int32_t row;      // of children
  bool repeats;     // the last piece is that before it
  // of language models
  bool grew;               // since the last stop
  int32_t origin, opened;  // slot at the last stop, words begun since then
  int32_t length;          // words or pieces begun, of which the rule asks
  float fused;             // what they add to the ranking
  // of the look-ahead: state; estimates since the root: all, those of closed words, those of what is scored; how much
  // of the rest `fused` holds
  int32_t ahead_context;
  float ahead, ahead_closed, ahead_scored, ahead_estimate;
};

struct Joined {  // of a live prefix and a scorer
  double gain;    // raw score since the last stop
  int32_t state;
};

struct Way {  // how a hypothesis can go on: a stay (below K) or K + slot * columns + column
  double key;
  int64_t index;
  bool operator<(const Way &other) const { return key > other.key || (key == other.key && index < other.index); }
};

struct Frames {  // of one utterance
  const float *rows;  // log-probs
  int64_t stride;
  const float *best;
  const uint8_t *searched;
  int64_t ids, ids_a_frame;  // of the nodes born in a frame: from ids + frame * ids_a_frame
};

struct Scratch {  // of one frame
  std::vector<double> stay_blank, stay_open, stay_total, probability, total, open, factor;
  std::vector<int32_t> columns, column_of, column_before, was, parent, used, kept;
  std::vector<uint8_t> struck;
  std::vector<Way> ways;
  std::vector<float> maxima;
  std::vector<std::pair<float, int32_t>> reached;
  std::vector<Slot> next;
  std::vector<Joined> joined;

  explicit Scratch(const Settings &set) {
    const size_t slots = set.beam, all = slots * set.columns;
    stay_blank.resize(slots), stay_open.resize(slots), stay_total.resize(slots), factor.resize(slots);
    parent.resize(slots), used.resize(slots), kept.resize(slots), next.resize(slots);
    probability.resize(set.columns), was.resize(set.columns), total.resize(all), open.resize(all), struck.resize(all);
    columns.reserve(set.pieces), ways.reserve(slots + all), reached.reserve(set.pieces);
    column_of.assign(set.pieces, -1);
    column_before.assign(set.pieces, set.columns);  // a column of zeros
  }
};

}  // namespace icefall::search
