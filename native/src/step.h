// One call of a kernel, and a recorded list of them: a model's whole step, run again and again without Python between its ops.
//
// While a step is recorded its calls are noted and not run. The addresses in them must stay what they were; what changes
// from step to step is the number of tokens, and what the buffers hold.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace step {

/// Does one of `parts` equal parts of the work on so many tokens.
using Work = std::function<void(int64_t tokens, int part, int parts)>;

/// What a call reads from beginning to end, part after part: its weights.
struct Stream {
    const uint8_t* from = nullptr;
    int64_t bytes = 0;
};

struct Call {
    Work work;
    int64_t size;  // numbers a token: few in all are not worth sharing
    Stream stream;

    int parts(int64_t tokens) const;
};

/// Each thread takes its own parts of a call, one after another, then what is left of the others', and goes on when all are done: one
/// that the system holds up between parts holds up nobody. Who waits asks for the weights that it will need next.
class Step {
  public:
    /// Work on so many tokens, then on so many rows; without tokens, on rows alone of what was run last.
    void run(int64_t tokens, int64_t rows) const;
    size_t size() const { return calls_.size(); }
    void note(Call call);
    void finish() { body_ = calls_.size(); }

  private:
    size_t body_ = SIZE_MAX;  // calls that work on all tokens; those behind them work on rows: logits, which few tokens need
    std::vector<Call> calls_;
    std::vector<Stream> streams_;  // which is read next after each call
};

void set_threads(int count);
int threads();

void begin();
void finish();
Step end();

/// Memory for what lives within one call. `reserve` before the call: it grows and never shrinks, so a steady engine allocates nothing.
void reserve(size_t bytes);
void* scratch();

/// What the scratch holds after a call, for one that is recorded next and would put the same there.
using Contents = std::array<int64_t, 9>;
void left(const Contents& contents);
bool holds(const Contents& contents);

/// Run a call now, or note it in the step that is being recorded.
void perform(int64_t tokens, int64_t size, Work work, Stream stream = {});

}  // namespace step
