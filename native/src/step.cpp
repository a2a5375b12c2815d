#include "step.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "team.h"

namespace step {
namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};

int wanted_threads = 1;
std::unique_ptr<Step> recording;
std::unique_ptr<void, Free> memory;
size_t memory_bytes = 0;
Contents contents = {};

constexpr int64_t kFew = 8192;     // numbers that one thread has done before another has heard of them
constexpr int kPartsAThread = 4;  // so that one that is slower, or held up, does fewer

struct alignas(64) State {
    std::atomic<int> taken{0}, done{0};
    void clear() { taken.store(0, std::memory_order_relaxed), done.store(0, std::memory_order_relaxed); }
};

void take_part(const Call& call, int64_t tokens, State& state) {
    const int parts = call.parts(tokens);
    for (int part; (part = state.taken.fetch_add(1, std::memory_order_relaxed)) < parts;) {
        call.work(tokens, part, parts);
        state.done.fetch_add(1, std::memory_order_release);
    }
    team::wait(state.done, parts);
}

}  // namespace

void set_threads(int count) { wanted_threads = team::shared() ? count : 1; }
int threads() { return wanted_threads; }

int Call::parts(int64_t tokens) const { return tokens * size <= kFew ? 1 : kPartsAThread * wanted_threads; }

void Step::run(int64_t tokens) const {
    if (tokens <= 0) return;
    static std::vector<State> states;  // one step runs at a time: the engine's thread is the only caller
    if (states.size() < calls_.size()) states = std::vector<State>(calls_.size());
    for (size_t i = 0; i < calls_.size(); i++) states[i].clear();
    team::each(wanted_threads, [&](int, int) {
        for (size_t i = 0; i < calls_.size(); i++) take_part(calls_[i], tokens, states[i]);
    });
}

void begin() {
    if (recording) throw std::logic_error("a step is being recorded already");
    recording = std::make_unique<Step>();
    contents = {};
}

Step end() {
    if (!recording) throw std::logic_error("no step is being recorded");
    Step made = std::move(*recording);
    recording.reset();
    return made;
}

void reserve(size_t bytes) {
    if (bytes <= memory_bytes) return;
    const size_t whole = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, whole));
    memory_bytes = memory ? whole : 0;
    if (!memory) throw std::bad_alloc();
}

void* scratch() { return memory.get(); }

void left(const Contents& own) { contents = own; }
bool holds(const Contents& wanted) { return recording && contents == wanted; }  // a step has one number of tokens, other calls may not

void perform(int64_t tokens, int64_t size, Work work) {
    contents = {};
    Call call{std::move(work), size};
    if (recording) return recording->note(std::move(call));
    if (tokens <= 0) return;
    State state;
    team::each(call.parts(tokens) > 1 ? wanted_threads : 1, [&](int, int) { take_part(call, tokens, state); });
}

}  // namespace step
