// Matrix products whose every element is one chain of fused multiply-adds in order of the inner index, from 0.
//
// So an element's bits depend on its row of A and its column of B alone: not on the rows beside it, not on the tile it
// falls in, not on threads. That is the contract of training, prefill and decode giving a token the same bits.
//
// Register tiles of 12 rows by 32 columns keep 24 accumulators; smaller tiles finish the edges. A tile's rows of A are
// laid one after the other per inner index first, so that the inner loop follows one pointer.
#pragma once

#include <vector>

#include "simd.h"

namespace cispo {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 4;  // two registers a Vec, and half as many registers
#endif
constexpr int64_t kPanel = 2 * kLanes;

struct Matrix {  // element (i, k) at data[i * row + k * column]
  const float* data;
  int64_t row, column;
};

enum class Write { kSet, kAdd };  // C = AB, or C += AB with AB summed first

// a: R values of one inner index after the other.
template <int R, int V>
inline void multiply_tile(const float* a, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                          int64_t columns, Write write) {
  Vec total[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) total[i][v] = Vec{};
  for (int64_t k = 0; k < depth; ++k, b += ldb, a += R) {
    Vec right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec left = fill(a[i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) total[i][v] = fma(left, right[v], total[i][v]);
    }
  }
  if (columns == V * kLanes && write == Write::kSet) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(c + i * ldc + v * kLanes, total[i][v]);
    return;
  }
  alignas(64) float out[R][V * kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(&out[i][v * kLanes], total[i][v]);
  for (int i = 0; i < R; ++i) {
    float* to = c + i * ldc;
    for (int64_t j = 0; j < columns; ++j) to[j] = write == Write::kAdd ? to[j] + out[i][j] : out[i][j];
  }
}

// Where B's panel of 32 columns from column j on begins, and the distance of its rows.
struct Panels {
  const float* data;
  int64_t row, panel;
};

template <int R>
inline void multiply_rows(int64_t rows, int64_t columns, int64_t depth, Matrix a, Panels b, float* c, int64_t ldc,
                          Write write, std::vector<float>& scratch) {
  for (; rows >= R; rows -= R, a.data += R * a.row, c += R * ldc) {
    float* tile = scratch.data();
    if (a.row == 1) {
      for (int64_t k = 0; k < depth; ++k) std::memcpy(tile + k * R, a.data + k * a.column, R * sizeof(float));
    } else {
      for (int i = 0; i < R; ++i)
        for (int64_t k = 0; k < depth; ++k) tile[k * R + i] = a.data[i * a.row + k * a.column];
    }
    const float* panel = b.data;
    for (int64_t j = 0; j < columns; j += kPanel, panel += b.panel) {
      const int64_t width = std::min(kPanel, columns - j);
      if (width > kLanes) {
        multiply_tile<R, 2>(tile, panel, b.row, depth, c + j, ldc, width, write);
      } else {
        multiply_tile<R, 1>(tile, panel, b.row, depth, c + j, ldc, width, write);
      }
    }
  }
  if constexpr (R > 1) {
    if (rows > 0) multiply_rows<(R + 1) / 2>(rows, columns, depth, a, b, c, ldc, write, scratch);
  }
}

inline std::vector<float>& multiply_scratch(int64_t depth) {
  thread_local std::vector<float> scratch;
  const auto size = static_cast<size_t>(depth * kTileRows);
  if (scratch.size() < size) scratch.resize(size);
  return scratch;
}

// C [rows, columns] = or += A [rows, depth] B [depth, columns], B's rows contiguous and ldb apart. Reads whole lanes:
// where columns is not a multiple of 16, B's rows (the last one too) must be readable up to the next multiple.
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Matrix a, const float* b, int64_t ldb, float* c,
                     int64_t ldc, Write write = Write::kSet) {
  multiply_rows<kTileRows>(rows, columns, depth, a, {b, ldb, kPanel}, c, ldc, write, multiply_scratch(depth));
}

inline int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Floats that a packed [depth, columns] matrix takes: panels of 32 columns, each contiguous, zeros past the last one.
inline int64_t packed_size(int64_t depth, int64_t columns) { return panels(columns) * depth * kPanel; }

// Pack panel `panel` of B(k, j) at b.data[k * b.row + j * b.column].
inline void pack_panel(Matrix b, int64_t depth, int64_t columns, int64_t panel, float* packed) {
  const int64_t first = panel * kPanel, width = std::min(kPanel, columns - first);
  float* to = packed + panel * depth * kPanel;
  for (int64_t k = 0; k < depth; ++k, to += kPanel) {
    const float* from = b.data + k * b.row + first * b.column;
    for (int64_t j = 0; j < width; ++j) to[j] = from[j * b.column];
    for (int64_t j = width; j < kPanel; ++j) to[j] = 0.0f;
  }
}

inline void pack(Matrix b, int64_t depth, int64_t columns, float* packed) {
  for (int64_t panel = 0; panel < panels(columns); ++panel) pack_panel(b, depth, columns, panel, packed);
}

// As `multiply`, on a packed B.
inline void multiply_packed(int64_t rows, int64_t columns, int64_t depth, Matrix a, const float* packed, float* c,
                            int64_t ldc, Write write = Write::kSet) {
  const Panels b{packed, kPanel, depth * kPanel};
  multiply_rows<kTileRows>(rows, columns, depth, a, b, c, ldc, write, multiply_scratch(depth));
}

}  // namespace cispo
