// A recorded sequence of kernel calls, run in order by one call.
#include <cstdint>

extern "C" {

// program: for each call the address of its kernel's replay function, the number of its words, and the words.
void cispo_run_plan(const int64_t* program, int64_t calls) {
  for (int64_t call = 0; call < calls; ++call) {
    const auto kernel = reinterpret_cast<void (*)(const int64_t*)>(program[0]);
    kernel(program + 2);
    program += 2 + program[1];
  }
}
}
