// What the softmax attention kernels share: sizes, rotary embedding, and the register tile.
//
// Keys are walked in tiles of 64 from the start of the sequence with the online softmax. Packed rows are worked on as
// columns: 16 queries of one head, a lane each, so that maxima and sums over keys are between registers, not within.
// A decoded query has its keys in the lanes instead. Both give an element the same bits because every score is one chain
// of multiply-adds over d, every output one chain over keys, and a tile's weights are added in the tree of `sum`.
#pragma once

#include <utility>
#include <vector>

#include "simd.h"

namespace cispo::softmax {

constexpr int64_t kKeyTile = 64;     // keys a step of the online softmax takes in, and of a page
constexpr int64_t kLargestDim = 128;
constexpr int64_t kColumn = kLanes;  // queries of a column

struct Attention {
  int64_t heads, key_heads, dim, half;  // half: pairs of dims that are rotated, i with i + half

  int64_t group() const { return heads / key_heads; }
  int64_t row() const { return (heads + 2 * key_heads) * dim; }
  int64_t tile() const { return kKeyTile * dim; }
  float scale() const { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim))); }
  int64_t query(int64_t head) const { return head * dim; }
  int64_t key(int64_t head) const { return (heads + head) * dim; }
  int64_t value(int64_t head) const { return (heads + key_heads + head) * dim; }
};

// The first dims of a head turned by the angles of its position, all of it scaled; rotary: the cosines, then the sines.
// Sign -1 turns back, which is the transpose that gradients need.
template <int Sign = 1>
inline void rotate(const float* from, const float* rotary, const Attention& size, float scale, float* to) {
  const Vec by = fill(scale);
  const int64_t half = size.half;
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = std::min(kLanes, half - i);
    const Vec first = load_first(from + i, n), second = load_first(from + half + i, n);
    const Vec cosine = load_first(rotary + i, n), sine = load_first(rotary + half + i, n) * fill(Sign);
    store_first(to + i, (first * cosine - second * sine) * by, n);
    store_first(to + half + i, (second * cosine + first * sine) * by, n);
  }
  for (int64_t i = 2 * half; i < size.dim; i += kLanes) {
    const int64_t n = std::min(kLanes, size.dim - i);
    store_first(to + i, load_first(from + i, n) * by, n);
  }
}

// to[d * to_row + i] = from[i * dim + d] for 16 rows i.
inline void transpose_rows(const float* from, int64_t dim, float* to, int64_t to_row) {
  for (int64_t first = 0; first < dim; first += kLanes) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * dim + first);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + (first + i) * to_row, block[i]);
  }
}

inline void copy_row(const float* from, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d += kLanes) store(to + d, load(from + d));
}

// Rows start .. end - 1 of a sequence, whose projections and angles begin at row `start`.
struct Rows {
  const float *qkv, *rotary;
  int64_t start, end;

  // Of the 16 rows from `first` (a multiple of 16) on, those that are there, rotated and scaled; zeros for the others.
  // column: where they are in a projection. Returns the first of them and the last plus one, counted from `first`.
  std::pair<int64_t, int64_t> rotated(int64_t first, int64_t column, const Attention& size, float scale, float* to) const {
    const int64_t from = std::max(start - first, int64_t{0}), until = std::clamp(end - first, from, kColumn);
    std::fill(to, to + from * size.dim, 0.0f);
    for (int64_t i = from; i < until; ++i) {
      const int64_t row = first + i - start;
      rotate(qkv + row * size.row() + column, rotary + row * 2 * size.half, size, scale, to + i * size.dim);
    }
    std::fill(to + until * size.dim, to + kColumn * size.dim, 0.0f);
    return {from, until};
  }
};

// Pieces families[family] .. families[family + 1] - 1: a prompt and the branches that go on from its end, or one piece
// alone. starts: the position of each piece's first row; ends: where its rows begin, and the last one's end.
struct Packing {
  const int64_t *ends, *starts, *families;

  int64_t first(int64_t family) const { return families[family]; }
  int64_t end(int64_t family) const { return families[family + 1]; }
  int64_t piece_end(int64_t piece) const { return starts[piece] + ends[piece + 1] - ends[piece]; }
  // Rows of its longest sequence.
  int64_t longest(int64_t family) const {
    int64_t rows = 0;
    for (int64_t piece = first(family); piece < end(family); ++piece) rows = std::max(rows, piece_end(piece));
    return rows;
  }
};

#if defined(__AVX512F__)
constexpr int kTileRows = 16;
#else
constexpr int kTileRows = 4;  // two registers a Vec, and half as many registers
#endif

// 16 rows of 16 lanes. Row i is start(i) and then a chain over k of the number a[i * Row + k * a_step] times the lanes at
// b + k * b_step; finish(i, row) takes it.
template <int64_t Row, class Start, class Finish>
inline void tile(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth, Start start,
                 Finish finish) {
  for (int first = 0; first < kLanes; first += kTileRows) {
    Vec total[kTileRows];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) total[i] = start(first + i);
    const float* left = a + first * Row;
    const float* right = b;
    for (int64_t k = 0; k < depth; ++k, left += a_step, right += b_step) {
      const Vec lanes = load(right);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) total[i] = fma(fill(left[i * Row]), lanes, total[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) finish(first + i, total[i]);
  }
}

// As `tile`, added to what lies at c.
template <int64_t Row>
inline void add_tile(const float* a, int64_t a_step, const float* b, int64_t b_step, int64_t depth, float* c,
                     int64_t c_row) {
  tile<Row>(
      a, a_step, b, b_step, depth, [=](int i) { return load(c + i * c_row); },
      [=](int i, Vec row) { store(c + i * c_row, row); });
}

// This thread's floats, at a cache line; what they held before is lost.
inline float* aligned_scratch(int64_t floats) {
  thread_local std::vector<float> scratch;
  const auto size = static_cast<size_t>(floats + kLanes);
  if (scratch.size() < size) scratch = std::vector<float>(size);
  const auto address = reinterpret_cast<uintptr_t>(scratch.data());
  return scratch.data() + (-address % sizeof(Vec)) / sizeof(float);
}

// In the last 16 keys that a column meets: whether key i is at or before the query in each lane.
inline IntVec visible(int i) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane >= i;
}

}  // namespace cispo::softmax
