// The tiles of AMX: eight registers of up to 16 rows of 64 bytes, whose shapes a thread configures before it uses them.
//
// Written as assembly and not with the compiler's intrinsics: those paste the number of a tile into a string, so that it can't be
// a template's argument, and GCC 12's do not tell the compiler that a load reads memory or how much a configuration is, so
// that it may move stores behind them.
#pragma once
#include <cstdint>

#include "tile_shapes.h"

namespace {

struct Tiles {
    /// Also zeroes all tiles.
    static void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
    /// Back to the initial state: a thread that holds tiles makes the system save 8 KiB of them when it is interrupted.
    static void release() { asm volatile("tilerelease" ::: "memory"); }
    template <int T> static void zero() { asm volatile("tilezero %%tmm%c0" ::"n"(T)); }
    template <int T> static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "n"(T) : "memory");
    }
    template <int T> static void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "n"(T) : "memory");
    }
    /// C += A * B of bf16 pairs, in float32.
    template <int C, int A, int B> static void dot_bf16() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(C), "n"(A), "n"(B)); }
    /// C += A * B of signed bytes of A and unsigned bytes of B, in int32.
    template <int C, int A, int B> static void dot_bytes() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(C), "n"(A), "n"(B)); }
};

}  // namespace
