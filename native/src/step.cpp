#include "step.h"

#include <algorithm>
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
constexpr int kMostThreads = 64;
constexpr int64_t kAskedFor = 128 << 10;  // bytes, a part of the second cache
constexpr int kLines = 4;                 // asked for between two looks at the others

struct alignas(64) Lane {
    std::atomic<int> taken{0};
};

struct alignas(64) State {
    std::atomic<int> done{0};
    Lane lanes[kMostThreads];
    void clear(int threads) {
        done.store(0, std::memory_order_relaxed);
        for (int i = 0; i < threads; i++) lanes[i].taken.store(0, std::memory_order_relaxed);
    }
};

void take_parts(const Call& call, int64_t tokens, State& state, int thread, const Stream& next) {
    const int parts = call.parts(tokens), lanes = parts > 1 ? wanted_threads : 1, own = parts / lanes;
    for (int i = 0; i < lanes; i++) {
        const int lane = (thread + i) % lanes;
        for (int place; (place = state.lanes[lane].taken.fetch_add(1, std::memory_order_relaxed)) < own;) {
            call.work(tokens, lane * own + place, parts);
            state.done.fetch_add(1, std::memory_order_release);
        }
    }
    const uint8_t* from = next.from + next.bytes * thread / wanted_threads;
    const int64_t wanted = std::min(kAskedFor, next.bytes / wanted_threads);
    for (int64_t asked = 0; asked < wanted && state.done.load(std::memory_order_acquire) < parts; asked += kLines * 64)
        for (int line = 0; line < kLines; line++) __builtin_prefetch(from + asked + line * 64, 0, 2);
    team::wait(state.done, parts);
}

}  // namespace

void set_threads(int count) { wanted_threads = team::shared() ? std::min(count, kMostThreads) : 1; }
int threads() { return wanted_threads; }

int Call::parts(int64_t tokens) const { return tokens * size <= kFew ? 1 : kPartsAThread * wanted_threads; }

void Step::run(int64_t tokens, int64_t rows) const {
    const size_t body = std::min(body_, calls_.size()), first = tokens > 0 ? 0 : body, count = rows > 0 ? calls_.size() : body;
    static std::vector<State> states;  // one step runs at a time: the engine's thread is the only caller
    if (states.size() < calls_.size()) states = std::vector<State>(calls_.size());
    for (size_t i = first; i < count; i++) states[i].clear(wanted_threads);
    team::each(wanted_threads, [&](int thread, int) {
        for (size_t i = first; i < count; i++) take_parts(calls_[i], i < body_ ? tokens : rows, states[i], thread, streams_[i]);
    });
}

void Step::note(Call call) {
    calls_.push_back(std::move(call));
    const size_t count = calls_.size();
    streams_.resize(count);
    if (calls_.back().stream.bytes)
        for (size_t i = count - 1; i-- > 0 && !streams_[i].bytes;) streams_[i] = calls_.back().stream;
}

void begin() {
    if (recording) throw std::logic_error("a step is being recorded already");
    recording = std::make_unique<Step>();
    contents = {};
}

void finish() {
    if (!recording) throw std::logic_error("no step is being recorded");
    recording->finish();
    contents = {};  // of all tokens; what follows has rows of its own
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

void perform(int64_t tokens, int64_t size, Work work, Stream stream) {
    contents = {};
    Call call{std::move(work), size, stream};
    if (recording) return recording->note(std::move(call));
    if (tokens <= 0) return;
    State state;
    team::each(call.parts(tokens) > 1 ? wanted_threads : 1,
               [&](int thread, int) { take_parts(call, tokens, state, thread, {}); });
}

}  // namespace step
