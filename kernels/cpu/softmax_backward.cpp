// Gradients of causal softmax attention, as in FlashAttention-2 (arXiv 2307.08691, algorithm 2): scores are computed
// again and become weights by the log-sum-exp that the forward left.
//
// A thread takes a key head of a sequence, or of a prompt and its branches in turn, with all its queries, in order, so
// every sum has one order.
#include "softmax.h"

using namespace cispo;
using namespace cispo::softmax;

namespace {

// One key head of one sequence, in tiles of 64 keys with zeros past the last key.
struct Keys {
  float* keys_across;    // [tiles, dim, 64]
  float* values_across;  // [tiles, dim, 64]
  float* keys;           // [tiles * 64, dim]
  float* values;         // [tiles * 64, dim]
  float* dkeys;          // [tiles * 64, dim]
  float* dvalues;        // [tiles * 64, dim]
};

Keys room(int64_t rows, const Attention& size) {
  const int64_t floats = (rows + kKeyTile - 1) / kKeyTile * size.tile();
  float* scratch = aligned_scratch(6 * floats);
  return {scratch,          scratch + floats,     scratch + 2 * floats, scratch + 3 * floats,
          scratch + 4 * floats, scratch + 5 * floats};
}

// Lay keys and values of some rows after those before them, with gradients of zero.
void lay_keys(const Rows& rows, int64_t head, const Attention& size, const Keys& own) {
  const int64_t dim = size.dim, padded = (rows.end + kKeyTile - 1) / kKeyTile * kKeyTile;
  for (int64_t row = rows.start; row < rows.end; ++row) {
    const int64_t at = row - rows.start;
    const float* from = rows.qkv + at * size.row();
    rotate(from + size.key(head), rows.rotary + at * 2 * size.half, size, 1.0f, own.keys + row * dim);
    copy_row(from + size.value(head), dim, own.values + row * dim);
  }
  std::fill(own.keys + rows.end * dim, own.keys + padded * dim, 0.0f);
  std::fill(own.values + rows.end * dim, own.values + padded * dim, 0.0f);
  std::fill(own.dkeys + rows.start * dim, own.dkeys + padded * dim, 0.0f);
  std::fill(own.dvalues + rows.start * dim, own.dvalues + padded * dim, 0.0f);
  for (int64_t first = rows.start / kColumn * kColumn; first < padded; first += kColumn) {
    const int64_t across = first / kKeyTile * size.tile() + first % kKeyTile;
    transpose_rows(own.keys + first * dim, dim, own.keys_across + across, kKeyTile);
    transpose_rows(own.values + first * dim, dim, own.values_across + across, kKeyTile);
  }
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

// The sum of out * dout of each query of a column; out: row `from` of it, `row` from the next.
Vec output_dot(const float* out, int64_t row, int64_t from, int64_t until, const Column& column, int64_t dim) {
  Vec dots[kLanes] = {};
  for (int64_t i = from; i < until; ++i, out += row) {
    for (int64_t d = 0; d < dim; d += kLanes) dots[i] = fma(load(out + d), load(column.dout + i * dim + d), dots[i]);
  }
  transpose(dots);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) dots[i] += dots[i + width];
  }
  return dots[0];
}

// The other arrays of some rows, from the first on.
struct Gradients {
  const float *out, *logsumexp, *dout;
  float* dqkv;
};

void query_gradients(const Rows& rows, const Gradients& at, const Keys& own, int64_t first, int64_t head,
                     const Attention& size) {
  Column column;
  const auto [from, until] = rows.rotated(first, size.query(head), size, size.scale(), column.query);
  const int64_t last = first / kKeyTile, out_row = size.heads * size.dim, shift = first - rows.start, dim = size.dim;
  transpose_rows(column.query, dim, column.query_across, kColumn);
  std::fill(column.dout, column.dout + kColumn * dim, 0.0f);
  for (int64_t i = from; i < until; ++i) copy_row(at.dout + (shift + i) * out_row + head * dim, dim, column.dout + i * dim);
  transpose_rows(column.dout, dim, column.dout_across, kColumn);
  std::fill(column.dquery, column.dquery + kColumn * dim, 0.0f);
  column.delta = output_dot(at.out + (shift + from) * out_row + head * dim, out_row, from, until, column, dim);
  float logsumexp[kColumn];
  std::fill(logsumexp, logsumexp + kColumn, INFINITY);  // a row that is no query has no weight anywhere
  for (int64_t i = from; i < until; ++i) logsumexp[i] = at.logsumexp[(shift + i) * size.heads + head];
  column.logsumexp = load(logsumexp);
  for (int64_t j = 0; j <= last; ++j) {
    absorb(column, own, j, j < last ? kKeyTile / kLanes : first % kKeyTile / kLanes + 1, j == last, size);
  }
  for (int64_t i = from; i < until; ++i) {
    rotate<-1>(column.dquery + i * dim, rows.rotary + (shift + i) * 2 * size.half, size, size.scale(),
                at.dqkv + (shift + i) * size.row() + size.query(head));
  }
}

void write_keys(const Rows& rows, const Gradients& at, const Keys& own, int64_t head, const Attention& size) {
  for (int64_t row = rows.start; row < rows.end; ++row) {
    float* to = at.dqkv + (row - rows.start) * size.row();
    rotate<-1>(own.dkeys + row * size.dim, rows.rotary + (row - rows.start) * 2 * size.half, size, 1.0f,
               to + size.key(head));
    copy_row(own.dvalues + row * size.dim, size.dim, to + size.value(head));
  }
}

}  // namespace

extern "C" {

// As cispo_softmax_forward; dout: [N, heads, dim]; dqkv: as qkv, all of it written. A prompt's keys take the gradients of
// its own queries first, then those of each branch in order.
void cispo_softmax_backward(const float* qkv, const float* rotary, const int64_t* ends, const int64_t* starts,
                            const int64_t* families, int64_t family_count, int64_t heads, int64_t key_heads,
                            int64_t dim, int64_t half, const float* out, const float* logsumexp, const float* dout,
                            float* dqkv, int64_t threads) {
  const Attention size{heads, key_heads, dim, half};
  const Packing packing{ends, starts, families};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t unit = 0; unit < family_count * key_heads; ++unit) {
    const int64_t family = unit / key_heads, head = unit % key_heads;
    const auto rows_of = [&](int64_t piece) {
      const int64_t token = ends[piece];
      return Rows{qkv + token * size.row(), rotary + token * 2 * half, starts[piece], packing.piece_end(piece)};
    };
    const auto gradients_of = [&](int64_t piece) {
      const int64_t token = ends[piece], row = token * heads * dim;
      return Gradients{out + row, logsumexp + token * heads, dout + row, dqkv + token * size.row()};
    };
    const Keys own = room(packing.longest(family), size);
    const int64_t prompt = packing.first(family);
    for (int64_t piece = prompt; piece < packing.end(family); ++piece) {
      const Rows rows = rows_of(piece);
      const Gradients at = gradients_of(piece);
      lay_keys(rows, head, size, own);
      for (int64_t first = rows.start / kColumn * kColumn; first < rows.end; first += kColumn) {
        for (int64_t query = head * size.group(); query < (head + 1) * size.group(); ++query) {
          query_gradients(rows, at, own, first, query, size);
        }
      }
      if (piece != prompt) write_keys(rows, at, own, head, size);
    }
    write_keys(rows_of(prompt), gradients_of(prompt), own, head, size);
  }
}
}
