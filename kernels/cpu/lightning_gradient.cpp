// The backward of lightning attention: one walk over a sequence's chunks from the last to the first.
//
// With P = (Q K^T) . M, dP = (dO V^T) . M, S the state before the chunk and G the gradient of the state after it:
//   dQ = dP K + diag(lq) dO S^T,   dK = dP^T Q + diag(lk) V G^T,   dV = P^T dO + diag(lk) K G,
//   G of the chunk before = lam G + Q^T diag(lq) dO,
// then SiLU's derivative. P is worked out again; S was kept.
//
// Branches come before the prompt that they go on from, in order, and add up what is its: gradients of the keys and values
// of its unfinished chunk, which is their first one's beginning too, and of the state where they start.
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

// What the branches of one head leave to their prompt.
struct alignas(64) Branches {
  float dk[kChunk * kRow], dv[kChunk * kRow], dstate[kMaximumDim * kMaximumDim];
};

// One head of one piece, from its first row on; states as the forward left them.
struct Rows {
  const float *x, *dout, *states;
  float* dx;
  int64_t x_row, dout_row, states_chunk, dx_row;
};

// n rows into rows first .. first + n - 1 of a local matrix, zeros around them.
void load_rows(const float* from, int64_t row, int64_t first, int64_t n, int64_t dim, int64_t ahead, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      __builtin_prefetch(from + i * row + d + ahead, 0, 2);
      store(to + (first + i) * kRow + d, load(from + i * row + d));
    }
  }
  clear(to, 0, first, dim);
  clear(to, first + n, round_up(first + n, kLanes), dim);
}

// SiLU of the prompt's rows of an unfinished chunk into rows 0 .. n - 1.
void recall(const float* x, int64_t x_row, int64_t n, int64_t dim, float* to) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < dim; d += kLanes) store(to + i * kRow + d, silu(load(x + i * x_row + d)));
}

// to += from, rows 0 .. n - 1 of local matrices.
void add_rows(const float* from, int64_t n, int64_t dim, float* to) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < dim; d += kLanes)
      store(to + i * kRow + d, load(to + i * kRow + d) + load(from + i * kRow + d));
}

void add_square(const float* from, int64_t dim, float* to) {
  for (int64_t i = 0; i < dim * dim; i += kLanes) store(to + i, load(to + i) + load(from + i));
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

// Rows first .. first + n - 1 of a gradient, through SiLU, to where the piece's own rows are.
void write_gradient(const float* gradient, const float* slope, int64_t first, int64_t n, int64_t dim, float* dx,
                    int64_t dx_row) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < dim; d += kLanes)
      store(dx + i * dx_row + d, load(gradient + (first + i) * kRow + d) * load(slope + (first + i) * kRow + d));
}

// branches: what a prompt takes, or where a branch adds; null for a sequence without any. prompt: for a branch, the x of
// its prompt's unfinished chunk.
void backward(const Rows& rows, int64_t start, int64_t length, int64_t dim, Decays decay, const float* prompt,
              Branches* branches) {
  Backward& own = workspace<Backward>();
  const auto keep = [&](int64_t i, int64_t d, Vec gradient) { store(own.gradient + i * kRow + d, gradient); };
  const float* query_decay = decay.table + 2 * kChunk;
  const int64_t x_row = rows.x_row, dout_row = rows.dout_row;
  const int64_t before = start % kChunk, chunks = round_up(before + length, kChunk) / kChunk;
  const bool is_prompt = branches && !prompt, ends_full = (start + length) % kChunk == 0;
  bool has_after = is_prompt && ends_full;
  if (has_after) std::memcpy(own.after, branches->dstate, dim * dim * sizeof(float));
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const bool has_state = start / kChunk + chunk > 0, takes_rows = is_prompt && !ends_full && chunk == chunks - 1;
    const int64_t begin = chunk * kChunk - before;
    const int64_t first = std::max<int64_t>(0, -begin), end = std::min(kChunk, length - begin), n = end - first;
    const float* from = rows.x + (begin + first) * x_row;
    float* to = rows.dx + (begin + first) * rows.dx_row;
    // From these rows to those read next: the chunk's before, or the next head's last ones.
    const auto ahead = [=](int64_t head, int64_t row) {
      return chunk == 0 ? head + (chunks - 1) * kChunk * row : -kChunk * row;
    };
    load_silu(from, x_row, first, n, dim, ahead(3 * dim, x_row), own.q, own.q_slope);
    load_silu(from + dim, x_row, first, n, dim, ahead(3 * dim, x_row), own.k, own.k_slope);
    load_silu(from + 2 * dim, x_row, first, n, dim, ahead(3 * dim, x_row), own.v, own.v_slope);
    load_rows(rows.dout + (begin + first) * dout_row, dout_row, first, n, dim, ahead(dim, dout_row), own.dout);
    if (first) {
      recall(prompt + dim, x_row, first, dim, own.k);
      recall(prompt + 2 * dim, x_row, first, dim, own.v);
    }
    causal_products(own.q, own.k, end, dim, decay, own.transposed, own.p);
    causal_products(own.dout, own.v, end, dim, decay, own.transposed, own.dp);

    multiply<1, kChunk>(end, own.p, own.dout, kRow, over_later(end, dim), keep);
    if (has_after) add_decayed(own.k, own.after, end, dim, decay.key(), own.gradient);
    if (first) add_rows(own.gradient, first, dim, branches->dv);
    if (takes_rows) add_rows(branches->dv, end, dim, own.gradient);
    write_gradient(own.gradient, own.v_slope, first, n, dim, to + 2 * dim, rows.dx_row);

    multiply<1, kChunk>(end, own.dp, own.q, kRow, over_later(end, dim), keep);
    if (has_after) {
      transpose(dim, dim, own.after, dim, own.square, dim);
      add_decayed(own.v, own.square, end, dim, decay.key(), own.gradient);
    }
    if (first) add_rows(own.gradient, first, dim, branches->dk);
    if (takes_rows) add_rows(branches->dk, end, dim, own.gradient);
    write_gradient(own.gradient, own.k_slope, first, n, dim, to + dim, rows.dx_row);

    multiply<kChunk, 1>(end, own.dp, own.k, kRow, over_earlier(dim), keep);
    if (has_state) {
      transpose(dim, dim, rows.states + chunk * rows.states_chunk, dim, own.square, dim);
      add_decayed(own.dout, own.square, end, dim, query_decay, own.gradient);
    }
    write_gradient(own.gradient, own.q_slope, first, n, dim, to, rows.dx_row);

    if (!has_state) continue;
    for (int64_t i = first; i < end; ++i)
      for (int64_t d = 0; d < dim; d += kLanes)
        store(own.dout + i * kRow + d, load(own.dout + i * kRow + d) * fill(query_decay[i]));
    const Vec over_chunk = fill(decay.chunk());
    multiply<1, kRow>(dim, own.q, own.dout, kRow, over_all(end, dim), [&](int64_t i, int64_t j, Vec gradient) {
      float* after = own.after + i * dim + j;
      store(after, has_after ? fma(over_chunk, load(after), gradient) : gradient);
    });
    if (takes_rows) add_square(branches->dstate, dim, own.after);
    has_after = true;
  }
  if (prompt && start >= kChunk) add_square(own.after, dim, branches->dstate);
}

}  // namespace

extern "C" {

// As cispo_lightning_forward; dout [N, H D], states as the forward left them, dx in x's order.
void cispo_lightning_backward(const float* x, int64_t x_row, const int64_t* starts, const int64_t* lengths,
                              int64_t count, const int64_t* families, int64_t family_count, const float* decays,
                              const float* states, const float* dout, float* dx, int64_t dx_row, int64_t heads,
                              int64_t dim, int64_t threads) {
  const std::vector<Piece> packed = pieces(starts, lengths, count);
  const std::vector<Task> all = tasks(packed, families, family_count, heads);
  const int64_t at_a_time = tasks_at_a_time(static_cast<int64_t>(all.size()), heads, threads);
  const int64_t inner = heads * dim;
#pragma omp parallel for schedule(dynamic, at_a_time) num_threads(threads)
  for (const Task& task : all) {
    const int64_t head = task.head;
    const auto run = [&](int64_t i, const float* prompt, Branches* branches) {
      const Piece& piece = packed[i];
      const Rows rows{x + piece.first_token * x_row + head * 3 * dim,
                      dout + piece.first_token * inner + head * dim,
                      states + (piece.first_chunk * heads + head) * dim * dim,
                      dx + piece.first_token * dx_row + head * 3 * dim,
                      x_row,
                      inner,
                      inner * dim,
                      dx_row};
      backward(rows, piece.start, piece.length, dim, {decays + head * kDecayTable}, prompt, branches);
    };
    if (!task.has_branches()) {
      run(task.first, nullptr, nullptr);
      continue;
    }
    const Piece& prompt = packed[task.first];
    const int64_t unfinished = prompt.length / kChunk * kChunk;
    Branches& branches = workspace<Branches>();
    clear(branches.dk, 0, kChunk, dim);
    clear(branches.dv, 0, kChunk, dim);
    std::memset(branches.dstate, 0, dim * dim * sizeof(float));
    const float* shared = x + (prompt.first_token + unfinished) * x_row + head * 3 * dim;
    for (int64_t i = task.first + 1; i < task.end; ++i) run(i, shared, &branches);
    run(task.first, nullptr, &branches);
  }
}
}
