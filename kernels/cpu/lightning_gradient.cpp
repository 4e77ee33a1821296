// The backward of lightning attention: one walk over a sequence's chunks from the last to the first.
//
// With P = (Q K^T) . M, dP = (dO V^T) . M, S the state before the chunk and G the gradient of the state after it:
//   dQ = dP K + diag(lq) dO S^T,   dK = dP^T Q + diag(lk) V G^T,   dV = P^T dO + diag(lk) K G,
//   G of the chunk before = lam G + Q^T diag(lq) dO,
// then SiLU's derivative. P is worked out again; S was kept.
#include "lightning.h"

using namespace cispo;
using namespace cispo::lightning;

namespace {

struct alignas(64) Backward {
  float q[kChunk * kRow], k[kChunk * kRow], v[kChunk * kRow], dout[kChunk * kRow], gradient[kChunk * kRow];
  float q_slope[kChunk * kRow], k_slope[kChunk * kRow], v_slope[kChunk * kRow];
  float transposed[kMaximumDim * kChunk], p[kChunk * kChunk], dp[kChunk * kChunk];
  float after[kMaximumDim * kMaximumDim], square[kMaximumDim * kMaximumDim];
};

void load_rows(const float* from, int64_t row, int64_t n, int64_t dim, int64_t ahead, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      __builtin_prefetch(from + i * row + d + ahead, 0, 2);
      store(to + i * kRow + d, load(from + i * row + d));
    }
  }
  clear(to, n, round_up(n, kLanes), dim);
}

// out = (A B^T) . M for the rows of a chunk, up to the diagonal.
void causal_products(const float* a, const float* b, int64_t n, int64_t dim, Decays decay, float* transposed,
                     float* out) {
  transpose(round_up(n, kLanes), dim, b, kRow, transposed, kChunk);
  multiply<kRow, 1>(n, a, transposed, kChunk, earlier_keys(dim), [=](int64_t i, int64_t j, Vec x) {
    store(out + i * kChunk + j, x * decay.within(i, j));
  });
}

// out += diag(decay) A B.
void add_decayed(const float* a, const float* b, int64_t n, int64_t dim, const float* decay, float* out) {
  multiply<kRow, 1>(n, a, b, dim, over_all(dim, dim), [=](int64_t i, int64_t d, Vec x) {
    store(out + i * kRow + d, fma(fill(decay[i]), x, load(out + i * kRow + d)));
  });
}

void write_gradient(const float* gradient, const float* slope, int64_t n, int64_t dim, float* dx, int64_t dx_row) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < dim; d += kLanes)
      store(dx + i * dx_row + d, load(gradient + i * kRow + d) * load(slope + i * kRow + d));
}

void backward(const float* x, int64_t x_row, const float* dout, int64_t dout_row, int64_t length, int64_t dim,
              Decays decay, const float* states, int64_t states_chunk, float* dx, int64_t dx_row) {
  Backward& own = workspace<Backward>();
  const auto keep = [&](int64_t i, int64_t d, Vec gradient) { store(own.gradient + i * kRow + d, gradient); };
  const float* query_decay = decay.table + 2 * kChunk;
  const int64_t chunks = round_up(length, kChunk) / kChunk;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const bool is_first = chunk == 0, is_last = chunk == chunks - 1;
    const int64_t begin = chunk * kChunk, n = std::min(kChunk, length - begin);
    const float* from = x + begin * x_row;
    float* to = dx + begin * dx_row;
    // From these rows to those read next: the chunk's before, or the next head's last ones.
    const auto ahead = [=](int64_t head, int64_t row) {
      return is_first ? head + (chunks - 1) * kChunk * row : -kChunk * row;
    };
    load_silu(from, x_row, 0, n, dim, ahead(3 * dim, x_row), own.q, own.q_slope);
    load_silu(from + dim, x_row, 0, n, dim, ahead(3 * dim, x_row), own.k, own.k_slope);
    load_silu(from + 2 * dim, x_row, 0, n, dim, ahead(3 * dim, x_row), own.v, own.v_slope);
    load_rows(dout + begin * dout_row, dout_row, n, dim, ahead(dim, dout_row), own.dout);
    causal_products(own.q, own.k, n, dim, decay, own.transposed, own.p);
    causal_products(own.dout, own.v, n, dim, decay, own.transposed, own.dp);

    multiply<1, kChunk>(n, own.p, own.dout, kRow, over_later(n, dim), keep);
    if (!is_last) add_decayed(own.k, own.after, n, dim, decay.key(), own.gradient);
    write_gradient(own.gradient, own.v_slope, n, dim, to + 2 * dim, dx_row);

    multiply<1, kChunk>(n, own.dp, own.q, kRow, over_later(n, dim), keep);
    if (!is_last) {
      transpose(dim, dim, own.after, dim, own.square, dim);
      add_decayed(own.v, own.square, n, dim, decay.key(), own.gradient);
    }
    write_gradient(own.gradient, own.k_slope, n, dim, to + dim, dx_row);

    multiply<kChunk, 1>(n, own.dp, own.k, kRow, over_earlier(dim), keep);
    if (!is_first) {
      transpose(dim, dim, states + chunk * states_chunk, dim, own.square, dim);
      add_decayed(own.dout, own.square, n, dim, query_decay, own.gradient);
    }
    write_gradient(own.gradient, own.q_slope, n, dim, to, dx_row);

    if (is_first) continue;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < dim; d += kLanes)
        store(own.dout + i * kRow + d, load(own.dout + i * kRow + d) * fill(query_decay[i]));
    const Vec over_chunk = fill(decay.chunk());
    multiply<1, kRow>(dim, own.q, own.dout, kRow, over_all(n, dim), [&](int64_t i, int64_t j, Vec gradient) {
      float* after = own.after + i * dim + j;
      store(after, is_last ? gradient : fma(over_chunk, load(after), gradient));
    });
  }
}

}  // namespace

extern "C" {

// dout [N, H D], states as the forward left them, dx in x's order.
void cispo_lightning_backward(const float* x, int64_t x_row, const int64_t* lengths, const float* decays,
                              const float* states, const float* dout, float* dx, int64_t dx_row, int64_t sequences,
                              int64_t heads, int64_t dim, int64_t threads) {
  const std::vector<Task> all = tasks(lengths, sequences, heads);
  const int64_t at_a_time = tasks_at_a_time(static_cast<int64_t>(all.size()), heads, threads);
  const int64_t inner = heads * dim;
#pragma omp parallel for schedule(dynamic, at_a_time) num_threads(threads)
  for (const Task& task : all) {
    const int64_t head = task.head, token = task.first_token;
    backward(x + token * x_row + head * 3 * dim, x_row, dout + token * inner + head * dim, inner, task.length, dim,
             {decays + head * kDecayTable}, states + (task.first_chunk * heads + head) * dim * dim, inner * dim,
             dx + token * dx_row + head * 3 * dim, dx_row);
  }
}
}
