// Which instruction sets this processor has.
#include "kernels.h"

#if defined(__x86_64__) && !defined(LINESHAFT_SOFT_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

const Kernels* chosen = nullptr;

#if defined(__x86_64__)
namespace {

#ifdef LINESHAFT_SOFT_PRODUCTS
constexpr bool kSoftProducts = true;
#else
constexpr bool kSoftProducts = false;
#endif

/// May this process use the tiles of AMX, its int8 and bf16 products included? Asks the system for them: it gives their 8 KiB of
/// state to processes that do, and refuses (also one without Linux 5.16, or with a signal stack too small) by an error.
bool tiles_permitted() {
#ifdef LINESHAFT_SOFT_TILES
    return true;
#else
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;  // CPUID leaf 7, EDX
    constexpr unsigned kConfig = 1u << 17, kData = 1u << 18;                   // of XCR0: what the system saves and restores
    constexpr long kAskForState = 0x1023, kTileData = 18;                      // ARCH_REQ_XCOMP_PERM of arch_prctl(2), XFEATURE_XTILEDATA
    constexpr unsigned kXsaveOn = 1u << 27;                                    // CPUID leaf 1, ECX: XGETBV may be used
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsaveOn)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & (kConfig | kData)) == (kConfig | kData) && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#endif
}

}  // namespace
#endif

const Kernels* const* runnable() {
    static const Kernels* found[8] = {};
    if (found[0]) return found;
    int count = 0;
    found[count++] = &kScalar;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &kAvx2;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
    if (wide) found[count++] = &kAvx512;
    const bool bytes = wide && (kSoftProducts || __builtin_cpu_supports("avx512vnni"));
    if (bytes) found[count++] = &kAvx512Vnni;
    const bool pairs = bytes && (kSoftProducts || __builtin_cpu_supports("avx512bf16"));
    if (pairs) found[count++] = &kAvx512Bf16;
    if (pairs && tiles_permitted()) found[count++] = &kAmx;
#endif
    return found;
}
