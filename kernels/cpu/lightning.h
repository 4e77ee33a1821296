// What the two lightning attention kernels share: small products on matrices that lie in cache, SiLU, decays.
//
// Every element of a product is one chain of multiply-adds in order of the inner index, from 0, as in gemm.h. Here the
// distances between the left matrix's elements are constants of the program, so nothing is packed, and what becomes of
// an element is the caller's. A chunk is 64 rows of one head; a local matrix of it keeps its rows kRow apart and has
// zeros from its last row to the next multiple of 16.
#pragma once

#include <memory>
#include <vector>

#include "simd.h"

namespace cispo::lightning {

#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 2;
#endif
constexpr int64_t kChunk = 64;
constexpr int64_t kMaximumDim = 128;
constexpr int64_t kRow = kMaximumDim + kLanes;  // nine cache lines: the rows of a narrow head share no cache set

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

inline Vec silu(Vec x) { return x * sigmoid(x); }

// The constants of one head: exp(-s (63 - u)) for u = 0 .. 63 and zeros for u = 64 .. 127, then exp(-s (i + 1)).
constexpr int64_t kDecayTable = 3 * kChunk;

struct Decays {
  const float* table;
  Vec within(int64_t i, int64_t j) const { return load(table + kChunk - 1 - i + j); }  // of keys j .. j + 15 to query i
  const float* key() const { return table; }  // from key j to the end of its chunk
  float query(int64_t i) const { return table[2 * kChunk + i]; }  // from the state before the chunk to query i
  float chunk() const { return query(kChunk - 1); }
};

// AR and AC: distance of A's rows and columns. finish(row, column, x) takes 16 elements of the product.
template <int R, int V, int64_t AR, int64_t AC, class Finish>
inline void multiply_tile(const float* a, const float* b, int64_t ldb, int64_t depth, Finish&& finish) {
  Vec total[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[i][v] = Vec{};
  for (int64_t k = 0; k < depth; ++k, a += AC, b += ldb) {
    Vec right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec left = fill(a[i * AR]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) total[i][v] = fma(left, right[v], total[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) finish(i, v * kLanes, total[i][v]);
}

// What a tile of rows needs: inner indices first .. last - 1, and columns 0 .. columns - 1 (a multiple of 16).
struct Span {
  int64_t first, last, columns;
};

// A B, a tile of rows after the other, the last one whole; span(row) says what the tile from this row on needs.
template <int64_t AR, int64_t AC, class Spans, class Finish>
inline void multiply(int64_t rows, const float* a, const float* b, int64_t ldb, Spans&& span, Finish&& finish) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const Span needed = span(row);
    const int64_t depth = needed.last - needed.first;
    const float *left = a + row * AR + needed.first * AC, *right = b + needed.first * ldb;
    int64_t column = 0;
    const auto finish_tile = [&](int64_t i, int64_t j, Vec x) { finish(row + i, column + j, x); };
    for (; column + 2 * kLanes <= needed.columns; column += 2 * kLanes)
      multiply_tile<kTileRows, 2, AR, AC>(left, right + column, ldb, depth, finish_tile);
    if (column < needed.columns) multiply_tile<kTileRows, 1, AR, AC>(left, right + column, ldb, depth, finish_tile);
  }
}

// One row a [depth] times B [depth, columns].
template <class Finish>
inline void multiply_row(const float* a, const float* b, int64_t ldb, int64_t depth, int64_t columns, Finish&& finish) {
  int64_t column = 0;
  const auto finish_tile = [&](int64_t, int64_t j, Vec x) { finish(column + j, x); };
  for (; column + 4 * kLanes <= columns; column += 4 * kLanes)
    multiply_tile<1, 4, 0, 1>(a, b + column, ldb, depth, finish_tile);
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes)
    multiply_tile<1, 2, 0, 1>(a, b + column, ldb, depth, finish_tile);
  if (column < columns) multiply_tile<1, 1, 0, 1>(a, b + column, ldb, depth, finish_tile);
}

// The products of a chunk of queries with all keys up to their own, and sums over those keys or over later queries.
inline auto earlier_keys(int64_t dim) {
  return [=](int64_t row) { return Span{0, dim, round_up(row + kTileRows, kLanes)}; };
}
inline auto over_earlier(int64_t dim) {
  return [=](int64_t row) { return Span{0, row + kTileRows, dim}; };
}
inline auto over_later(int64_t rows, int64_t dim) {
  return [=](int64_t row) { return Span{row, round_up(rows, kTileRows), dim}; };
}
inline auto over_all(int64_t depth, int64_t dim) {
  return [=](int64_t) { return Span{0, depth, dim}; };
}

// Rows and columns: multiples of 16.
inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) block[k] = load(from + (i + k) * from_row + j);
      cispo::transpose(block);
#pragma GCC unroll 16
      for (int64_t k = 0; k < kLanes; ++k) store(to + (j + k) * to_row + i, block[k]);
    }
  }
}

// Zeros in rows first .. end - 1 of a local matrix.
inline void clear(float* matrix, int64_t first, int64_t end, int64_t dim) {
  for (int64_t i = first; i < end; ++i) std::memset(matrix + i * kRow, 0, dim * sizeof(float));
}

// SiLU of n rows of x into rows first .. first + n - 1 of a local matrix, zeros around them; slope, where given, takes
// the derivative. Asks for what lies `ahead`, the rows that will be read next: they are far apart, and no processor
// guesses them.
inline void load_silu(const float* x, int64_t x_row, int64_t first, int64_t n, int64_t dim, int64_t ahead, float* value,
                      float* slope = nullptr) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      __builtin_prefetch(x + i * x_row + d + ahead, 0, 2);
      const Vec in = load(x + i * x_row + d), gate = sigmoid(in);
      store(value + (first + i) * kRow + d, in * gate);
      if (slope) store(slope + (first + i) * kRow + d, gate * fma(in, fill(1.0f) - gate, fill(1.0f)));
    }
  }
  clear(value, 0, first, dim);
  clear(value, first + n, round_up(first + n, kLanes), dim);
}

// A thread's own matrices, made once.
template <class Matrices>
inline Matrices& workspace() {
  thread_local std::unique_ptr<Matrices> matrices;
  if (!matrices) matrices = std::make_unique<Matrices>();
  return *matrices;
}

// Consecutive packed rows: a sequence, or a piece that starts at a later row of one. first_token: where its rows begin;
// first_chunk: how many chunks the pieces before it touch.
struct Piece {
  int64_t start, length, first_token, first_chunk;
};

inline std::vector<Piece> pieces(const int64_t* starts, const int64_t* lengths, int64_t count) {
  std::vector<Piece> all;
  int64_t token = 0, chunk = 0;
  for (int64_t i = 0; i < count; ++i) {
    all.push_back({starts[i], lengths[i], token, chunk});
    token += lengths[i];
    chunk += round_up(starts[i] % kChunk + lengths[i], kChunk) / kChunk;
  }
  return all;
}

// One head of one family: pieces first .. end - 1, of which those after the first are branches that go on from it.
struct Task {
  int64_t first, end, head, length;
  bool has_branches() const { return end - first > 1; }
};

// Every head of every family, the longest first, so that the threads finish together. families: where each one's pieces
// begin and the last one's end.
inline std::vector<Task> tasks(const std::vector<Piece>& pieces, const int64_t* families, int64_t count, int64_t heads) {
  std::vector<Task> all;
  for (int64_t family = 0; family < count; ++family) {
    const int64_t first = families[family], end = families[family + 1];
    int64_t length = 0;
    for (int64_t piece = first; piece < end; ++piece) length += pieces[piece].length;
    for (int64_t head = 0; head < heads; ++head) all.push_back({first, end, head, length});
  }
  std::stable_sort(all.begin(), all.end(), [](const Task& a, const Task& b) { return a.length > b.length; });
  return all;
}

// Tasks that a thread takes at a time: a family's heads lie side by side in memory, so all of them if there is enough
// for every thread.
inline int64_t tasks_at_a_time(int64_t tasks, int64_t heads, int64_t threads) {
  return std::clamp<int64_t>(tasks / (4 * threads), 1, heads);
}

}  // namespace cispo::lightning
