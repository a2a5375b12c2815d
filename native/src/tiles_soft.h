// The tiles of AMX in plain C++, for tests on processors that have none: the operations of tiles.h with the same results, bit for bit,
// after Intel's manual (volume 2, TDPBF16PS and TDPBSUD). Where the hardware would fault the program stops with the reason.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tile_shapes.h"
#include "trial.h"

namespace {

struct Tiles {
    static constexpr int kTiles = 8, kRows = 16, kBytes = 64;

    static void configure(const TileShapes& shapes) {
        must(shapes.palette == 1 && shapes.start_row == 0, "the palette is not 1, or a first row is named");
        for (int t = 0; t < 16; t++) {
            must(t < kTiles || (!shapes.rows[t] && !shapes.row_bytes[t]), "a tile beyond the eighth has a shape");
            must(shapes.rows[t] <= kRows && shapes.row_bytes[t] <= kBytes, "a tile is larger than 16 rows of 64 bytes");
            must(!shapes.rows[t] == !shapes.row_bytes[t], "a tile has rows without bytes or bytes without rows");
        }
        auto& s = state();
        s.configured = true;
        s.shapes = shapes;
        std::memset(s.data, 0, sizeof s.data);
    }
    static void release() { state().configured = false; }
    template <int T> static void zero() {
        used<T>();
        std::memset(state().data[T], 0, sizeof state().data[T]);
    }
    template <int T> static void load(const void* from, int64_t stride) {
        used<T>();
        auto& s = state();
        std::memset(s.data[T], 0, sizeof s.data[T]);
        for (int r = 0; r < s.shapes.rows[T]; r++) std::memcpy(s.data[T][r], static_cast<const char*>(from) + r * stride, s.shapes.row_bytes[T]);
    }
    template <int T> static void store(void* to, int64_t stride) {
        used<T>();
        const auto& s = state();
        for (int r = 0; r < s.shapes.rows[T]; r++) std::memcpy(static_cast<char*>(to) + r * stride, s.data[T][r], s.shapes.row_bytes[T]);
    }
    template <int C, int A, int B> static void dot_bf16() {
        fit<C, A, B>();
        // Denormals count as zero and become zero, rounding is to nearest even, nothing is signalled: FTZ, DAZ, all masked.
        const unsigned before = _mm_getcsr();
        _mm_setcsr(0x9fc0);
        add_bf16(state(), C, A, B);
        _mm_setcsr(before);
        if (planted_fault == Fault::all) state().data[C][0][2] += 1;  // a bit that bf16 keeps
    }
    template <int C, int A, int B> static void dot_bytes() {
        fit<C, A, B>();
        auto& s = state();
        for (int m = 0; m < s.shapes.rows[C]; m++) {
            int32_t sums[kRows];
            std::memcpy(sums, s.data[C][m], kBytes);
            for (int k = 0; k < s.shapes.rows[B]; k++)
                for (int n = 0; n < s.shapes.row_bytes[C] / 4; n++)
                    for (int i = 0; i < 4; i++) sums[n] += int32_t(int8_t(s.data[A][m][4 * k + i])) * int32_t(s.data[B][k][4 * n + i]);
            std::memcpy(s.data[C][m], sums, kBytes);
        }
        if (planted_fault != Fault::none) s.data[C][0][2] += 1;
    }

  private:
    struct State {
        bool configured;
        TileShapes shapes;
        alignas(64) uint8_t data[kTiles][kRows][kBytes];
    };
    static State& state() {
        static thread_local State own = {};
        return own;
    }
    static void must(bool so, const char* wrong) {
        if (so) return;
        std::fprintf(stderr, "tiles: %s\n", wrong);
        std::abort();
    }
    template <int T> static void used() {
        static_assert(T >= 0 && T < kTiles);
        must(state().configured && state().shapes.rows[T], "a tile is used that was not configured");
    }
    /// What the products of the manual raise #UD for.
    template <int C, int A, int B> static void fit() {
        if (planted_fault == Fault::illegal) std::raise(SIGILL);
        static_assert(C != A && C != B && A != B);
        used<C>(), used<A>(), used<B>();
        const auto& shape = state().shapes;
        must(!(shape.row_bytes[C] % 4 || shape.row_bytes[A] % 4 || shape.row_bytes[B] % 4), "a row is not of whole words");
        must(shape.rows[C] == shape.rows[A], "the sums have other rows than the activations");
        must(shape.row_bytes[A] / 4 == shape.rows[B], "the activations have other inputs than the weights");
        must(shape.row_bytes[C] == shape.row_bytes[B], "the sums have other columns than the weights");
    }
    static float wide(const uint8_t* p) {
        const uint8_t bytes[4] = {0, 0, p[0], p[1]};
        float value;
        std::memcpy(&value, bytes, 4);
        return value;
    }
    /// Even and odd inputs in two chains of FMA from zero over the rows of B; then even + odd; then C + that.
    __attribute__((noinline)) static void add_bf16(State& s, int c, int a, int b) {  // not inlined: between the settings of MXCSR
        for (int m = 0; m < s.shapes.rows[c]; m++) {
            float even[kRows] = {}, odd[kRows] = {}, sums[kRows];
            for (int k = 0; k < s.shapes.rows[b]; k++)
                for (int n = 0; n < s.shapes.row_bytes[c] / 4; n++) {
                    even[n] = std::fma(wide(s.data[a][m] + 4 * k), wide(s.data[b][k] + 4 * n), even[n]);
                    odd[n] = std::fma(wide(s.data[a][m] + 4 * k + 2), wide(s.data[b][k] + 4 * n + 2), odd[n]);
                }
            std::memcpy(sums, s.data[c][m], kBytes);
            for (int n = 0; n < s.shapes.row_bytes[c] / 4; n++) sums[n] = sums[n] + (even[n] + odd[n]);
            std::memcpy(s.data[c][m], sums, kBytes);
        }
    }
};

}  // namespace
