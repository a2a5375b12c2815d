// Weights into the packed layout (packed.h), once when a model is loaded.
#pragma once
#include "kernels.h"

/// A dense weight [outputs, inputs] of 4 or 2 bytes a number.
void pack_dense(const Kernels& table, const Shape& shape, const void* weight, int64_t stride, uint8_t* out, int threads);

/// Codes [outputs, inputs] of one byte each, unsigned or FP8, scales [outputs, scales], zero points likewise or null.
void pack_coded(const Kernels& table, const Shape& shape, const uint8_t* codes, const float* scale, const uint8_t* zero, uint8_t* out, int threads);
