// The forward of a mixture of SwiGLU experts: router, choice, and y = sum_k w_k down_e(silu(gate_e x) * up_e x).
//
// A thread takes a run of tokens through the whole layer: its rows stay in cache, nothing is sorted or combined across
// threads, and a decode step is one parallel region. A token's sum is one chain over its experts in order of their
// number, and every product is one chain too, so its bits do not depend on the tokens beside it.
#include "experts.h"
#include "replay.h"

using namespace cispo;

namespace {

constexpr int64_t kRowBlock = 48;     // rows of one expert that share a panel of weights in the first cache
constexpr int64_t kExpertRows = 192;  // rows of each expert in a run of tokens: what amortises fetching its weights
constexpr int64_t kFewTokens = 128;

int64_t blocks(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

int64_t tokens_a_run(const ExpertSizes& sizes, int64_t threads) {
  const int64_t most = std::max(kFewTokens, blocks(kExpertRows * sizes.experts, sizes.choices));
  const int64_t least = std::min(blocks(sizes.tokens, threads), kFewTokens);
  return std::max<int64_t>(1, std::clamp(blocks(sizes.tokens, 4 * threads), least, most));
}

// The largest logits, equal ones by lower index.
void choose(const float* logits, int64_t experts, int64_t choices, int32_t* ids) {
  for (int64_t choice = 0; choice < choices; ++choice) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (best >= 0 && !(logits[e] > logits[best])) continue;
      if (std::find(ids, ids + choice, e) == ids + choice) best = e;
    }
    ids[choice] = static_cast<int32_t>(best);
  }
}

Vec sum_weights(const float* weight, int64_t choices) {
  Vec total{};
  for (int64_t choice = 0; choice < choices; choice += kLanes) {
    total += load_first(weight + choice, std::min(kLanes, choices - choice));
  }
  return fill(sum(total));
}

// Their softmax: that of all experts renormalised over the chosen. One whose weight is below the threshold is dropped,
// but for the heaviest: its id becomes -1, its weight 0, and the others are renormalised.
void weigh(const float* logits, int64_t choices, float threshold, int32_t* ids, float* weight) {
  int64_t heaviest = 0;
  for (int64_t choice = 0; choice < choices; ++choice) {
    weight[choice] = logits[ids[choice]];
    if (weight[choice] > weight[heaviest]) heaviest = choice;
  }
  const Vec highest = fill(weight[heaviest]);
  for (int64_t choice = 0; choice < choices; choice += kLanes) {
    const int64_t n = std::min(kLanes, choices - choice);
    store_first(weight + choice, exp(load_first(weight + choice, n, -INFINITY) - highest), n);
  }
  Vec whole = sum_weights(weight, choices);
  if (threshold > 0.0f) {
    for (int64_t choice = 0; choice < choices; ++choice) {
      if (choice != heaviest && weight[choice] / whole[0] < threshold) ids[choice] = -1, weight[choice] = 0.0f;
    }
    whole = sum_weights(weight, choices);
  }
  for (int64_t choice = 0; choice < choices; choice += kLanes) {
    const int64_t n = std::min(kLanes, choices - choice);
    store_first(weight + choice, load_first(weight + choice, n) / whole, n);
  }
}

// Entropy of the softmax over all experts, in nats: ln sum e^l - sum p l, with logits counted from the highest.
float entropy(const float* logits, int64_t experts) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const float highest = *std::max_element(logits, logits + experts);
  Vec total{}, moment{};
  for (int64_t e = 0; e < experts; e += kLanes) {
    const int64_t n = std::min(kLanes, experts - e);
    const Vec below = load_first(logits + e, n, highest) - fill(highest);
    const Vec part = select(lane < static_cast<int32_t>(n), exp(below), Vec{});
    total += part;
    moment = fma(part, below, moment);
  }
  const float whole = sum(total);
  return std::log(whole) - sum(moment) / whole;
}

struct Operands {
  const float *x, *router, *gate_up, *down, *threshold;
  const int32_t* given;
  float *y, *weight, *entropy, *saved;
  int32_t* ids;
};

// Rows of one expert, slots[0 .. rows) counted from token `first`: y += w down(silu(gate x) * up x).
void run_expert(const ExpertSizes& sizes, const Operands& of, int64_t expert, int64_t first, const int32_t* slots,
                int64_t rows, const float* weight) {
  const int64_t d = sizes.width, f = sizes.inner, panel = kRowBlock * kPanel;
  float* x = expert_scratch<0, float>(panels(d) * panel);
  float* hidden = expert_scratch<1, float>(panels(f) * panel);
  alignas(64) float left[kRowBlock * kPanel], right[kRowBlock * kPanel];
  for (int64_t i = 0; i < rows; ++i) put_row(of.x + (first + slots[i] / sizes.choices) * d, d, x, panel, i);
  const float* gate_weight = of.gate_up + 2 * expert * sizes.packed();
  const float* up_weight = gate_weight + sizes.packed();
  for (int64_t p = 0; p < panels(f); ++p) {
    const int64_t width = panel_width(f, p);
    multiply_block(rows, width, d, x, panel, gate_weight + p * d * kPanel, left, kPanel);
    multiply_block(rows, width, d, x, panel, up_weight + p * d * kPanel, right, kPanel);
    for (int64_t i = 0; i < rows; ++i) {
      float* saved = of.saved ? of.saved + 2 * ((first * sizes.choices + slots[i]) * f + p * kPanel) : nullptr;
      for (int64_t j = 0; j < width; j += kLanes) {
        const Vec gate = load(left + i * kPanel + j), up = load(right + i * kPanel + j);
        store(hidden + p * panel + i * kPanel + j, gate * sigmoid(gate) * up);
        if (saved) store(saved + j, gate), store(saved + width + j, up);
      }
    }
  }
  const float* down_weight = of.down + expert * sizes.packed_down();
  for (int64_t p = 0; p < panels(d); ++p) {
    const int64_t width = panel_width(d, p);
    multiply_block(rows, width, f, hidden, panel, down_weight + p * f * kPanel, left, kPanel);
    for (int64_t i = 0; i < rows; ++i) {
      float* y = of.y + (first + slots[i] / sizes.choices) * d + p * kPanel;
      const Vec w = fill(weight[slots[i]]);
      for (int64_t j = 0; j < width; j += kLanes) store(y + j, fma(w, load(left + i * kPanel + j), load(y + j)));
    }
  }
}

void run_tokens(const ExpertSizes& sizes, const Operands& of, int64_t first, int64_t tokens) {
  const int64_t d = sizes.width, slots = tokens * sizes.choices;
  float* logits = expert_scratch<2, float>(tokens * sizes.experts);
  float* weight = of.weight ? of.weight + first * sizes.choices : expert_scratch<3, float>(slots);
  int32_t* ids = of.ids ? of.ids + first * sizes.choices : expert_scratch<4, int32_t>(slots);
  int32_t* starts = expert_scratch<5, int32_t>(sizes.experts + 1);
  int32_t* order = expert_scratch<6, int32_t>(slots);
  multiply_packed(tokens, sizes.experts, d, {of.x + first * d, d, 1}, of.router, logits, sizes.experts);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = logits + t * sizes.experts;
    int32_t* chosen = ids + t * sizes.choices;
    if (of.given) {
      std::copy_n(of.given + (first + t) * sizes.choices, sizes.choices, chosen);
    } else {
      choose(row, sizes.experts, sizes.choices, chosen);
    }
    weigh(row, sizes.choices, of.threshold ? of.threshold[first + t] : 0.0f, chosen, weight + t * sizes.choices);
    if (of.entropy) of.entropy[first + t] = entropy(row, sizes.experts);
  }
  sort_by_expert(ids, slots, sizes.experts, starts, order);
  std::fill(of.y + first * d, of.y + (first + tokens) * d, 0.0f);
  for (int64_t e = 0; e < sizes.experts; ++e) {
    for (int64_t row = starts[e]; row < starts[e + 1]; row += kRowBlock) {
      run_expert(sizes, of, e, first, order + row, std::min<int64_t>(kRowBlock, starts[e + 1] - row), weight);
    }
  }
}

}  // namespace

extern "C" {

// x, y [N, D]. router: packed [D, E]; gate_up: packed gate and up [D, F] of each expert in turn; down: packed [F, D] of
// each. D and F are multiples of 16. Where they are not null: threshold [N], below which a chosen expert is dropped;
// given [N, K], ids to take in place of the largest logits. Filled where they are not null: ids and weight [N, K] (-1 and
// 0 of what is dropped), entropy [N] of the router, and saved [N, K, 2F] for the backward, which takes gate and up of 32
// columns in turn.
void cispo_experts(const float* x, const float* router, const float* gate_up, const float* down,
                   const float* threshold, const int32_t* given, float* y, int32_t* ids, float* weight, float* entropy,
                   float* saved, int64_t n, int64_t d, int64_t f, int64_t experts, int64_t choices, int64_t threads) {
  const ExpertSizes sizes{n, d, f, experts, choices};
  const Operands of{x, router, gate_up, down, threshold, given, y, weight, entropy, saved, ids};
  const int64_t tokens = tokens_a_run(sizes, threads), runs = blocks(n, tokens);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t run = 0; run < runs; ++run) {
    run_tokens(sizes, of, run * tokens, std::min(tokens, n - run * tokens));
  }
}
}

CISPO_REPLAY(experts)
