// Sixteen float32 lanes, whatever the processor: the compiler splits a Vec into its own registers.
//
// Nothing here is contracted or reordered (-ffp-contract=off, no fast-math): a formula written once gives an element the
// same bits wherever it lies, which is what lets sampling and training agree.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace cispo {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef float HalfVec __attribute__((vector_size(32)));
typedef float QuarterVec __attribute__((vector_size(16)));

inline Vec fill(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

// The first n lanes (0 <= n <= 16); the others are `rest` and their memory is not touched.
inline Vec load_first(const float* from, int64_t n, float rest = 0.0f) {
  if (n == kLanes) return load(from);
  Vec x = fill(rest);
  std::memcpy(&x, from, static_cast<size_t>(n) * sizeof(float));
  return x;
}

inline void store_first(float* to, Vec x, int64_t n) {
  if (n == kLanes) return store(to, x);
  std::memcpy(to, &x, static_cast<size_t>(n) * sizeof(float));
}

// a * b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c));
#elif defined(__FMA__)
  Vec out;
  for (int half = 0; half < 2; ++half) {
    const __m256 x = _mm256_loadu_ps(reinterpret_cast<const float*>(&a) + 8 * half);
    const __m256 y = _mm256_loadu_ps(reinterpret_cast<const float*>(&b) + 8 * half);
    const __m256 z = _mm256_loadu_ps(reinterpret_cast<const float*>(&c) + 8 * half);
    _mm256_storeu_ps(reinterpret_cast<float*>(&out) + 8 * half, _mm256_fmadd_ps(x, y, z));
  }
  return out;
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
#endif
}

inline Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }

template <class Half, class Whole, class Combine>
inline Half fold(const Whole& x, Combine combine) {
  Half low, high;
  std::memcpy(&low, &x, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
  return combine(low, high);
}

// Lanes added pairwise, always in the same tree: i and i + 8, then i and i + 4, i + 2, i + 1.
inline float sum(Vec x) {
  const auto add = [](const auto& a, const auto& b) { return a + b; };
  const HalfVec eight = fold<HalfVec>(x, add);
  const QuarterVec four = fold<QuarterVec>(eight, add);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline float maximum(Vec x) {
  const auto larger = [](const auto& a, const auto& b) { return a > b ? a : b; };
  const HalfVec eight = fold<HalfVec>(x, larger);
  const QuarterVec four = fold<QuarterVec>(eight, larger);
  return larger(larger(four[0], four[2]), larger(four[1], four[3]));
}

// Blocks of Width rows and lanes change places across the diagonal: one step of `transpose`.
template <int Width>
inline void exchange(Vec* rows) {
  const IntVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const IntVec is_right = (lane & Width) != 0;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Width) continue;
    const Vec upper = rows[i], lower = rows[i + Width];
#if defined(__clang__)
    for (int to = 0; to < kLanes; ++to) {
      rows[i][to] = to & Width ? lower[to - Width] : upper[to];
      rows[i + Width][to] = to & Width ? lower[to] : upper[to + Width];
    }
#else
    rows[i] = __builtin_shuffle(upper, lower, is_right ? lane + 16 - Width : lane);
    rows[i + Width] = __builtin_shuffle(upper, lower, is_right ? lane + 16 : lane + Width);
#endif
  }
}

// 16 rows of 16 lanes, in place.
inline void transpose(Vec* rows) {
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 7 in r, then the exponent; below 1.5 units in the last
// place. 0 below -87.3 (where float32 leaves its normal range), infinity above 88.7, NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec low = fill(-87.33654f), high = fill(88.72283f);
  const Vec bounded = min(max(x, low), high);
  const Vec shift = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = fma(bounded, fill(1.44269504f), shift) - shift;
  Vec r = fma(n, fill(-0.693359375f), bounded);
  r = fma(n, fill(2.12194440e-4f), r);
  Vec p = fill(1.9841270e-4f);
  p = fma(p, r, fill(1.3888889e-3f));
  p = fma(p, r, fill(8.3333333e-3f));
  p = fma(p, r, fill(4.1666667e-2f));
  p = fma(p, r, fill(1.6666667e-1f));
  p = fma(p, r, fill(0.5f));
  p = fma(p, r, fill(1.0f));
  p = fma(p, r, fill(1.0f));
  // n reaches 128, whose power of two is no float32: scale in two steps.
  const IntVec whole = __builtin_convertvector(n, IntVec), half = whole >> 1;
  const Vec first = reinterpret_cast<Vec>((half + 127) << 23), second = reinterpret_cast<Vec>((whole - half + 127) << 23);
  Vec out = p * first * second;
  out = select(x < low, fill(0.0f), out);
  out = select(x > high, fill(INFINITY), out);
  return select(x == x, out, x);
}

inline Vec sigmoid(Vec x) { return fill(1.0f) / (fill(1.0f) + exp(-x)); }

}  // namespace cispo
