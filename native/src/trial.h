// A trial of a table before it is used: the same small products as the portable table makes, bit for bit.
#pragma once
#include <string>

#include "kernels.h"

/// What differs ("int8 in groups of 32, 64 inputs, 33 tokens"), that it faults, or nothing. A few milliseconds.
std::string trial(const Kernels& table);

#ifdef LINESHAFT_SOFT_TILES
/// Tests set it: emulated tiles then give a wrong number in each product, or in each of bytes, or are an illegal instruction.
enum class Fault { none, all, bytes, illegal };
extern Fault planted_fault;
#endif
