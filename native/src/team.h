// Threads: those of torch's own OpenMP, so that no second pool spins beside it.
#pragma once
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace team {

/// Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the library that torch has loaded; 0: one thread only.
void use(uintptr_t parallel, uintptr_t thread_number, uintptr_t thread_count);
bool shared();

void run(int threads, void (*work)(void*, int thread, int threads), void* data);

/// Calls fn(thread, threads) on that many threads and waits for all.
template <class Fn>
void each(int threads, Fn&& fn) {
    run(threads, [](void* data, int thread, int count) { (*static_cast<std::remove_reference_t<Fn>*>(data))(thread, count); }, &fn);
}

/// Waits until `count` reaches `wanted`.
void wait(const std::atomic<int>& count, int wanted);

struct Range { int64_t first, last; };
/// The share of a thread of `count` things.
inline Range share(int64_t count, int thread, int threads) { return {count * thread / threads, count * (thread + 1) / threads}; }

}  // namespace team
