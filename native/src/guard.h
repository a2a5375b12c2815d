// Runs what may use an instruction that the processor or the system refuses, and comes back if it does.
#pragma once
#include <csetjmp>
#include <csignal>

namespace guard {

inline thread_local sigjmp_buf* way_back = nullptr;

inline void go_back(int signal) {
    if (way_back) siglongjmp(*way_back, signal);
    std::signal(signal, SIG_DFL);  // another thread's fault, in the same moment: as if nobody listened
}

/// Does fn() end without SIGILL, SIGSEGV or SIGBUS? After one of them what fn held is not freed.
template <class Fn>
bool survives(Fn fn) {
    constexpr int kFaults[] = {SIGILL, SIGSEGV, SIGBUS};
    struct sigaction ours = {}, before[3];
    ours.sa_handler = go_back;
    sigemptyset(&ours.sa_mask);
    for (int i = 0; i < 3; i++) sigaction(kFaults[i], &ours, &before[i]);
    sigjmp_buf here;
    const bool alive = sigsetjmp(here, 1) == 0;
    if (alive) {
        way_back = &here;
        fn();
    }
    way_back = nullptr;
    for (int i = 0; i < 3; i++) sigaction(kFaults[i], &before[i], nullptr);
    return alive;
}

}  // namespace guard
