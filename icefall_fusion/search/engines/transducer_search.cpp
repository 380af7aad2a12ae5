// The search of a transducer on a CPU: the functions that transducer_native.py calls.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../../common/guarded.h"
#include "search_types.h"
#include "transducer.h"

using namespace icefall::search;

namespace {

struct Search {
  Settings set;
  Contexts known;
  std::vector<TransducerUtterance> utterances;
  std::vector<int64_t> asked;  // rows of each in the step that waits for log-probs
  std::unique_ptr<Scratch> scratch;
  int64_t symbols;
};

}  // namespace

extern "C" {

// `context` is that before the first piece; it has row 0.
void *transducer_open(const Settings *settings, int64_t symbols, int64_t base, int64_t power, int64_t context) {
  return icefall::guarded_pointer([&]() -> void * {
    auto search = std::make_unique<Search>();
    search->set = *settings, search->symbols = symbols;
    search->known.base = base, search->known.power = power, search->known.rows.emplace(context, 0);
    search->utterances.resize(settings->batch), search->asked.assign(settings->batch, 0);
    for (int64_t b = 0; b < settings->batch; ++b)
      search->utterances[b].begin_at(search->set, b, symbols, context, 0);
    search->scratch = std::make_unique<Scratch>(search->set);
    return search.release();
  });
}

void transducer_close(void *handle) { delete static_cast<Search *>(handle); }

// Do a step of all utterances that go on, with the log-probs [rows, pieces] that were asked for, and ask for those of the
// next; without log-probs go on from a stop. No rows are asked for when all have stopped or reached frame `until`; the
// arrays then show where they stand. Returns 0.
int transducer_step(void *handle, const Batch *arrays, const Rows *rows, const float *log_probs, int64_t stride,
                    int64_t until, int stopping) {
  return icefall::guarded([&] {
    auto &search = *static_cast<Search *>(handle);
    const Settings &set = search.set;
    const int64_t row_size = set.batch * set.beam;
    rows->counts[0] = rows->counts[1] = 0;
    for (int64_t b = 0; b < set.batch; ++b) {
      auto &utterance = search.utterances[b];
      if (!log_probs) {
        utterance.resume(set, arrays->fused + b * set.beam, *arrays);
      } else if (search.asked[b]) {
        utterance.advance(set, *search.scratch, log_probs, stride, stopping != 0, b * set.beam, row_size, *arrays,
                          search.known, *rows);
        log_probs += search.asked[b] * stride;
      }
    }
    for (int64_t b = 0; b < set.batch; ++b)
      search.asked[b] = search.utterances[b].ask(std::min(until, arrays->lens[b]), b * arrays->frames, *rows);
    if (rows->counts[0] == 0)
      for (int64_t b = 0; b < set.batch; ++b) show(set, search.utterances[b], b, *arrays);
    return 0;
  });
}

}  // extern "C"
