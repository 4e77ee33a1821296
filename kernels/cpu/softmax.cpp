// Causal softmax attention of packed rows with rotary embedding inside: training forward and prefill.
#include "softmax.h"

using namespace cispo;
using namespace cispo::softmax;

namespace {

// Keys [dim, 64] and values [64, dim] of one key head by tiles: pages of a cache, or scratch if pages is null.
struct Tiles {
  float* keys;
  float* values;
  int64_t step;  // from a tile to the next
  const int64_t* pages;

  int64_t offset(int64_t j) const { return (pages ? pages[j] : j) * step; }
};

// Rotate the keys of some rows and lay keys and values in their tiles. Keys past the last are zero; values are not
// touched, and neither is what lies before the first row.
void fill_tiles(const Rows& rows, int64_t head, const Attention& size, const Tiles& tiles) {
  alignas(64) float rotated[kColumn * kLargestDim];
  const int64_t stop = (rows.end + kKeyTile - 1) / kKeyTile * kKeyTile;
  for (int64_t first = rows.start / kColumn * kColumn; first < stop; first += kColumn) {
    const auto [from, until] = rows.rotated(first, size.key(head), size, 1.0f, rotated);
    const int64_t tile = tiles.offset(first / kKeyTile), row = first % kKeyTile;
    float* keys = tiles.keys + tile + row;
    if (from == 0) {
      transpose_rows(rotated, size.dim, keys, kKeyTile);
    } else {
      for (int64_t d = 0; d < size.dim; ++d)
        for (int64_t i = from; i < kColumn; ++i) keys[d * kKeyTile + i] = rotated[i * size.dim + d];
    }
    for (int64_t i = from; i < until; ++i) {
      copy_row(rows.qkv + (first + i - rows.start) * size.row() + size.value(head), size.dim,
               tiles.values + tile + (row + i) * size.dim);
    }
  }
}

// 16 queries of one head that start at a multiple of 16 in their sequence.
struct Column {
  alignas(64) float query[kLargestDim * kColumn];  // [dim, 16], rotated and scaled
  alignas(64) float out[kLargestDim * kColumn];    // [dim, 16], not yet divided by total
  alignas(64) float weights[kKeyTile * kColumn];   // [64, 16], scores before they are weights
  Vec largest, total;
};

// Scores of keys first .. first + 15 of a tile; the largest so far.
template <bool IsLast>
Vec score(Column& column, const float* keys, int64_t first, int64_t dim, Vec largest) {
  float* scores = column.weights + first * kColumn;
  tile<1>(
      keys + first, kKeyTile, column.query, kColumn, dim, [](int) { return Vec{}; },
      [&](int i, Vec row) {
        if (IsLast) row = select(visible(i), row, fill(-INFINITY));
        largest = max(largest, row);
        store(scores + i * kColumn, row);
      });
  return largest;
}

// exp(scores - largest) in place, and each query's sum in the tree of `sum`: lanes of a Vec there are rows here.
Vec weigh(float* weights, int64_t groups, Vec largest) {
  Vec part[kLanes];
  for (int64_t group = 0; group < groups; ++group, weights += kLanes * kColumn) {
    for (int i = 0; i < kLanes; ++i) {
      const Vec weight = exp(load(weights + i * kColumn) - largest);
      store(weights + i * kColumn, weight);
      part[i] = group ? part[i] + weight : weight;
    }
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

// Take in a tile: `groups` times 16 keys, of which the first `count` exist. In the column's last tile the last 16 keys
// are those of its own positions.
void absorb(Column& column, const float* keys, const float* values, int64_t groups, int64_t count, bool is_last,
            const Attention& size) {
  Vec largest = column.largest;
  for (int64_t group = 0; group < groups - is_last; ++group) {
    largest = score<false>(column, keys, group * kLanes, size.dim, largest);
  }
  if (is_last) largest = score<true>(column, keys, (groups - 1) * kLanes, size.dim, largest);
  const Vec keep = exp(column.largest - largest);
  column.total = fma(column.total, keep, weigh(column.weights, groups, largest));
  column.largest = largest;
  for (int64_t d = 0; d < size.dim; d += kLanes) {
    float* out = column.out + d * kColumn;
    tile<1>(
        values + d, size.dim, column.weights, kColumn, count, [=](int i) { return load(out + i * kColumn) * keep; },
        [=](int i, Vec row) { store(out + i * kColumn, row); });
  }
}

// Queries first .. first + 15 of a sequence and head, as far as they are there. out and logsumexp (or null) begin at the
// first row.
void attend(const Rows& own, int64_t first, int64_t head, const Attention& size, const Tiles& tiles, float* out,
            float* logsumexp) {
  Column column;
  alignas(64) float rotated[kColumn * kLargestDim];
  const auto [from, until] = own.rotated(first, size.query(head), size, size.scale(), rotated);
  const int64_t last = first / kKeyTile, begin = first % kKeyTile, shift = first - own.start;
  transpose_rows(rotated, size.dim, column.query, kColumn);
  std::fill(column.out, column.out + size.dim * kColumn, 0.0f);
  column.largest = fill(-INFINITY);
  column.total = Vec{};
  for (int64_t j = 0; j <= last; ++j) {
    absorb(column, tiles.keys + tiles.offset(j), tiles.values + tiles.offset(j),
           j < last ? kKeyTile / kLanes : begin / kLanes + 1, j < last ? kKeyTile : begin + until, j == last, size);
  }
  for (int64_t d = 0; d < size.dim; d += kLanes) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = load(column.out + (d + i) * kColumn) / column.total;
    transpose(block);
    for (int64_t i = from; i < until; ++i) store(out + ((shift + i) * size.heads + head) * size.dim + d, block[i]);
  }
  if (!logsumexp) return;
  float largest[kColumn], total[kColumn];
  store(largest, column.largest);
  store(total, column.total);
  for (int64_t i = from; i < until; ++i) {
    logsumexp[(shift + i) * size.heads + head] = largest[i] + std::log(total[i]);
  }
}

}  // namespace

extern "C" {

// qkv: [N, (heads + 2 key_heads) dim]; rotary: [N, 2, half]; ends, starts, families: see Packing. out: [N, heads, dim];
// logsumexp: [N, heads] for the backward, or null. k_pages [pages, key_heads, dim, 64] and v_pages [pages, key_heads, 64,
// dim] keep the keys and values of family b, then one piece, in pages pages[b * pages_row ..], where those before its start
// are already; or they are null. Branches are laid after their prompt's keys in turn.
void cispo_softmax_forward(const float* qkv, const float* rotary, const int64_t* ends, const int64_t* starts,
                           const int64_t* families, int64_t family_count, int64_t heads, int64_t key_heads, int64_t dim,
                           int64_t half, float* out, float* logsumexp, float* k_pages, float* v_pages,
                           const int64_t* pages, int64_t pages_row, int64_t threads) {
  const Attention size{heads, key_heads, dim, half};
  const Packing packing{ends, starts, families};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t unit = 0; unit < family_count * key_heads; ++unit) {
    const int64_t family = unit / key_heads, head = unit % key_heads;
    Tiles tiles;
    if (k_pages) {
      tiles = {k_pages + head * size.tile(), v_pages + head * size.tile(), key_heads * size.tile(),
               pages + family * pages_row};
    } else {
      const int64_t floats = (packing.longest(family) + kKeyTile - 1) / kKeyTile * size.tile();
      float* scratch = aligned_scratch(2 * floats);
      tiles = {scratch, scratch + floats, size.tile(), nullptr};
    }
    for (int64_t piece = packing.first(family); piece < packing.end(family); ++piece) {
      const int64_t token = ends[piece], start = starts[piece];
      const Rows rows{qkv + token * size.row(), rotary + token * 2 * half, start, packing.piece_end(piece)};
      fill_tiles(rows, head, size, tiles);
      for (int64_t query = head * size.group(); query < (head + 1) * size.group(); ++query) {
        for (int64_t first = start / kColumn * kColumn; first < rows.end; first += kColumn) {
          attend(rows, first, query, size, tiles, out + token * heads * dim,
                 logsumexp ? logsumexp + token * heads : nullptr);
        }
      }
    }
  }
}
}
