// What each instruction set provides. One table is filled for each and one of them is chosen when the library loads.
#pragma once
#include <cstdint>

#include "packed.h"

struct Linear {
    Shape shape;
    const uint8_t* weight;     // packed
    const float* bias;         // [outputs] or null
    bool whole;                // activations are rounded to 8 bits
    Activation activation;     // of x and out
    const void* x;
    int64_t x_stride;          // elements from token to token
    void* out;
    int64_t out_stride;
    int64_t tokens;
    const int32_t* rows = nullptr;  // which rows of x; null: the first ones
    bool wide = false;              // out is float32 whatever x is
    float input_scale = 0;          // of activations in 8 bits, the same for all tokens; 0: found from each token
    const void* added = nullptr;    // like out: the rounded product is added to it, and rounded again; null: to nothing
    int64_t added_stride = 0;
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

/// Layer normalisation: less the mean, too, and with a bias.
struct Centred {
    Norm norm;
    Activation bias_kind;
    const void* bias;
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
    Activation activation;      // of queries, and of pages that are not coded
    bool coded;                 // pages hold codes with scales (coded.h), as wide as keys also for values; their strides are bytes
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

/// What an indexer is asked (ops/reference_indexer.py), and where its choice goes.
struct Choosing {
    Attention heads;            // of the indexer: one key for all of them, no values
    const float* weights;       // [tokens, heads]
    int64_t top, tokens;
    float* room;                // [room tokens, longest]: scores of so many tokens, or fewer
    int64_t room_tokens, longest;
    int32_t* slots;             // [tokens, top]: page * page tokens + place in the page; -1 behind the last
    Chunk* chosen;              // [tokens]: each token's part of the slots, as pages of one token
};

/// What tokens leave behind in coded pages.
struct Entries {
    Activation activation;
    const void* x;                  // [tokens, heads, width]
    int64_t x_stride, head_stride;  // elements
    const int64_t* slots;           // page * page tokens + place in the page
    uint8_t* pages;                 // dense: [P, page tokens, heads, entry bytes]
    int64_t tokens, heads, width;
};

/// How a token's experts are chosen and weighted (ops/routing.py).
struct Route {
    const float* logits;        // [tokens, experts]
    const float* bias;          // [experts], steers the choice only; or null
    bool sigmoid, normalise;
    int64_t experts, top, groups, best_groups;
    float scaling;
    float* weights;             // [tokens, top]
    int64_t* chosen;            // likewise
    int64_t tokens;
};

/// Experts of one shape: down(SiLU(gate(x)) * up(x)) of each token's chosen ones, weighted and added in the order of the choice.
struct Experts {
    Shape in, down;             // of gate and up; of down
    bool in_whole, down_whole;  // as in Linear
    const uintptr_t* addresses; // of packed weights: all gates, all ups, all downs
    int64_t experts, top;
    Activation activation;      // of x and out
    const void* x;
    int64_t x_stride;
    const float* weights;       // [tokens, top]
    const int64_t* chosen;      // likewise
    void* out;                  // dense
    int64_t tokens;
};

/// How a token is chosen (ops/sampling.py), as Python lays it out.
struct Choice {
    double temperature, top_k, top_p, min_p, luck;
};
constexpr double kColdest = 1e-30, kHottest = 1e30;  // temperatures below and above count as these

struct Sample {
    const float* logits;        // [rows, width]
    int64_t stride, width;      // elements
    const Choice* choices;      // [rows]
    int64_t* tokens;            // likewise
    int64_t rows;
};

/// Between them all threads wait for each other.
enum class Stage : int { sort, pack, swiglu, pack_down, down, combine };

struct Kernels {
    const char* name;
    void (*lay_words)(const void* from, int64_t stride, int64_t outputs, int64_t rows, uint8_t* group);  // lay.h
    void (*lay_halves)(const uint8_t* from, int64_t stride, int64_t outputs, int64_t rows, uint8_t* group);
    // Activations into tiles, then the product. scratch: tokens * (inputs + scales + 1) words.
    void (*pack)(const Linear&, void* scratch, int part, int parts);
    void (*linears)(const Linear*, int64_t count, void* scratch, int part, int parts);  // of activations packed for the first one
    void (*swiglu)(const Linear* gate_and_up, void* scratch, int part, int parts);      // SiLU(gate) * up to where up's belongs
    void (*norm)(const Norm&, int part, int parts);
    void (*centred)(const Centred&, int part, int parts);
    void (*rope)(const Rope&, int part, int parts);
    void (*silu_mul)(Activation, const void* gate, const void* up, void* out, int64_t count, int part, int parts);
    void (*add)(Activation, const void* a, const void* b, void* out, int64_t count, int part, int parts);
    void (*sigmoid)(Activation, const void* x, void* out, int64_t count, int part, int parts);
    void (*scaled)(Activation, const void* x, const void* factors, void* out, int64_t tokens, int64_t width, int part, int parts);
    void (*widen)(const void* x, float* out, int64_t count, int part, int parts);
    void (*attention)(const Attention&, int part, int parts);
    void (*score_together)(const Choosing&, int part, int parts);
    void (*choose)(const Choosing&, int part, int parts);
    void (*write_codes)(const Entries&, int part, int parts);
    void (*route)(const Route&, int part, int parts);
    void (*sample)(const Sample&, int part, int parts);
    void (*experts)(const Experts&, Stage, void* scratch, int part, int parts);  // scratch: desk.h
};

extern const Kernels kScalar, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx;

/// The tables that this processor can run, worst first; null behind the last.
const Kernels* const* runnable();
/// The table in use.
extern const Kernels* chosen;
