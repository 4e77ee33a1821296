// A kernel as a recorded program calls it: its arguments from 64-bit words, one each, in order (kernels/cpu_plan.py).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace cispo {

template <class T>
inline T from_word(int64_t word) {
  static_assert(sizeof(T) <= sizeof word, "an argument is a pointer or a number");
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class... Arguments, size_t... At>
inline void replay(void (*kernel)(Arguments...), const int64_t* words, std::index_sequence<At...>) {
  kernel(from_word<Arguments>(words[At])...);
}

template <class... Arguments>
inline void replay(void (*kernel)(Arguments...), const int64_t* words) {
  replay(kernel, words, std::index_sequence_for<Arguments...>{});
}

}  // namespace cispo

#define CISPO_REPLAY(name) \
  extern "C" void cispo_##name##_replay(const int64_t* words) { cispo::replay(cispo_##name, words); }
