// RMSNorm of a token, round(x / sqrt(mean(x^2) + eps)) * weight, for widths that are multiples of
// 16.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

template <typename T>
float norm_factor(const T* x, int64_t width, float eps) {
  Floats squares = {};
  for (int64_t e = 0; e < width; e += kLanes) {
    const Floats v = load_floats(x + e);
    squares += v * v;
  }
  return 1.0f / std::sqrt(sum(squares) / width + eps);
}

// Sixteen results, not yet rounded to T.
template <typename T>
inline Floats normed(const T* x, const T* weight, float factor) {
  return rounded<T>(load_floats(x) * factor) * load_floats(weight);
}

}  // namespace
