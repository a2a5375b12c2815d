// One call of a kernel, and a recorded list of them: a model's whole step, run again and again without Python between its ops.
//
// While a step is recorded its calls are noted and not run. The addresses in them must stay what they were; what changes
// from step to step is the number of tokens, and what the buffers hold.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace step {

using Call = std::function<void(int64_t tokens, int thread, int threads)>;

class Step {
  public:
    void run(int64_t tokens) const;
    size_t size() const { return calls_.size(); }
    void note(Call call) { calls_.push_back(std::move(call)); }

  private:
    std::vector<Call> calls_;
};

void set_threads(int count);
int threads();

void begin();
Step end();

/// Memory for what lives within one call. `reserve` before the call: it grows and never shrinks, so a steady engine allocates nothing.
void reserve(size_t bytes);
void* scratch();

/// Run a call now, on all threads when it is `wide`, or note it in the step that is being recorded.
void perform(int64_t tokens, bool wide, Call call);

}  // namespace step
