// What each instruction set provides. One table is filled for each and one of them is chosen when the library loads.
#pragma once
#include <cstdint>

#include "packed.h"

struct Linear {
    Shape shape;
    const uint8_t* weight;     // packed
    const float* bias;         // [outputs] or null
    bool whole;                // activations are rounded to 8 bits, one scale a token
    Activation activation;     // of x and out
    const void* x;
    int64_t x_stride;          // elements from token to token
    void* out;
    int64_t out_stride;
    int64_t tokens;
};

struct Norm {
    Activation activation;
    const void* x;
    int64_t x_stride;
    Activation weight_kind;
    const void* weight;
    float eps;
    void* out;
    int64_t out_stride, tokens, width;
};

struct Rope {
    Activation activation;
    const void* x;                  // [tokens, heads, width]
    int64_t x_stride, head_stride;  // elements
    const float *cos, *sin;         // [tokens, width / 2]
    bool interleaved;
    void* out;                      // dense
    int64_t tokens, heads, width;
};

/// Neighbouring tokens of one text, whose keys are in the pages already.
struct Chunk {
    int64_t row, first, count;  // place in the packed row, position of the first token, how many
    int64_t table;              // where its page numbers begin in `tables`
};

/// Which earlier positions a token sees (ops/reach.py): all; the nearest and the first ones; blocks.
struct Reach {
    int kind;             // 0 causal, 1 window, 2 blocks
    int64_t a, b, c;      // window, global tokens | block, local blocks, stride
};

struct Attention {
    Activation activation;      // of queries and pages
    const void* q;              // [tokens, heads, key_width]
    int64_t q_stride;
    const void *keys, *values;  // pages [P, page tokens, kv heads, width]; latent attention has one head and values within its keys
    int64_t key_stride, value_stride;            // elements from token to token
    int64_t key_head_stride, value_head_stride;
    int64_t page_tokens;
    const Chunk* chunks;
    int64_t chunk_count;
    const int32_t* tables;
    Reach reach;
    float scale;
    int64_t heads, kv_heads, key_width, value_width;
    int threads;                // heads are divided until there is work for so many
    void* out;                  // [tokens, heads, value_width], dense
};

struct Kernels {
    const char* name;
    // Activations into tiles, then the product. scratch: tokens * (inputs + scales + 1) words.
    void (*pack)(const Linear&, void* scratch, int part, int parts);
    void (*linear)(const Linear&, void* scratch, int part, int parts);
    void (*norm)(const Norm&, int part, int parts);
    void (*rope)(const Rope&, int part, int parts);
    void (*silu_mul)(Activation, const void* gate, const void* up, void* out, int64_t count, int part, int parts);
    void (*add)(Activation, const void* a, const void* b, void* out, int64_t count, int part, int parts);
    void (*attention)(const Attention&, int part, int parts);
};

extern const Kernels kScalar, kAvx2, kAvx512, kAvx512Bf16;

/// The tables that this processor can run, worst first; null behind the last.
const Kernels* const* runnable();
