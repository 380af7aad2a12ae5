// The best pieces of a frame, without sorting them all.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "search_types.h"

namespace icefall::search {

constexpr float kFarBelow = 200.0f;  // nats below a frame's best; pieces further down are sought without a floor

// Return a floor that at least `wanted` of the values reach, and not many more.
inline float floor_of(const float *values, int count, int wanted) {
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

// Call visit(v) for all values that reach a floor.
template <class Visit>
void where_reached(const float *values, int count, float floor, Visit visit) {
  int v = 0;
#if defined(__AVX512F__)
  const __m512 least = _mm512_set1_ps(floor);
  for (; v + 16 <= count; v += 16)
    for (unsigned bits = _mm512_cmp_ps_mask(_mm512_loadu_ps(values + v), least, _CMP_GE_OQ); bits; bits &= bits - 1)
      visit(v + __builtin_ctz(bits));
#elif defined(__AVX2__)
  const __m256 least = _mm256_set1_ps(floor);
  for (; v + 8 <= count; v += 8)
    for (unsigned bits = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values + v), least, _CMP_GE_OQ)); bits;
         bits &= bits - 1)
      visit(v + __builtin_ctz(bits));
#endif
  for (; v < count; ++v)
    if (values[v] >= floor) visit(v);
}

// Find the best pieces of a frame but blank that reach a floor, in no order. The best n lie in the n groups with the
// largest maxima, so a floor that n maxima reach is one that n pieces reach, and few more do.
inline void best_pieces(const float *row, float floor, const Settings &set, Scratch &scratch) {
  const int pieces = set.pieces, wanted = set.columns;
  auto &columns = scratch.columns;
  columns.clear();
  if (wanted >= pieces - 1) {
    where_reached(row, pieces, floor, [&](int v) {
      if (v != set.blank) columns.push_back(v);
    });
    return;
  }
  const int groups = std::min(pieces, (2 * wanted + 31) / 16 * 16);
  auto &maxima = scratch.maxima;
  maxima.assign(row, row + groups);
  float *top = maxima.data();
  int start = groups;
  for (; start + groups <= pieces; start += groups) {
    const float *group = row + start;
    for (int g = 0; g < groups; ++g) top[g] = group[g] > top[g] ? group[g] : top[g];
  }
  for (int v = start; v < pieces; ++v) top[v - start] = std::max(top[v - start], row[v]);
  auto &reached = scratch.reached;
  reached.clear();
  floor = std::max(floor, floor_of(top, groups, wanted + 1));  // one more: blank may be among them
  where_reached(row, pieces, floor, [&](int v) {
    if (v != set.blank) reached.emplace_back(-row[v], v);
  });
  if (int(reached.size()) > wanted) {
    std::nth_element(reached.begin(), reached.begin() + wanted, reached.end());
    reached.resize(wanted);
  }
  for (const auto &entry : reached) columns.push_back(entry.second);
}

}  // namespace icefall::search
