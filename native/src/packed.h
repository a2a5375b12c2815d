// The layout of packed weights, the same for every instruction set and every number of tokens.
//
// Outputs come in groups of 64. Of a group, inputs follow each other in rows of 256 bytes: four blocks of 64 bytes, each 16
// outputs by 1 (float32), 2 (bf16), 4 (8 bits, whole numbers or FP8) or 8 (4 bits) neighbouring inputs. A thread that works on a group so reads one
// stream, and a block is both a vector register and a row of a tile of AMX. Quantised weights carry, before the rows of each
// group of inputs that shares a scale, 64 float32 scales and, where zero points differ, 64 bytes of them.
#pragma once
#include <cstdint>

constexpr int kGroup = 64;       // outputs in a group
constexpr int kBlock = 16;       // outputs in a block
constexpr int kRowBytes = 256;   // of a group

enum class Weight : int { f32 = 0, bf16 = 1, int8 = 2, int4 = 3, fp8 = 4 };
enum class Activation : int { f32 = 0, bf16 = 1 };

constexpr int inputs_a_row(Weight kind) { return kind == Weight::f32 ? 1 : kind == Weight::bf16 ? 2 : kind == Weight::int4 ? 8 : 4; }

struct Shape {
    Weight kind;
    int64_t inputs, outputs;
    int64_t scale_inputs;  // inputs that share a scale; 0: dense
    bool zeros;            // a zero point for each scale; else 128 (int8), 8 (int4) or none (fp8)

    int64_t groups() const { return (outputs + kGroup - 1) / kGroup; }
    int64_t scales() const { return scale_inputs ? inputs / scale_inputs : 1; }
    int64_t header_bytes() const { return scale_inputs ? kGroup * 4 + (zeros ? kGroup : 0) : 0; }
    int64_t rows_a_scale() const { return (scale_inputs ? scale_inputs : inputs) / inputs_a_row(kind); }
    int64_t group_bytes() const { return scales() * (header_bytes() + rows_a_scale() * kRowBytes); }
    int64_t bytes() const { return groups() * group_bytes(); }
    /// Room for a token's packed activations on every instruction set, in 32-bit words; `whole`: they are rounded to 8 bits.
    int64_t words(bool whole) const { return whole ? inputs / 2 : inputs; }
};
