// The prefix search on a CPU, one utterance after the other: the functions that native.py calls.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "../../common/guarded.h"
#include "ngram.h"
#include "search_types.h"
#include "utterance.h"

using namespace icefall::search;

namespace {

struct Search {
  Settings set;
  std::vector<Utterance> utterances;
  std::unique_ptr<Scratch> scratch;  // of the one thread that searches all utterances
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

void *prefix_search_open(const Settings *settings) {
  return icefall::guarded_pointer([&]() -> void * {
    auto search = std::make_unique<Search>();
    search->set = *settings;
    search->utterances.resize(settings->batch);
    for (int64_t b = 0; b < settings->batch; ++b) search->utterances[b].begin(search->set, b);
    return search.release();
  });
}

void prefix_search_close(void *handle) { delete static_cast<Search *>(handle); }

// Search the next frames of the utterances first..last, up to frame `until` or their end; if `stopping`, up to the next
// stop of the rule. Returns 0.
int prefix_search_run(void *handle, const Batch *arrays, int64_t until, int stopping, int64_t first, int64_t last) {
  return icefall::guarded([&] {
    auto &search = *static_cast<Search *>(handle);
    const Settings &set = search.set;
    const Batch &batch = *arrays;
    std::unique_ptr<Scratch> own;  // several threads may each search some of the utterances
    auto &scratch = last - first == set.batch ? search.scratch : own;
    if (!scratch) scratch = std::make_unique<Scratch>(set);
    for (int64_t b = first; b < last; ++b) {
      const int64_t row = b * set.beam, row_size = set.batch * set.beam;
      const Frames of{batch.log_probs + b * batch.row_stride, batch.frame_stride, batch.best + b * batch.frames,
                      batch.searched + b * batch.frames, row + row_size, row_size};
      auto &utterance = search.utterances[b];
      utterance.run(set, *scratch, of, std::min(until, batch.lens[b]), stopping != 0, batch.fused + row, batch);
      show(set, utterance, b, batch);
    }
    return 0;
  });
}

// Forget the first frames of utterance `b`, see Utterance::forget. Returns 0.
int prefix_search_forget(void *handle, const Batch *arrays, int64_t b, int64_t frames, const int64_t *nodes) {
  return icefall::guarded([&] {
    auto &search = *static_cast<Search *>(handle);
    search.utterances[b].forget(frames, nodes);
    show(search.set, search.utterances[b], b, *arrays);
    return 0;
  });
}

}  // extern "C"
