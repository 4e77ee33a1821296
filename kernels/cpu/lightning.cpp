// Lightning attention of packed sequences and of one more token, in one arithmetic.
//
// For query i of a chunk, key j <= i and S the state before the chunk:
//   p_ij = (chain over d of q_id k_jd) M_ij,   o_i = lq_i (chain over d of q_id S_d) + (chain over j of p_ij v_j),
// the last addition and multiplication rounded once. After a full chunk S = lam S + (chain over j of (lk_j k_j)^T v_j),
// again rounded once. Terms of keys past the query are p = 0 and change nothing. See cispo.kernels.lightning_attention.
#include "lightning.h"
#include "replay.h"

using namespace cispo;
using namespace cispo::lightning;

namespace {

struct alignas(64) Forward {
  float q[kChunk * kRow], k[kChunk * kRow], v[kChunk * kRow];
  float k_transposed[kMaximumDim * kChunk], scores[kChunk * kChunk], state[kMaximumDim * kMaximumDim];
};

// What decode and branches go on from, for one head of one sequence: state [D, D], keys [D, C] and values [C, D] since.
struct Cache {
  float *state, *k_recent, *v_recent;
};

// The cache that a prompt leaves to the branches packed with it.
struct alignas(64) Prompt {
  float state[kMaximumDim * kMaximumDim], k_recent[kMaximumDim * kChunk], v_recent[kChunk * kMaximumDim];
  Cache cache() { return {state, k_recent, v_recent}; }
};

// Rows 0 .. first - 1 of the chunk that the cache was left in: their keys and values.
void recall(Cache cache, int64_t first, int64_t dim, Forward& own) {
  for (int64_t d = 0; d < dim; ++d)
    std::memcpy(own.k_transposed + d * kChunk, cache.k_recent + d * kChunk, first * sizeof(float));
  for (int64_t j = 0; j < first; ++j) std::memcpy(own.v + j * kRow, cache.v_recent + j * dim, dim * sizeof(float));
}

// Leave the state before an unfinished chunk (null where it is zero), and its rows first .. end - 1.
void keep(const float* state, const Forward& own, int64_t first, int64_t end, int64_t dim, Cache cache) {
  if (!state) std::memset(cache.state, 0, dim * dim * sizeof(float));
  else if (state != cache.state) std::memcpy(cache.state, state, dim * dim * sizeof(float));
  for (int64_t d = 0; d < dim; ++d)
    std::memcpy(cache.k_recent + d * kChunk + first, own.k_transposed + d * kChunk + first, (end - first) * sizeof(float));
  for (int64_t j = first; j < end; ++j) std::memcpy(cache.v_recent + j * dim, own.v + j * kRow, dim * sizeof(float));
}

// after = lam before + (diag(lk) K)^T V for a full chunk; before is null where it is zero, and may be `after`.
void add_chunk(const float* k_transposed, const float* v, int64_t v_row, int64_t dim, Decays decay, const float* before,
               float* after) {
  alignas(64) float k_decayed[kMaximumDim * kChunk];
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t j = 0; j < kChunk; j += kLanes)
      store(k_decayed + d * kChunk + j, load(k_transposed + d * kChunk + j) * load(decay.key() + j));
  const Vec over_chunk = fill(decay.chunk());
  multiply<kChunk, 1>(dim, k_decayed, v, v_row, over_all(kChunk, dim), [=](int64_t i, int64_t j, Vec x) {
    store(after + i * dim + j, before ? fma(over_chunk, load(before + i * dim + j), x) : x);
  });
}

// Rows start .. start + length - 1 of a sequence; x and out begin at row `start`. A start past 0 goes on from the cache.
// states, where given, takes the state before every chunk but the first of a sequence, `states_chunk` apart. leaves:
// whether the cache takes what comes after the last row.
void forward(const float* x, int64_t x_row, int64_t start, int64_t length, int64_t dim, Decays decay, float* out,
             int64_t out_row, float* states, int64_t states_chunk, const Cache* cache, bool leaves) {
  Forward& own = workspace<Forward>();
  const float* state = start >= kChunk ? cache->state : nullptr;
  if (state && states) std::memcpy(states, state, dim * dim * sizeof(float));
  // Rows of a chunk: those before `first` are in the cache, those from `end` on are not there yet.
  for (int64_t begin = -(start % kChunk); begin < length; begin += kChunk) {
    const int64_t first = std::max<int64_t>(0, -begin), end = std::min(kChunk, length - begin), n = end - first;
    const bool is_last = begin + end == length;
    const float* rows = x + (begin + first) * x_row;
    // From these rows to those read next: the next chunk's, or the next head's first.
    const int64_t ahead = is_last ? 3 * dim - (begin + first) * x_row : n * x_row;
    load_silu(rows, x_row, first, n, dim, ahead, own.q);
    load_silu(rows + dim, x_row, first, n, dim, ahead, own.k);
    load_silu(rows + 2 * dim, x_row, first, n, dim, ahead, own.v);
    transpose(round_up(end, kLanes), dim, own.k, kRow, own.k_transposed, kChunk);
    if (first) recall(*cache, first, dim, own);
    multiply<kRow, 1>(end, own.q, own.k_transposed, kChunk, earlier_keys(dim), [&](int64_t i, int64_t j, Vec score) {
      store(own.scores + i * kChunk + j, score * decay.within(i, j));
    });
    float* to = out + (begin + first) * out_row;
    multiply<kChunk, 1>(end, own.scores, own.v, kRow, over_earlier(dim), [=](int64_t i, int64_t d, Vec inner) {
      if (i >= first && i < end) store(to + (i - first) * out_row + d, inner);
    });
    if (state) {
      multiply<kRow, 1>(end, own.q, state, dim, over_all(dim, dim), [=](int64_t i, int64_t d, Vec carried) {
        if (i < first || i >= end) return;
        float* row = to + (i - first) * out_row + d;
        store(row, fma(fill(decay.query(i)), carried, load(row)));
      });
    }
    if (states) states += states_chunk;
    if (end == kChunk && (!is_last || leaves)) {
      float* after = is_last ? cache->state : states ? states : own.state;
      add_chunk(own.k_transposed, own.v, kRow, dim, decay, state, after);
      state = after;
    } else if (is_last && leaves) {
      keep(state, own, first, end, dim, *cache);
    }
  }
}

void decode(const float* x, int64_t row, int64_t dim, Decays decay, Cache cache, float* out) {
  alignas(64) float q[kMaximumDim], k[kMaximumDim], scores[kChunk];
  float* v = cache.v_recent + row * dim;
  for (int64_t d = 0; d < dim; d += kLanes) {
    store(q + d, silu(load(x + d)));
    store(k + d, silu(load(x + dim + d)));
    store(v + d, silu(load(x + 2 * dim + d)));
  }
  for (int64_t d = 0; d < dim; ++d) cache.k_recent[d * kChunk + row] = k[d];
  multiply_row(q, cache.k_recent, kChunk, dim, round_up(row + 1, kLanes), [&](int64_t j, Vec score) {
    store(scores + j, score * decay.within(row, j));
  });
  multiply_row(q, cache.state, dim, dim, dim, [=](int64_t d, Vec carried) { store(out + d, carried); });
  multiply_row(scores, cache.v_recent, dim, row + 1, dim, [=](int64_t d, Vec inner) {
    store(out + d, fma(fill(decay.query(row)), load(out + d), inner));
  });
  if (row == kChunk - 1) add_chunk(cache.k_recent, cache.v_recent, dim, dim, decay, cache.state, cache.state);
}

// Asks for what a decode of this row will read: the caches of many sequences lie far apart in memory.
void fetch(Cache cache, int64_t row, int64_t dim) {
  for (int64_t at = 0; at < dim * dim; at += kLanes) __builtin_prefetch(cache.state + at, 1, 2);
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t j = 0; j <= row; j += kLanes) __builtin_prefetch(cache.k_recent + d * kChunk + j, 1, 2);
  for (int64_t at = 0; at < (row + 1) * dim; at += kLanes) __builtin_prefetch(cache.v_recent + at, 1, 2);
}

}  // namespace

extern "C" {

// x: rows x_row apart, head by head q, k, v, of pieces; starts: the position of each one's first row. families: where the
// pieces of each family begin, the last one's end: a prompt and the branches that go on from its end, or one piece alone.
// states [chunks, H, D, D] or null. slots: where in the caches each piece finds what it goes on from and leaves what
// decode goes on from, or null; with them every piece is a family.
void cispo_lightning_forward(const float* x, int64_t x_row, const int64_t* starts, const int64_t* lengths, int64_t count,
                             const int64_t* families, int64_t family_count, const float* decays, float* out,
                             float* states, const int64_t* slots, float* state, float* k_recent, float* v_recent,
                             int64_t heads, int64_t dim, int64_t threads) {
  const std::vector<Piece> packed = pieces(starts, lengths, count);
  const std::vector<Task> all = tasks(packed, families, family_count, heads);
  const int64_t at_a_time = tasks_at_a_time(static_cast<int64_t>(all.size()), heads, threads);
#pragma omp parallel for schedule(dynamic, at_a_time) num_threads(threads)
  for (const Task& task : all) {
    const int64_t head = task.head, matrix = dim * dim, recent = kChunk * dim;
    Cache cache{};
    if (slots) {
      const int64_t place = slots[task.first] * heads + head;
      cache = {state + place * matrix, k_recent + place * recent, v_recent + place * recent};
    } else if (task.has_branches()) {
      cache = workspace<Prompt>().cache();
    }
    for (int64_t i = task.first; i < task.end; ++i) {
      const Piece& piece = packed[i];
      forward(x + piece.first_token * x_row + head * 3 * dim, x_row, piece.start, piece.length, dim,
              {decays + head * kDecayTable}, out + (piece.first_token * heads + head) * dim, heads * dim,
              states ? states + (piece.first_chunk * heads + head) * matrix : nullptr, heads * matrix, &cache,
              slots || (task.has_branches() && i == task.first));
    }
  }
}

// rows: each token's row in its chunk. slots: the place of each token's sequence in the caches.
void cispo_lightning_decode(const float* x, int64_t x_row, const int64_t* rows, const int64_t* slots,
                            const float* decays, float* out, float* state, float* k_recent, float* v_recent,
                            int64_t sequences, int64_t heads, int64_t dim, int64_t threads) {
  const int64_t units = sequences * heads, matrix = dim * dim, recent = kChunk * dim;
  const auto cache_of = [=](int64_t unit) {
    const int64_t place = slots[unit / heads] * heads + unit % heads;
    return Cache{state + place * matrix, k_recent + place * recent, v_recent + place * recent};
  };
#pragma omp parallel for schedule(dynamic, 8) num_threads(std::min(threads, (units + 7) / 8))
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t sequence = unit / heads, head = unit % heads;
    if (unit + 1 < units) fetch(cache_of(unit + 1), rows[(unit + 1) / heads], dim);
    decode(x + sequence * x_row + head * 3 * dim, rows[sequence], dim, {decays + head * kDecayTable}, cache_of(unit),
           out + unit * dim);
  }
}
}

CISPO_REPLAY(lightning_decode)
