// Chooses the instruction set once, when the module is loaded. Compiled without any -m flag.
#include <cstdlib>
#include <cstring>

#include "../check.h"
#include "kernels.h"

namespace rf {

namespace baseline {
extern const Kernels kKernels;
}
#ifdef RF_HAVE_AVX2
namespace avx2 {
extern const Kernels kKernels;
}
#endif
#ifdef RF_HAVE_AVX512
namespace avx512 {
extern const Kernels kKernels;
}
#endif
#ifdef RF_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

const Isa& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  // Narrowest first: the last supported one wins.
  static const Isa kIsas[] = {
      {"default", &baseline::kKernels, true},
#ifdef RF_HAVE_AVX2
      {"avx2", &avx2::kKernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef RF_HAVE_AVX512
      {"avx512", &avx512::kKernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
#endif
#ifdef RF_HAVE_AVX512_BF16
      {"avx512_bf16", &avx512_bf16::kKernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")},
#endif
  };
  const char* wanted = std::getenv("RESNET_FAST_ISA");
  const Isa* best = nullptr;
  for (const Isa& isa : kIsas) {
    if (wanted && *wanted && std::strcmp(wanted, isa.name) == 0) {
      RF_CHECK(isa.supported, "RESNET_FAST_ISA=", wanted, ": this processor does not have it");
      return isa;
    }
    if (isa.supported) best = &isa;
  }
  RF_CHECK(!wanted || !*wanted, "RESNET_FAST_ISA=", wanted,
           ": wanted one of default, avx2, avx512, avx512_bf16, and one this module was built with");
  return *best;
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }
const char* isa_name() { return chosen().name; }

}  // namespace rf
