// One token of each sequence against its pages: rotary embedding, the token's key and value into their page, attention.
//
// Keys lie in the lanes for scores and weights, dims for outputs; the sums are those of softmax.cpp. A weight that is
// masked there is zero and leaves a sum as it is; here it is left out.
#include "replay.h"
#include "softmax.h"

using namespace cispo;
using namespace cispo::softmax;

namespace {

constexpr int64_t kGroups = kKeyTile / kLanes;
// Multiply-adds below which waking other threads costs more than it saves.
constexpr int64_t kParallelWork = 1 << 15;

// Scores of Groups * 16 keys for Heads queries, dim apart.
template <int Heads, int Groups>
void score(const float* query, const float* keys, int64_t dim, Vec (*scores)[kGroups]) {
  Vec total[Heads][Groups];
#pragma GCC unroll 2
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
    for (int g = 0; g < Groups; ++g) total[h][g] = Vec{};
  for (int64_t d = 0; d < dim; ++d, keys += kKeyTile) {
#pragma GCC unroll 2
    for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
      for (int g = 0; g < Groups; ++g) {
        total[h][g] = fma(fill(query[h * dim + d]), load(keys + g * kLanes), total[h][g]);
      }
  }
#pragma GCC unroll 2
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 4
    for (int g = 0; g < Groups; ++g) scores[h][g] = total[h][g];
}

// out = out * keep + weights values, for Vecs * 16 dims of Heads queries.
template <int Heads, int Vecs>
void add_values(const float (*weights)[kKeyTile], const float* keep, const float* values, int64_t count, int64_t dim,
                float* out) {
  Vec total[Heads][Vecs];
#pragma GCC unroll 2
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) total[h][v] = load(out + h * dim + v * kLanes) * fill(keep[h]);
  for (int64_t key = 0; key < count; ++key, values += dim) {
#pragma GCC unroll 2
    for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 2
      for (int v = 0; v < Vecs; ++v) {
        total[h][v] = fma(fill(weights[h][key]), load(values + v * kLanes), total[h][v]);
      }
  }
#pragma GCC unroll 2
  for (int h = 0; h < Heads; ++h)
#pragma GCC unroll 2
    for (int v = 0; v < Vecs; ++v) store(out + h * dim + v * kLanes, total[h][v]);
}

// Heads queries [Heads, dim], rotated and scaled, against the first `keys` keys of a sequence; out: [Heads, dim].
template <int Heads>
void attend(const float* query, const float* k_pages, const float* v_pages, const int64_t* pages, int64_t page_step,
            int64_t keys, int64_t dim, float* out) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float largest[Heads], total[Heads], keep[Heads];
  alignas(64) float weights[Heads][kKeyTile];
  for (int h = 0; h < Heads; ++h) {
    largest[h] = -INFINITY;
    total[h] = 0.0f;
  }
  std::fill(out, out + Heads * dim, 0.0f);
  for (int64_t first = 0; first < keys; first += kKeyTile, ++pages) {
    const int64_t count = std::min(kKeyTile, keys - first), groups = (count + kLanes - 1) / kLanes;
    const float* page = k_pages + *pages * page_step;
    Vec scores[Heads][kGroups];
    switch (groups) {
      case 1: score<Heads, 1>(query, page, dim, scores); break;
      case 2: score<Heads, 2>(query, page, dim, scores); break;
      case 3: score<Heads, 3>(query, page, dim, scores); break;
      default: score<Heads, 4>(query, page, dim, scores);
    }
    const IntVec exists = lane < static_cast<int32_t>(count - (groups - 1) * kLanes);
    for (int h = 0; h < Heads; ++h) {
      scores[h][groups - 1] = select(exists, scores[h][groups - 1], fill(-INFINITY));
      Vec best = scores[h][0];
      for (int64_t g = 1; g < groups; ++g) best = max(best, scores[h][g]);
      const float before = largest[h];
      largest[h] = std::max(before, maximum(best));
      keep[h] = exp(fill(before - largest[h]))[0];
      Vec part = {};
      for (int64_t g = 0; g < groups; ++g) {
        const Vec weight = exp(scores[h][g] - fill(largest[h]));
        store(weights[h] + g * kLanes, weight);
        part = g ? part + weight : weight;
      }
      total[h] = fma(fill(total[h]), fill(keep[h]), fill(sum(part)))[0];
    }
    const float* values = v_pages + *pages * page_step;
    int64_t d = 0;
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
      add_values<Heads, 2>(weights, keep, values + d, count, dim, out + d);
    }
    if (d < dim) add_values<Heads, 1>(weights, keep, values + d, count, dim, out + d);
  }
  for (int h = 0; h < Heads; ++h) {
    for (int64_t d = h * dim; d < (h + 1) * dim; d += kLanes) store(out + d, load(out + d) / fill(total[h]));
  }
}

}  // namespace

extern "C" {

// qkv: [sequences, (heads + 2 key_heads) dim]; rotary: [sequences, 2, half]; position: of each token, from 0; its key and
// those before it lie in the pages at page_table[b * table_row ..], laid out as in cispo_softmax_forward. out:
// [sequences, heads, dim].
void cispo_softmax_decode(const float* qkv, const float* rotary, int64_t sequences, int64_t heads, int64_t key_heads,
                          int64_t dim, int64_t half, float* k_pages, float* v_pages, const int64_t* page_table,
                          int64_t table_row, const int64_t* position, float* out, int64_t threads) {
  const Attention size{heads, key_heads, dim, half};
  const int64_t page_step = key_heads * size.tile();
  int64_t keys = 0;
  for (int64_t b = 0; b < sequences; ++b) keys += position[b] + 1;
  if (2 * keys * heads * dim < kParallelWork) threads = 1;
#pragma omp parallel for schedule(dynamic, 2) num_threads(threads)
  for (int64_t unit = 0; unit < sequences * key_heads; ++unit) {
    const int64_t b = unit / key_heads, head = unit % key_heads;
    const int64_t* pages = page_table + b * table_row;
    const float* token = qkv + b * size.row();
    const float* angle = rotary + b * 2 * half;
    float* own_keys = k_pages + head * size.tile();
    float* own_values = v_pages + head * size.tile();
    const int64_t row = position[b] % kKeyTile, page = pages[position[b] / kKeyTile] * page_step;
    alignas(64) float rotated[2 * kLargestDim];
    rotate(token + size.key(head), angle, size, 1.0f, rotated);
    for (int64_t d = 0; d < dim; ++d) own_keys[page + d * kKeyTile + row] = rotated[d];
    copy_row(token + size.value(head), dim, own_values + page + row * dim);
    const int64_t end = (head + 1) * size.group();
    for (int64_t query = head * size.group(); query < end; query += 2) {
      float* to = out + (b * heads + query) * dim;
      rotate(token + size.query(query), angle, size, size.scale(), rotated);
      if (query + 1 < end) {
        rotate(token + size.query(query + 1), angle, size, size.scale(), rotated + dim);
        attend<2>(rotated, own_keys, own_values, pages, page_step, position[b] + 1, dim, to);
      } else {
        attend<1>(rotated, own_keys, own_values, pages, page_step, position[b] + 1, dim, to);
      }
    }
  }
}
}

CISPO_REPLAY(softmax_decode)
