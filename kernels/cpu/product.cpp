// x W^T and its gradients, for x [N, K] with rows x_row apart and W [M, K].
#include "gemm.h"
#include "replay.h"

using namespace cispo;

namespace {

constexpr int64_t kRowBlock = 4 * 12;
// Rows whose outer products are added up by themselves before they join a weight's gradient: what is at hand stays in
// cache, and sums of sums round less.
constexpr int64_t kGradientRows = 128;

int64_t blocks(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// y [N, M] = x B for a packed B [K, M], in blocks of rows and panels that any thread may take.
void multiply_blocks(const float* x, int64_t x_row, const float* packed, float* y, int64_t n, int64_t k, int64_t m,
                     int64_t threads) {
  const bool few = n < kRowBlock * 2 * threads;
  const int64_t panels_a_block = few ? std::max<int64_t>(1, panels(m) / (2 * threads)) : panels(m);
  const int64_t across = blocks(panels(m), panels_a_block), units = blocks(n, kRowBlock) * across;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t row = unit / across * kRowBlock, panel = unit % across * panels_a_block, column = panel * kPanel;
    multiply_packed(std::min(kRowBlock, n - row), std::min(panels_a_block * kPanel, m - column), k,
                    {x + row * x_row, x_row, 1}, packed + panel * k * kPanel, y + row * m + column, m);
  }
}

void pack_panels(Matrix b, int64_t depth, int64_t columns, float* packed, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t panel = 0; panel < panels(columns); ++panel) pack_panel(b, depth, columns, panel, packed);
}

}  // namespace

extern "C" {

// `matrices` matrices W [M, K], one after the other; packed: packed_size(K, M) floats each.
void cispo_pack_weight(const float* w, float* packed, int64_t matrices, int64_t m, int64_t k, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t unit = 0; unit < matrices * panels(m); ++unit) {
    const int64_t matrix = unit / panels(m);
    pack_panel({w + matrix * m * k, 1, k}, k, m, unit % panels(m), packed + matrix * packed_size(k, m));
  }
}

void cispo_product(const float* x, int64_t x_row, const float* packed, float* y, int64_t n, int64_t k, int64_t m,
                   int64_t threads) {
  multiply_blocks(x, x_row, packed, y, n, k, m, threads);
}

// dx [N, K] = dy W.
void cispo_product_input_gradient(const float* dy, const float* w, float* dx, int64_t n, int64_t k, int64_t m,
                                  int64_t threads) {
  std::vector<float> packed(packed_size(m, k));
  pack_panels({w, k, 1}, m, k, packed.data(), threads);
  multiply_blocks(dy, m, packed.data(), dx, n, m, k, threads);
}

// dw [M, K] = dy^T x: each thread owns rows of dw and walks all rows of x in order.
void cispo_product_weight_gradient(const float* dy, const float* x, int64_t x_row, float* dw, int64_t n, int64_t k,
                                   int64_t m, int64_t threads) {
  const int64_t rows = std::min<int64_t>(kRowBlock, blocks(m, threads));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t row = 0; row < m; row += rows) {
    for (int64_t first = 0; first < n; first += kGradientRows) {
      multiply(std::min(rows, m - row), k, std::min(kGradientRows, n - first), {dy + first * m + row, 1, m},
               x + first * x_row, x_row, dw + row * k, k, first ? Write::kAdd : Write::kSet);
    }
  }
}
}

CISPO_REPLAY(product)
CISPO_REPLAY(pack_weight)
