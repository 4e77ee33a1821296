// RMSNorm of a residual sum, and RMSNorm behind a sigmoid gate, each forward and backward in one pass over the rows.
//
//     h = alpha x + beta mixed          y = weight h / sqrt(mean(h^2) + epsilon)
//     y = sigmoid(gate) weight x / sqrt(mean(x^2) + epsilon)
//
// A row's sums run lane by lane and then through one tree. The backward pass reads the inputs again instead of saved
// statistics: it needs them anyway, and the sums come along while the row is in cache.
#include <vector>

#include "replay.h"
#include "rms.h"

using namespace cispo;

namespace {

constexpr int64_t kRowBlock = 64;
constexpr int64_t kAhead = 4;
constexpr int64_t kRowsForThreads = 512;  // fewer are done before a second thread wakes up

// Of fixed size whatever the threads: a block's share of dweight is a sum by itself, and shares are added in order.
int64_t row_blocks(int64_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

float* row_scratch(int64_t floats) {
  thread_local std::vector<float> scratch;
  if (scratch.size() < static_cast<size_t>(floats)) scratch.resize(static_cast<size_t>(floats));
  return scratch.data();
}

template <class Block>
void for_blocks(int64_t rows, int64_t threads, Block block) {
  if (rows < kRowsForThreads) threads = 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t index = 0; index < row_blocks(rows); ++index) {
    block(index, index * kRowBlock, std::min(rows, (index + 1) * kRowBlock));
  }
}

// The term that carries h's own norm: dh = factor g - correction h, for g = weight dy and dot = g . h.
float correction(Vec dot, float factor, int64_t width) {
  return factor * factor * factor * (sum(dot) / static_cast<float>(width));
}

// A gate's rows may lie pages apart, where the processor sees no stream to read ahead of.
void read_ahead(const float* row, int64_t width) {
  constexpr int64_t line = 16;
  for (int64_t j = 0; j < width; j += line) __builtin_prefetch(row + j);
}

struct Residual {
  const float *x, *mixed;  // mixed may be null: h = x
  float alpha, beta;

  Vec at(int64_t place, int64_t n) const {
    const Vec own = load_first(x + place, n);
    return mixed ? fma(fill(beta), load_first(mixed + place, n), fill(alpha) * own) : own;
  }
};

void add_shares(const std::vector<float>& shares, int64_t blocks, int64_t width, float* out) {
  for (int64_t j = 0; j < width; j += kLanes) {
    Vec total{};
    for (int64_t block = 0; block < blocks; ++block) total += load(shares.data() + block * padded(width) + j);
    store_first(out + j, total, std::min(kLanes, width - j));
  }
}

}  // namespace

extern "C" {

// total, where given, takes h.
void cispo_residual_norm(const float* x, const float* mixed, float alpha, float beta, const float* weight,
                         float epsilon, float* total, float* y, int64_t rows, int64_t width, int64_t threads) {
  const Residual residual{x, mixed, alpha, beta};
  for_blocks(rows, threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      float* h = total ? total + row * width : y + row * width;
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t n = std::min(kLanes, width - j);
        store_first(h + j, residual.at(row * width + j, n), n);
      }
      norm_row(h, weight, epsilon, y + row * width, width);
    }
  });
}

// dmixed is null where mixed is.
void cispo_residual_norm_gradient(const float* dy, const float* x, const float* mixed, float alpha, float beta,
                                  const float* weight, float epsilon, float* dx, float* dmixed, float* dweight,
                                  int64_t rows, int64_t width, int64_t threads) {
  const Residual residual{x, mixed, alpha, beta};
  std::vector<float> shares(static_cast<size_t>(row_blocks(rows) * padded(width)));
  for_blocks(rows, threads, [&](int64_t block, int64_t first, int64_t last) {
    float *h = row_scratch(padded(width)), *share = shares.data() + block * padded(width);
    for (int64_t row = first; row < last; ++row) {
      const int64_t start = row * width;
      Vec squares{}, dot{};
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t n = std::min(kLanes, width - j);
        const Vec value = residual.at(start + j, n);
        squares = fma(value, value, squares);
        dot = fma(load_first(dy + start + j, n) * load_first(weight + j, n), value, dot);
        store(h + j, value);
      }
      const float factor = inverse_root(squares, width, epsilon), own = correction(dot, factor, width);
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t n = std::min(kLanes, width - j);
        const Vec value = load(h + j), upstream = load_first(dy + start + j, n);
        const Vec dh = fma(fill(-own), value, fill(factor) * (upstream * load_first(weight + j, n)));
        store_first(dx + start + j, mixed ? fill(alpha) * dh : dh, n);
        if (mixed) store_first(dmixed + start + j, fill(beta) * dh, n);
        store(share + j, fma(upstream, value * fill(factor), load(share + j)));
      }
    }
  });
  add_shares(shares, row_blocks(rows), width, dweight);
}

// Rows of gate lie gate_row apart.
void cispo_gated_norm(const float* x, const float* gate, int64_t gate_row, const float* weight, float epsilon, float* y,
                      int64_t rows, int64_t width, int64_t threads) {
  for_blocks(rows, threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* from = x + row * width;
      read_ahead(gate + std::min(row + kAhead, rows - 1) * gate_row, width);
      Vec squares{};
      for (int64_t j = 0; j < width; j += kLanes) {
        const Vec value = load_first(from + j, std::min(kLanes, width - j));
        squares = fma(value, value, squares);
      }
      const Vec factor = fill(inverse_root(squares, width, epsilon));
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t n = std::min(kLanes, width - j);
        const Vec normed = load_first(from + j, n) * factor * load_first(weight + j, n);
        store_first(y + row * width + j, sigmoid(load_first(gate + row * gate_row + j, n)) * normed, n);
      }
    }
  });
}

// Rows of dgate lie dgate_row apart.
void cispo_gated_norm_gradient(const float* dy, const float* x, const float* gate, int64_t gate_row,
                               const float* weight, float epsilon, float* dx, float* dgate, int64_t dgate_row,
                               float* dweight, int64_t rows, int64_t width, int64_t threads) {
  std::vector<float> shares(static_cast<size_t>(row_blocks(rows) * padded(width)));
  for_blocks(rows, threads, [&](int64_t block, int64_t first, int64_t last) {
    float *opened = row_scratch(padded(width)), *share = shares.data() + block * padded(width);
    const Vec one = fill(1.0f);
    for (int64_t row = first; row < last; ++row) {
      const int64_t start = row * width;
      read_ahead(gate + std::min(row + kAhead, rows - 1) * gate_row, width);
      Vec squares{}, dot{};
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t n = std::min(kLanes, width - j);
        const Vec value = load_first(x + start + j, n), open = sigmoid(load_first(gate + row * gate_row + j, n));
        squares = fma(value, value, squares);
        dot = fma(load_first(dy + start + j, n) * open * load_first(weight + j, n), value, dot);
        store(opened + j, open);
      }
      const float factor = inverse_root(squares, width, epsilon), own = correction(dot, factor, width);
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t n = std::min(kLanes, width - j);
        const Vec value = load_first(x + start + j, n), open = load(opened + j), scale = load_first(weight + j, n);
        const Vec upstream = load_first(dy + start + j, n), dnormed = upstream * open, unit = value * fill(factor);
        store_first(dx + start + j, fma(fill(-own), value, fill(factor) * (dnormed * scale)), n);
        store_first(dgate + row * dgate_row + j, upstream * (unit * scale) * (open * (one - open)), n);
        store(share + j, fma(dnormed, unit, load(share + j)));
      }
    }
  });
  add_shares(shares, row_blocks(rows), width, dweight);
}
}

CISPO_REPLAY(residual_norm)
CISPO_REPLAY(gated_norm)
