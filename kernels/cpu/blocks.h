// Products of a block of rows that lies in panels of 32 columns: element (i, k) at (k / 32) * panel + i * 32 + k % 32.
//
// Rows gathered into a block serve three products without another copy: as A, whose rows a register tile reads at fixed
// distances; as A transposed; and as B of a weight's gradient. Every element is again one chain in order of the inner
// index (gemm.h).
#pragma once

#include "gemm.h"

namespace cispo {

#if defined(__AVX512F__)
constexpr int kGradientTileRows = 8;  // divides a panel
#else
constexpr int kGradientTileRows = 2;
#endif

inline int64_t panel_width(int64_t columns, int64_t p) { return std::min(kPanel, columns - p * kPanel); }

// Copy one row into place i of a block; columns is a multiple of 16.
inline void put_row(const float* from, int64_t columns, float* block, int64_t panel, int64_t i) {
  for (int64_t k = 0; k < columns; k += kLanes) {
    store(block + k / kPanel * panel + i * kPanel + k % kPanel, load(from + k));
  }
}

template <int R, int V>
inline void block_tile(const float* a, int64_t panel, const float* b, int64_t depth, float* c, int64_t ldc) {
  Vec total[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) total[i][v] = Vec{};
  for (int64_t first = 0; first < depth; first += kPanel, a += panel) {
    const int64_t inner = std::min(kPanel, depth - first);
    for (int64_t k = 0; k < inner; ++k, b += kPanel) {
      Vec right[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vec left = fill(a[i * kPanel + k]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) total[i][v] = fma(left, right[v], total[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + i * ldc + v * kLanes, total[i][v]);
}

template <int R>
inline void block_rows(int64_t rows, int64_t width, int64_t depth, const float* a, int64_t panel, const float* b,
                       float* c, int64_t ldc) {
  for (; rows >= R; rows -= R, a += R * kPanel, c += R * ldc) {
    if (width > kLanes) {
      block_tile<R, 2>(a, panel, b, depth, c, ldc);
    } else {
      block_tile<R, 1>(a, panel, b, depth, c, ldc);
    }
  }
  if constexpr (R > 1) {
    if (rows > 0) block_rows<(R + 1) / 2>(rows, width, depth, a, panel, b, c, ldc);
  }
}

// C [rows, width] = A B for the block A [rows, depth] and one packed panel of B, whose width is 16 or 32.
inline void multiply_block(int64_t rows, int64_t width, int64_t depth, const float* a, int64_t panel, const float* b,
                           float* c, int64_t ldc) {
  block_rows<kTileRows>(rows, width, depth, a, panel, b, c, ldc);
}

template <int R, int V>
inline void gradient_tile(int64_t rows, const float* a, const float* b, float* c, int64_t ldc, Write write) {
  Vec total[R][V];
  if (write == Write::kAdd) {
    for (int i = 0; i < R; ++i) __builtin_prefetch(c + i * ldc, 1), __builtin_prefetch(c + i * ldc + kLanes, 1);
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) total[i][v] = Vec{};
  for (int64_t r = 0; r < rows; ++r, a += kPanel, b += kPanel) {
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
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + i * ldc + v * kLanes;
      store(to, write == Write::kAdd ? load(to) + total[i][v] : total[i][v]);
    }
}

// C [columns of a, columns of b] = or += A^T B over the rows of a block, for one panel of A and one of B, both of 16 or
// 32 columns. What these rows give is summed before it is added.
inline void multiply_gradient(int64_t rows, int64_t a_width, const float* a, int64_t b_width, const float* b, float* c,
                              int64_t ldc, Write write) {
  constexpr int R = kGradientTileRows;
  for (int64_t i = 0; i < a_width; i += R) {
    if (b_width > kLanes) {
      gradient_tile<R, 2>(rows, a + i, b, c + i * ldc, ldc, write);
    } else {
      gradient_tile<R, 1>(rows, a + i, b, c + i * ldc, ldc, write);
    }
  }
}

}  // namespace cispo
