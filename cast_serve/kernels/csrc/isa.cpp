// The choice of instruction set: the best that the CPU and the operating system (saved registers) support.
#include "isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cast24.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace cast24 {
namespace {

struct Candidate {
  const Isa* isa;
  bool supported, preferred = supported;  // preferred: taken where nobody names another
};

#if defined(__x86_64__)
bool avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool avx512vnni() {
  return avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif

// In order of preference. __builtin_cpu_supports reads cpuid and XCR0. Intel's CPUs make pair products of bf16 at half the rate of
// multiply-adds, and have a shuffle unit of 512 bits for two of those; AMD's have them alike.
const Candidate* candidates(int* count) {
  static const Candidate all[] = {
#if defined(__x86_64__)
      {&kAvx512Wide, avx512vnni(), avx512vnni() && __builtin_cpu_is("intel")},
      {&kAvx512Bf16, avx512vnni() && __builtin_cpu_supports("avx512bf16")},
      {&kAvx512Vnni, avx512vnni()},
      {&kAvx512, avx512()},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#elif defined(__aarch64__)
      {&kNeonDot, (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0},
      {&kNeon, true},
#endif
      {&kPortable, true},
  };
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Isa* find(const char* name) {
  int count;
  const Candidate* all = candidates(&count);
  for (int i = 0; i < count; ++i)
    if (name == nullptr ? all[i].preferred : all[i].supported && std::strcmp(name, all[i].isa->name) == 0)
      return all[i].isa;
  return nullptr;
}

const Isa* initial() {
  const char* wanted = std::getenv("CAST24_ISA");
  if (wanted == nullptr || *wanted == '\0') return find(nullptr);
  if (const Isa* found = find(wanted)) return found;
  const Isa* best = find(nullptr);
  std::fprintf(stderr, "cast24: CAST24_ISA=%s is unknown or not supported by this CPU; using %s\n", wanted, best->name);
  return best;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> chosen{initial()};
  return chosen;
}

}  // namespace

const Isa& isa() { return *current().load(std::memory_order_relaxed); }

}  // namespace cast24

const char* cast24_isa(void) { return cast24::isa().name; }

int cast24_set_isa(const char* name) {
  const cast24::Isa* found = name == nullptr ? nullptr : cast24::find(name);
  if (found == nullptr) return -1;
  cast24::current().store(found, std::memory_order_relaxed);
  return 0;
}
