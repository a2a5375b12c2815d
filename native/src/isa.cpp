// Which instruction sets this processor has.
#include "kernels.h"

const Kernels* chosen = nullptr;

const Kernels* const* runnable() {
    static const Kernels* found[8] = {};
    if (found[0]) return found;
    int count = 0;
    found[count++] = &kScalar;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &kAvx2;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (wide) found[count++] = &kAvx512;
    if (wide && __builtin_cpu_supports("avx512bf16")) found[count++] = &kAvx512Bf16;
#endif
    return found;
}
