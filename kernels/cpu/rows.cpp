// Rows picked from a table, and what a projection needs before attention: its bias, and the norms of its heads.
//
// One thread: a decode step has few rows, and there is next to nothing to compute.
#include "replay.h"
#include "rms.h"

using namespace cispo;

extern "C" {

// out [N, width]: the rows ids [N] of table.
void cispo_select_rows(const float* table, const int64_t* ids, float* out, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * width, table + ids[i] * width, width * sizeof(float));
}

void cispo_add_bias(const float* x, const float* bias, float* y, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i, x += width, y += width) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const int64_t lanes = std::min(kLanes, width - j);
      store_first(y + j, load_first(x + j, lanes) + load_first(bias + j, lanes), lanes);
    }
  }
}

// The RMSNorm of each query and key head of a projection [N, (heads + 2 key_heads) dim]; values as they are.
void cispo_head_norms(const float* x, const float* q_weight, const float* k_weight, float epsilon, float* y, int64_t n,
                      int64_t heads, int64_t key_heads, int64_t dim) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t head = 0; head < heads + key_heads; ++head, x += dim, y += dim) {
      norm_row(x, head < heads ? q_weight : k_weight, epsilon, y, dim);
    }
    std::memcpy(y, x, key_heads * dim * sizeof(float));
    x += key_heads * dim;
    y += key_heads * dim;
  }
}
}

CISPO_REPLAY(select_rows)
CISPO_REPLAY(add_bias)
CISPO_REPLAY(head_norms)
