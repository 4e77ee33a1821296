// The RMSNorm of one row: weight x / sqrt(mean(x^2) + epsilon). Its sum runs lane by lane and then through one tree.
#pragma once

#include "simd.h"

namespace cispo {

inline float inverse_root(Vec squares, int64_t width, float epsilon) {
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
}

// x may be y.
inline void norm_row(const float* x, const float* weight, float epsilon, float* y, int64_t width) {
  Vec squares{};
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec value = load_first(x + j, std::min(kLanes, width - j));
    squares = fma(value, value, squares);
  }
  const Vec factor = fill(inverse_root(squares, width, epsilon));
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t n = std::min(kLanes, width - j);
    store_first(y + j, load_first(x + j, n) * factor * load_first(weight + j, n), n);
  }
}

}  // namespace cispo
