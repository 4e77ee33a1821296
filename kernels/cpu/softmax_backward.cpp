// Gradients of causal softmax attention, as in FlashAttention-2 (arXiv 2307.08691, algorithm 2): scores are computed
// again and become weights by the log-sum-exp that the forward left.
//
// A thread takes a key head of a sequence with all its queries, in order, so every sum has one order.
#include "softmax.h"

using namespace cispo;
using namespace cispo::softmax;

namespace {

// One key head of one sequence, in tiles of 64 keys with zeros past the last key.
struct Keys {
  float* keys_across;    // [tiles, dim, 64]
  float* values_across;  // [tiles, dim, 64]
  float* keys;           // [tiles * 64, dim]
  float* dkeys;          // [tiles * 64, dim]
  float* dvalues;        // [tiles * 64, dim]
};

void copy_rows(const float* from, int64_t from_row, int64_t rows, int64_t dim, float* to) {
  for (int64_t i = 0; i < rows; ++i) copy_row(from + i * from_row, dim, to + i * dim);
  std::fill(to + rows * dim, to + kColumn * dim, 0.0f);
}

Keys gather_keys(const float* qkv, const float* rotary, int64_t length, int64_t head, const Attention& size) {
  const int64_t padded = (length + kKeyTile - 1) / kKeyTile * kKeyTile, floats = padded * size.dim;
  float* scratch = aligned_scratch(5 * floats);
  const Keys own{scratch, scratch + floats, scratch + 2 * floats, scratch + 3 * floats, scratch + 4 * floats};
  for (int64_t first = 0; first < padded; first += kColumn) {
    const int64_t count = std::max<int64_t>(0, std::min(kColumn, length - first));
    const int64_t across = first / kKeyTile * size.tile() + first % kKeyTile;
    const float* from = qkv + first * size.row();
    float* rows = own.keys + first * size.dim;
    float* values = own.dvalues + first * size.dim;  // for now
    rotated_rows(from + size.key(head), rotary + first * 2 * size.half, count, size, 1.0f, rows);
    transpose_rows(rows, size.dim, own.keys_across + across, kKeyTile);
    copy_rows(from + size.value(head), size.row(), count, size.dim, values);
    transpose_rows(values, size.dim, own.values_across + across, kKeyTile);
  }
  std::fill(own.dkeys, own.dkeys + 2 * floats, 0.0f);
  return own;
}

// 16 queries of one head, as rows and across, with the gradients of their outputs.
struct Column {
  alignas(64) float query[kColumn * kLargestDim];         // [16, dim], rotated and scaled
  alignas(64) float query_across[kColumn * kLargestDim];  // [dim, 16]
  alignas(64) float dout[kColumn * kLargestDim];
  alignas(64) float dout_across[kColumn * kLargestDim];
  alignas(64) float dquery[kColumn * kLargestDim];  // [16, dim], of `query`
  alignas(64) float weights[kKeyTile * kColumn];    // [64, 16]
  alignas(64) float dscores[kKeyTile * kColumn];
  Vec logsumexp, delta;
};

// Weights and gradients of the scores of keys first .. first + 15 of a tile.
template <bool IsLast>
void score(Column& column, const float* keys_across, const float* values_across, int64_t first, int64_t dim) {
  float* weights = column.weights + first * kColumn;
  float* dscores = column.dscores + first * kColumn;
  const auto zero = [](int) { return Vec{}; };
  const Vec logsumexp = column.logsumexp, delta = column.delta;
  tile<1>(keys_across + first, kKeyTile, column.query_across, kColumn, dim, zero, [=](int i, Vec row) {
    const Vec weight = exp(row - logsumexp);
    store(weights + i * kColumn, IsLast ? select(visible(i), weight, Vec{}) : weight);
  });
  tile<1>(values_across + first, kKeyTile, column.dout_across, kColumn, dim, zero, [=](int i, Vec row) {
    store(dscores + i * kColumn, load(weights + i * kColumn) * (row - delta));
  });
}

void absorb(Column& column, const Keys& own, int64_t j, int64_t groups, bool is_last, const Attention& size) {
  const int64_t dim = size.dim;
  const float* keys_across = own.keys_across + j * size.tile();
  const float* values_across = own.values_across + j * size.tile();
  for (int64_t group = 0; group < groups - is_last; ++group) {
    score<false>(column, keys_across, values_across, group * kLanes, dim);
  }
  if (is_last) score<true>(column, keys_across, values_across, (groups - 1) * kLanes, dim);
  for (int64_t d = 0; d < dim; d += kLanes) {
    add_tile<1>(column.dscores, kColumn, own.keys + j * size.tile() + d, dim, groups * kLanes, column.dquery + d, dim);
    for (int64_t first = 0; first < groups * kLanes; first += kLanes) {
      const int64_t at = j * size.tile() + first * dim + d;
      add_tile<kColumn>(column.weights + first * kColumn, 1, column.dout + d, dim, kColumn, own.dvalues + at, dim);
      add_tile<kColumn>(column.dscores + first * kColumn, 1, column.query + d, dim, kColumn, own.dkeys + at, dim);
    }
  }
}

// out, dout: [16, heads, dim] from the column's first query on; the sum of out * dout of each query.
Vec output_dot(const float* out, const float* dout, int64_t count, int64_t row, int64_t dim) {
  Vec dots[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < dim; d += kLanes) dots[i] = fma(load(out + i * row + d), load(dout + i * row + d), dots[i]);
  }
  transpose(dots);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) dots[i] += dots[i + width];
  }
  return dots[0];
}

struct Sequence {  // where its rows begin
  const float *qkv, *rotary, *out, *logsumexp, *dout;
  float* dqkv;
  int64_t length;
};

void query_gradients(const Sequence& at, const Keys& own, int64_t first, int64_t head, const Attention& size) {
  Column column;
  const int64_t count = std::min(kColumn, at.length - first), last = first / kKeyTile, out_row = size.heads * size.dim;
  const float* rotary = at.rotary + first * 2 * size.half;
  const int64_t out_at = first * out_row + head * size.dim, qkv_at = first * size.row() + size.query(head);
  rotated_rows(at.qkv + qkv_at, rotary, count, size, size.scale(), column.query);
  transpose_rows(column.query, size.dim, column.query_across, kColumn);
  copy_rows(at.dout + out_at, out_row, count, size.dim, column.dout);
  transpose_rows(column.dout, size.dim, column.dout_across, kColumn);
  std::fill(column.dquery, column.dquery + kColumn * size.dim, 0.0f);
  column.delta = output_dot(at.out + out_at, at.dout + out_at, count, out_row, size.dim);
  float logsumexp[kColumn];
  std::fill(logsumexp, logsumexp + kColumn, INFINITY);  // a row that is no query has no weight anywhere
  for (int64_t i = 0; i < count; ++i) logsumexp[i] = at.logsumexp[(first + i) * size.heads + head];
  column.logsumexp = load(logsumexp);
  for (int64_t j = 0; j <= last; ++j) {
    absorb(column, own, j, j < last ? kKeyTile / kLanes : first % kKeyTile / kLanes + 1, j == last, size);
  }
  for (int64_t i = 0; i < count; ++i) {
    rotate<-1>(column.dquery + i * size.dim, rotary + i * 2 * size.half, size, size.scale(),
                at.dqkv + qkv_at + i * size.row());
  }
}

}  // namespace

extern "C" {

// As cispo_softmax_forward; dout: [N, heads, dim]; dqkv: as qkv, all of it written.
void cispo_softmax_backward(const float* qkv, const float* rotary, const int64_t* starts, int64_t sequences,
                            int64_t heads, int64_t key_heads, int64_t dim, int64_t half, const float* out,
                            const float* logsumexp, const float* dout, float* dqkv, int64_t threads) {
  const Attention size{heads, key_heads, dim, half};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t unit = 0; unit < sequences * key_heads; ++unit) {
    const int64_t sequence = unit / key_heads, head = unit % key_heads, start = starts[sequence];
    const Sequence at{qkv + start * size.row(), rotary + start * 2 * half,     out + start * heads * dim,
                      logsumexp + start * heads, dout + start * heads * dim, dqkv + start * size.row(),
                      starts[sequence + 1] - start};
    const Keys own = gather_keys(at.qkv, at.rotary, at.length, head, size);
    for (int64_t first = 0; first < at.length; first += kColumn) {
      for (int64_t query = head * size.group(); query < (head + 1) * size.group(); ++query) {
        query_gradients(at, own, first, query, size);
      }
    }
    for (int64_t i = 0; i < at.length; ++i) {
      float* row = at.dqkv + i * size.row();
      rotate<-1>(own.dkeys + i * dim, at.rotary + i * 2 * half, size, 1.0f, row + size.key(head));
      copy_row(own.dvalues + i * dim, dim, row + size.value(head));
    }
  }
}
}
