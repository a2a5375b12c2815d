#include "team.h"

#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

namespace team {
namespace {

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();
Parallel parallel = nullptr;
Number number = nullptr, count = nullptr;

struct Call {
    void (*work)(void*, int, int);
    void* data;
};

constexpr int kSpins = 4000;  // then the core is offered to others: who waits must not starve the thread it waits for

}  // namespace

void use(uintptr_t p, uintptr_t n, uintptr_t c) {
    parallel = reinterpret_cast<Parallel>(p);
    number = reinterpret_cast<Number>(n);
    count = reinterpret_cast<Number>(c);
}

bool shared() { return parallel != nullptr; }

void run(int threads, void (*work)(void*, int, int), void* data) {
    if (!parallel || threads <= 1) return work(data, 0, 1);
    Call call{work, data};
    parallel(
        [](void* p) {
            auto* c = static_cast<Call*>(p);
            c->work(c->data, number(), count());
        },
        &call, unsigned(threads), 0);
}

void wait(const std::atomic<int>& reached, int wanted) {
    for (int spins = 0; reached.load(std::memory_order_acquire) < wanted;) {
        if (++spins < kSpins) PAUSE();
        else sched_yield();
    }
}

}  // namespace team
