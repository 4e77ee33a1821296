// What the forward and the backward of a mixture of experts share: sizes, scratch, and sorting by expert.
//
// A slot is (token, choice), at token * choices + choice. Experts have their weights in three packed matrices of panels:
// gate and up [D, F], down [F, D].
#pragma once

#include <vector>

#include "blocks.h"

namespace cispo {

struct ExpertSizes {
  int64_t tokens, width, inner, experts, choices;

  int64_t slots() const { return tokens * choices; }
  int64_t packed() const { return packed_size(width, inner); }        // gate or up of one expert
  int64_t packed_down() const { return packed_size(inner, width); }
};

// Scratch of one thread that lasts from call to call; `name` tells apart those in use at the same time.
template <int name, typename T>
inline T* expert_scratch(int64_t size) {
  thread_local std::vector<T> scratch;
  if (scratch.size() < static_cast<size_t>(size)) scratch.resize(static_cast<size_t>(size));
  return scratch.data();
}

// Slots in order of expert, then of slot: those of expert e are order[starts[e] .. starts[e + 1]). Slots with a negative
// id go to no expert and are left out.
inline void sort_by_expert(const int32_t* ids, int64_t slots, int64_t experts, int32_t* starts, int32_t* order) {
  std::fill(starts, starts + experts + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (ids[slot] >= 0) ++starts[ids[slot] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (ids[slot] >= 0) order[starts[ids[slot]]++] = static_cast<int32_t>(slot);
  }
  for (int64_t e = experts; e > 0; --e) starts[e] = starts[e - 1];
  starts[0] = 0;
}

}  // namespace cispo
