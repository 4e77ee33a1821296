// The backward of a mixture of SwiGLU experts, router and choice included.
//
// Slots sorted by expert are cut into spans of equal length, fixed by the sizes alone. A thread takes a span block by
// block: gradients of gate and up, of the rows of x, and what the block adds to its expert's weight gradients, while
// all of it lies in cache. Each (span, expert) has its own sums of weight gradients; they are added in order of spans.
#include "experts.h"

using namespace cispo;

namespace {

constexpr int64_t kRowBlock = 96;
constexpr int64_t kSpans = 16;
constexpr int64_t kLeastSpan = 4 * kRowBlock;

int64_t blocks(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

struct Segment {  // slots order[first .. last) of one expert in one span, whose weight gradients go to `sums`
  int64_t expert, first, last;
  float* sums;
};

struct Operands {
  const float *dy, *x, *weight, *saved;
  const int32_t *ids, *order;
  const float *gate_up, *down;  // packed for this direction
  float *dx, *dweight;          // of each slot
};

// Depth of the product that gives dx: gate and up, each filled up with zeros to whole panels.
int64_t padded_inner(const ExpertSizes& sizes) { return 2 * panels(sizes.inner) * kPanel; }

// Weight gradients of an expert: gate and up [2F, D], then down [D, F].
int64_t gradient_size(const ExpertSizes& sizes) { return 3 * sizes.width * sizes.inner; }

// Rows of `saved` are far apart, so what the next panel needs is asked for while this one is at work.
void prefetch_saved(const float* from) {
  for (int64_t j = 0; j < 2 * kPanel; j += kLanes) __builtin_prefetch(from + j, 0, 2);
}

// silu(g) = g s has the derivative s + g s (1 - s), s = sigmoid(g). From t = dy down: gradients of gate and up, the
// weighted hidden row that down's gradient takes, and what the choice's weight gets.
void swiglu_gradient(const ExpertSizes& sizes, const Operands& of, const int32_t* slots, int64_t rows, int64_t p,
                     const float* t, float* dgate, float* dup, float* hidden, float* dots) {
  const int64_t f = sizes.inner, width = panel_width(f, p);
  for (int64_t i = 0; i < rows; ++i) {
    const float* saved = of.saved + 2 * (slots[i] * f + p * kPanel);
    const Vec w = fill(of.weight[slots[i]]), one = fill(1.0f);
    Vec dot = load(dots + i * kLanes);
    prefetch_saved(saved + 2 * kPanel);
    for (int64_t j = i * kPanel; j < i * kPanel + width; j += kLanes, saved += kLanes) {
      const Vec gate = load(saved), up = load(saved + width), s = sigmoid(gate), active = gate * s;
      const Vec down = load(t + j), product = active * up, dhidden = w * down;
      dot = fma(product, down, dot);
      store(hidden + j, w * product);
      store(dup + j, dhidden * active);
      store(dgate + j, dhidden * up * fma(active, one - s, s));
    }
    store(dots + i * kLanes, dot);
  }
}

void run_block(const ExpertSizes& sizes, const Operands& of, const Segment& segment, int64_t first, int64_t rows,
               Write write) {
  const int64_t d = sizes.width, f = sizes.inner, panel = kRowBlock * kPanel, depth = padded_inner(sizes);
  const int32_t* slots = of.order + first;
  float* x = expert_scratch<10, float>(panels(d) * panel);
  float* dy = expert_scratch<11, float>(panels(d) * panel);
  float* dgate_up = expert_scratch<12, float>(depth * kRowBlock);
  alignas(64) float t[kRowBlock * kPanel], hidden[kRowBlock * kPanel], dots[kRowBlock * kLanes] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t token = slots[i] / sizes.choices;
    prefetch_saved(of.saved + 2 * slots[i] * f);
    put_row(of.x + token * d, d, x, panel, i);
    put_row(of.dy + token * d, d, dy, panel, i);
  }
  const float* down = of.down + segment.expert * packed_size(d, f);
  for (int64_t p = 0; p < panels(f); ++p) {
    const int64_t width = panel_width(f, p), column = p * kPanel;
    float *dgate = dgate_up + p * panel, *dup = dgate_up + (panels(f) + p) * panel;
    multiply_block(rows, width, d, dy, panel, down + p * d * kPanel, t, kPanel);
    if (width < kPanel) std::fill(dgate, dgate + panel, 0.0f), std::fill(dup, dup + panel, 0.0f);
    swiglu_gradient(sizes, of, slots, rows, p, t, dgate, dup, hidden, dots);
    for (int64_t q = 0; q < panels(d); ++q) {
      const int64_t across = panel_width(d, q), to = q * kPanel;
      float *dgate_sum = segment.sums + column * d + to, *dup_sum = dgate_sum + f * d;
      multiply_gradient(rows, width, dgate, across, x + q * panel, dgate_sum, d, write);
      multiply_gradient(rows, width, dup, across, x + q * panel, dup_sum, d, write);
      float* ddown_sum = segment.sums + 2 * f * d + to * f + column;
      multiply_gradient(rows, across, dy + q * panel, width, hidden, ddown_sum, f, write);
    }
  }
  for (int64_t i = 0; i < rows; ++i) of.dweight[slots[i]] = sum(load(dots + i * kLanes));
  const float* gate_up = of.gate_up + segment.expert * packed_size(depth, d);
  for (int64_t q = 0; q < panels(d); ++q) {
    const int64_t width = panel_width(d, q);
    multiply_block(rows, width, depth, dgate_up, panel, gate_up + q * depth * kPanel, t, kPanel);
    for (int64_t i = 0; i < rows; ++i) {
      float* dx = of.dx + slots[i] * d + q * kPanel;
      for (int64_t j = 0; j < width; j += kLanes) store(dx + j, load(t + i * kPanel + j));
    }
  }
}

void run_segment(const ExpertSizes& sizes, const Operands& of, const Segment& segment) {
  const int64_t rows = segment.last - segment.first;
  const int64_t even = blocks(blocks(rows, blocks(rows, kRowBlock)), kTileRows) * kTileRows;
  for (int64_t row = segment.first; row < segment.last; row += even) {
    run_block(sizes, of, segment, row, std::min(even, segment.last - row),
              row == segment.first ? Write::kSet : Write::kAdd);
  }
}

// dlogit_k = w_k (dw_k - sum_j w_j dw_j) of the chosen, and 0 of the others, dropped ones too. Of a run of tokens: dx,
// which is the slots' in order of choice, then the router's; and the run's sum of the router's gradient.
void combine(const ExpertSizes& sizes, const Operands& of, const float* router, int64_t first, int64_t last, float* dx,
             float* drouter) {
  const int64_t d = sizes.width, choices = sizes.choices;
  std::fill(drouter, drouter + sizes.experts * d, 0.0f);
  for (int64_t token = first; token < last; ++token) {
    const float *weight = of.weight + token * choices, *dweight = of.dweight + token * choices;
    const int32_t* ids = of.ids + token * choices;
    float mean = 0.0f;
    for (int64_t k = 0; k < choices; ++k) {
      if (ids[k] >= 0) mean += weight[k] * dweight[k];
    }
    for (int64_t j = 0; j < d; j += kLanes) {
      const Vec x = load(of.x + token * d + j);
      Vec total{}, routed{};
      for (int64_t k = 0; k < choices; ++k) {
        if (ids[k] < 0) continue;
        const Vec dlogit = fill(weight[k] * (dweight[k] - mean));
        float* sum = drouter + ids[k] * d + j;
        store(sum, fma(dlogit, x, load(sum)));
        routed = fma(dlogit, load(router + ids[k] * d + j), routed);
        total += load(of.dx + (token * choices + k) * d + j);
      }
      store(dx + token * d + j, total + routed);
    }
  }
}

// Both weights of an expert for this direction: down as [D, F], and gate and up as [depth, D].
void pack_expert(const ExpertSizes& sizes, const float* gate_up, const float* down, float* packed_gate_up,
                 float* packed_down) {
  const int64_t d = sizes.width, f = sizes.inner, half = panels(f) * kPanel, depth = 2 * half;
  pack({down, f, 1}, d, f, packed_down);
  if (f != half) std::fill(packed_gate_up, packed_gate_up + packed_size(depth, d), 0.0f);
  for (int64_t q = 0; q < panels(d); ++q) {
    const int64_t width = panel_width(d, q);
    for (int64_t row = 0; row < 2 * f; ++row) {
      const int64_t k = row < f ? row : row - f + half;
      std::memcpy(packed_gate_up + (q * depth + k) * kPanel, gate_up + row * d + q * kPanel,
                  static_cast<size_t>(width) * sizeof(float));
    }
  }
}

// Segments in order, so in order of expert too; those of span s are begins[s] .. begins[s + 1].
std::vector<Segment> cut(const ExpertSizes& sizes, const int32_t* starts, int64_t span, std::vector<int64_t>& begins) {
  std::vector<Segment> segments;
  int64_t e = 0;
  const int64_t kept = starts[sizes.experts];
  for (int64_t row = 0; row < kept; row += span) {
    begins.push_back(static_cast<int64_t>(segments.size()));
    const int64_t end = std::min(row + span, kept);
    for (int64_t at = row; at < end;) {
      while (starts[e + 1] <= at) ++e;
      const int64_t last = std::min<int64_t>(end, starts[e + 1]);
      segments.push_back({e, at, last, nullptr});
      at = last;
    }
  }
  begins.push_back(static_cast<int64_t>(segments.size()));
  return segments;
}

}  // namespace

extern "C" {

// From dy [N, D] and what cispo_experts left in ids, weight and saved: dx [N, D], drouter [E, D], dgate_up [E, 2F, D]
// and ddown [E, D, F]. Slots with a negative id were dropped and have no part in it. x [N, D]; router, gate_up and down as
// they are, contiguous. scratch: floats for the weights packed for this direction, the router's sums, a row of dx of each
// slot, the experts' sums, and a value of each slot (experts_cpu.py counts them).
void cispo_experts_gradient(const float* dy, const float* x, const float* router, const float* gate_up,
                            const float* down, const int32_t* ids, const float* weight, const float* saved, float* dx,
                            float* drouter, float* dgate_up, float* ddown, float* scratch, int64_t n, int64_t d,
                            int64_t f, int64_t experts, int64_t choices, int64_t threads) {
  const ExpertSizes sizes{n, d, f, experts, choices};
  const int64_t depth = padded_inner(sizes), slots = sizes.slots(), size = gradient_size(sizes);
  float* packed_down = scratch;
  float* packed_gate_up = packed_down + experts * packed_size(d, f);
  float* drouter_sums = packed_gate_up + experts * packed_size(depth, d);
  float* slot_dx = drouter_sums + kSpans * experts * d;
  float* sums = slot_dx + slots * d;
  float* slot_dweight = sums + (kSpans + experts) * size;

  std::vector<int32_t> starts(static_cast<size_t>(experts + 1)), order(static_cast<size_t>(slots));
  sort_by_expert(ids, slots, experts, starts.data(), order.data());
  const int64_t span = std::max(kLeastSpan, blocks(blocks(slots, kSpans), kRowBlock) * kRowBlock);
  std::vector<int64_t> begins;
  std::vector<Segment> segments = cut(sizes, starts.data(), span, begins);
  for (Segment& segment : segments) segment.sums = sums + (&segment - segments.data()) * size;
  const int64_t spans = static_cast<int64_t>(begins.size()) - 1;

#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t e = 0; e < experts; ++e) {
    pack_expert(sizes, gate_up + 2 * e * d * f, down + e * d * f, packed_gate_up + e * packed_size(depth, d),
                packed_down + e * packed_size(d, f));
  }

  const Operands of{dy, x, weight, saved, ids, order.data(), packed_gate_up, packed_down, slot_dx, slot_dweight};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t s = 0; s < spans; ++s) {
    for (int64_t i = begins[s]; i < begins[s + 1]; ++i) run_segment(sizes, of, segments[i]);
  }

  const int64_t run = blocks(n, kSpans);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t s = 0; s < kSpans; ++s) {
    combine(sizes, of, router, std::min(n, s * run), std::min(n, (s + 1) * run), dx, drouter_sums + s * experts * d);
  }

  constexpr int64_t kPart = 4096;
  const int64_t parts = blocks(size, kPart);
  std::vector<size_t> firsts(static_cast<size_t>(experts + 1), 0);
  for (const Segment& segment : segments) ++firsts[segment.expert + 1];
  for (int64_t e = 0; e < experts; ++e) firsts[e + 1] += firsts[e];
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t unit = 0; unit < experts * (parts + 1); ++unit) {
    const int64_t e = unit / (parts + 1), begin = unit % (parts + 1) * kPart, end = std::min(size, begin + kPart);
    if (begin >= parts * kPart) {
      for (int64_t j = e * d; j < (e + 1) * d; j += kLanes) {
        Vec total{};
        for (int64_t s = 0; s < kSpans; ++s) total += load(drouter_sums + s * experts * d + j);
        store(drouter + j, total);
      }
      continue;
    }
    for (int64_t j = begin; j < end; j += kLanes) {
      Vec total{};
      for (size_t i = firsts[e]; i < firsts[e + 1]; ++i) total += load(segments[i].sums + j);
      store(j < 2 * d * f ? dgate_up + 2 * e * d * f + j : ddown + e * d * f + (j - 2 * d * f), total);
    }
  }
}
}
