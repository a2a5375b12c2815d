// Four bytes that may lie anywhere: two bf16 begin at any even address, where a view of a tensor begins.
#pragma once
#include <cstdint>
#include <cstring>

namespace {  // own code for each instruction set

inline uint32_t word_at(const uint32_t* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return word;
}

}  // namespace
