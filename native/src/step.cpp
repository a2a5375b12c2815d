#include "step.h"

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

}  // namespace

void set_threads(int count) { wanted_threads = team::shared() ? count : 1; }
int threads() { return wanted_threads; }

void Step::run(int64_t tokens) const {
    if (tokens <= 0) return;
    team::each(wanted_threads, [&](int thread, int count) {
        for (const Call& call : calls_) {
            call(tokens, thread, count);
            team::barrier(count);
        }
    });
}

void begin() {
    if (recording) throw std::logic_error("a step is being recorded already");
    recording = std::make_unique<Step>();
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

void perform(int64_t tokens, bool wide, Call call) {
    if (recording) return recording->note(std::move(call));
    if (tokens > 0) team::each(wide ? wanted_threads : 1, [&](int thread, int count) { call(tokens, thread, count); });
}

}  // namespace step
