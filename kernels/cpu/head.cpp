// From hidden states to logprobs, entropies and policy gradients, and from logits to sampled tokens.
//
// A row of logits z = logits / temperature becomes weights e^(z - max z) and their total. Learner and sampler call the
// same function for that, so that a sampled logprob is the learner's to the last bit:
//
//     logprob_v = z_v - max z - log total        entropy = log total - sum_v weight_v (z_v - max z) / total
#include <vector>

#include "gemm.h"
#include "replay.h"

using namespace cispo;

namespace {

constexpr int64_t kRowBlock = 4 * 12;
// Rows whose outer products are added up by themselves before they join the weight's gradient, as in product.cpp.
constexpr int64_t kGradientRows = 128;
constexpr int64_t kLanesASum = 32;              // float32 sums of so many vectors are added in float64
constexpr int64_t kLogitsForThreads = 1 << 14;  // fewer are done before a second thread wakes up

template <int Lanes>
struct Doubles {
  typedef double Type __attribute__((vector_size(Lanes * sizeof(double))));
};

struct Totals {
  float largest;    // z
  double weights;   // sum of weight_v
  double weighted;  // sum of weight_v (z_v - largest), never above 0

  float logprob(float z) const { return static_cast<float>(static_cast<double>(z) - largest - std::log(weights)); }
  float entropy() const { return static_cast<float>(std::log(weights) - weighted / weights); }
};

// weights may be logits themselves.
inline Totals weigh(const float* logits, int64_t vocabulary, float temperature, float* weights) {
  Vec best = fill(-INFINITY);
  for (int64_t j = 0; j < vocabulary; j += kLanes) {
    best = max(load_first(logits + j, std::min(kLanes, vocabulary - j), -INFINITY), best);
  }
  Totals totals{maximum(best) / temperature, 0.0, 0.0};
  const Vec largest = fill(totals.largest), least = fill(-1e4f);  // at -infinity, 0 * z would be NaN
  for (int64_t first = 0; first < vocabulary; first += kLanesASum * kLanes) {
    const int64_t end = std::min(vocabulary, first + kLanesASum * kLanes);
    Vec sums{}, weighted{};
    for (int64_t j = first; j < end; j += kLanes) {
      const int64_t n = std::min(kLanes, vocabulary - j);
      Vec z = load_first(logits + j, n, -INFINITY);
      if (temperature != 1.0f) z = z / fill(temperature);
      z = z - largest;
      const Vec weight = exp(z);
      sums += weight;
      weighted = fma(weight, max(z, least), weighted);
      store_first(weights + j, weight, n);
    }
    totals.weights += static_cast<double>(sum(sums));
    totals.weighted += static_cast<double>(sum(weighted));
  }
  return totals;
}

double double_sum(Vec x) {
  const auto add = [](const auto& a, const auto& b) { return a + b; };
  const auto eight = fold<Doubles<8>::Type>(__builtin_convertvector(x, Doubles<16>::Type), add);
  const auto two = fold<Doubles<2>::Type>(fold<Doubles<4>::Type>(eight, add), add);
  return two[0] + two[1];
}

// The first token whose cumulative weight exceeds uniform times the whole; always one of positive weight. The vocabulary
// is walked by sixteens first, to add only the last of them one by one.
int64_t choose(const float* weights, int64_t vocabulary, double uniform) {
  thread_local std::vector<double> sums;
  sums.resize(static_cast<size_t>((vocabulary + kLanes - 1) / kLanes));
  double total = 0.0;
  for (int64_t j = 0; j < vocabulary; j += kLanes) {
    sums[j / kLanes] = double_sum(load_first(weights + j, std::min(kLanes, vocabulary - j)));
    total += sums[j / kLanes];
  }
  const double threshold = uniform * total;
  // Where rounding leaves no cumulative weight above the threshold, the last token of positive weight stands in.
  int64_t first = -1;
  double cumulative = 0.0, before = 0.0;
  for (int64_t j = 0; j < vocabulary && !(cumulative > threshold); j += kLanes) {
    const double sum = sums[j / kLanes];
    if (!(sum > 0.0)) continue;
    first = j;
    before = cumulative;
    cumulative += sum;
  }
  int64_t chosen = vocabulary - 1;  // where nothing is positive, for weights are not finite
  for (int64_t j = first; first >= 0 && j < std::min(first + kLanes, vocabulary); ++j) {
    if (!(weights[j] > 0.0f)) continue;
    chosen = j;
    before += static_cast<double>(weights[j]);
    if (before > threshold) break;
  }
  return chosen;
}

float* row_scratch(int64_t floats) {
  thread_local std::vector<float> scratch;
  if (scratch.size() < static_cast<size_t>(floats)) scratch.resize(static_cast<size_t>(floats));
  return scratch.data();
}

int64_t blocks(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Rows whose logits a thread keeps in its second-level cache, if they fit there.
int64_t rows_at_once(int64_t vocabulary) { return vocabulary <= 4096 ? kRowBlock : kTileRows; }

// Where a value first stands in a row; the last place if nowhere (NaN).
inline int64_t first_equal(const float* row, int64_t n, float value) {
  return std::min<int64_t>(std::find(row, row + n, value) - row, n - 1);
}

}  // namespace

extern "C" {

// packed: the head weight in panels. weights [N, V] may be null; otherwise it and totals [N] are what the gradient needs.
void cispo_head_logprobs(const float* hidden, int64_t hidden_row, const float* packed, const int64_t* targets,
                         float temperature, float* weights, float* totals, float* logprob, float* entropy, int64_t n,
                         int64_t d, int64_t v, int64_t threads) {
  const int64_t block_rows = rows_at_once(v);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t block = 0; block < blocks(n, block_rows); ++block) {
    const int64_t first = block * block_rows, rows = std::min(block_rows, n - first);
    float* logits = weights ? weights + first * v : row_scratch(block_rows * v);
    multiply_packed(rows, v, d, {hidden + first * hidden_row, hidden_row, 1}, packed, logits, v);
    for (int64_t row = first; row < first + rows; ++row, logits += v) {
      const float at_target = logits[targets[row]] / temperature;
      const Totals sums = weigh(logits, v, temperature, logits);
      logprob[row] = sums.logprob(at_target);
      entropy[row] = sums.entropy();
      if (totals) totals[row] = static_cast<float>(sums.weights);
    }
  }
}

// Of -sum_n coefficient_n logprob_n. weights becomes the gradient to the logits; dweight [V, D] is added to.
// packed: the head weight's transpose in panels.
void cispo_head_gradient(float* weights, const float* totals, const int64_t* targets, const float* coefficients,
                         float temperature, const float* hidden, int64_t hidden_row, const float* packed,
                         float* dhidden, float* dweight, int64_t n, int64_t d, int64_t v, int64_t threads) {
  const int64_t block_rows = rows_at_once(v);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t block = 0; block < blocks(n, block_rows); ++block) {
    const int64_t first = block * block_rows, rows = std::min(block_rows, n - first);
    for (int64_t row = first; row < first + rows; ++row) {
      float* gradient = weights + row * v;
      const float coefficient = coefficients[row] / temperature;
      const Vec scale = fill(coefficient / totals[row]);
      for (int64_t j = 0; j < v; j += kLanes) {
        const int64_t lanes = std::min(kLanes, v - j);
        store_first(gradient + j, load_first(gradient + j, lanes) * scale, lanes);
      }
      gradient[targets[row]] -= coefficient;
    }
    multiply_packed(rows, d, v, {weights + first * v, v, 1}, packed, dhidden + first * d, d);
  }
  const int64_t rows = std::min(kRowBlock, blocks(v, threads));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t row = 0; row < v; row += rows) {
    for (int64_t first = 0; first < n; first += kGradientRows) {
      multiply(std::min(rows, v - row), d, std::min(kGradientRows, n - first), {weights + first * v + row, 1, v},
               hidden + first * hidden_row, hidden_row, dweight + row * d, d, Write::kAdd);
    }
  }
}

// packed: packed_size(V, D) floats.
void cispo_pack_head(const float* weight, float* packed, int64_t v, int64_t d) { pack({weight, d, 1}, v, d, packed); }

// temperatures may be null: all 1. A temperature of 0 takes the first of the largest logits, with its logprob at 1. Rows
// of logits lie logits_row apart. cut [N, V] may be null: otherwise ids are drawn from it, and logprobs are of logits.
void cispo_sample(const float* logits, int64_t logits_row, const float* cut, const float* temperatures,
                  const double* uniforms, int64_t* ids, float* logprobs, int64_t n, int64_t v,
                  int64_t threads) {
  if (n * v < kLogitsForThreads) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < n; ++row) {
    const float* from = logits + row * logits_row;
    const bool is_greedy = temperatures && temperatures[row] == 0.0f;
    const float temperature = temperatures && !is_greedy ? temperatures[row] : 1.0f;
    float* weights = row_scratch(v);
    const Totals sums = weigh(from, v, temperature, weights);
    const float* drawn_from = cut ? cut + row * v : from;
    const float largest = cut ? weigh(drawn_from, v, temperature, weights).largest : sums.largest;
    const int64_t id = is_greedy ? first_equal(drawn_from, v, largest) : choose(weights, v, uniforms[row]);
    ids[row] = id;
    logprobs[row] = sums.logprob(from[id] / temperature);
  }
}
}

CISPO_REPLAY(sample)
