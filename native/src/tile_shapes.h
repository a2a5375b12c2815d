// What LDTILECFG reads: palette 1, then bytes a row and rows of each of eight tiles; both are 0 where a tile is not used.
#pragma once
#include <cstdint>

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);
