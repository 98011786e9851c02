// Tokens as int8 digits, in the order in which products read them.
//
// A value is (digit 0 + digit 1 / 254 + ...) times a step, which is 1/127 of the largest magnitude
// in each group of the token's inputs, unless it is given. Two digits are 15 bits below that
// magnitude, more than 16-bit types hold, and four are enough for fp32.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "norm.h"

struct Source {
  const void* x;             // [M][K] of `dtype`
  const void* norm_weight;   // [K] of `dtype`; null for no norm, else K is a multiple of 16
  const float* multiplier;   // [K], or null; what it gives is rounded to `dtype`
  const float* divisor;      // [K], or null; what it gives is not rounded
  const float* given_scale;  // [1], or null; values beyond 127 times it are cut off
  int64_t count, inputs, groups;
  float eps, least_range;
  int dtype;
};

namespace {

constexpr float kBase = 254.0f;  // a rounding leaves half a unit to either side
constexpr float kLargest = 127.0f;
constexpr int kFour = 4;  // digits of a word

enum Dtype { kFp32, kFp16, kBf16 };

// Consecutive tokens that are multiplied at once.
struct Tile {
  int64_t first, size;
};

// What a tile's product reads, with `size * digits` words side by side.
struct Digits {
  const int32_t* words;  // [K/4][size][digits]
  const int32_t* sums;   // [R][size][digits]
  const float* steps;    // [R][size]
};

class Tokens {
 public:
  // `chunk`: inputs that each group is filled up to a multiple of, with zeros.
  Tokens(const Source& source, int digits, int64_t largest_tile, int64_t chunk)
      : source_(source), digits_(digits), size_(source.inputs / source.groups),
        room_((size_ + chunk - 1) / chunk * chunk),
        words_(new int32_t[source.count * digits * source.groups * room_ / kFour]),
        sums_(new int32_t[source.count * digits * source.groups]),
        steps_(new float[source.count * source.groups]) {
    for (int64_t first = 0, size = largest_tile; first < source.count; first += size) {
      while (size > source.count - first) size /= 2;
      tiles.push_back({first, size});
    }
  }

  Digits digits(const Tile& tile) const {
    return {words(tile), sums(tile), steps_.get() + tile.first * source_.groups};
  }

  // Called once for each tile, before anyone reads it.
  void fill(const Tile& tile) {
    const int64_t width = (source_.inputs + kLanes - 1) / kLanes * kLanes;
    std::vector<float> values(width);
    std::vector<int8_t> codes(room_ + kLanes);
    for (int64_t m = 0; m < tile.size; ++m) {
      widen(tile.first + m, values.data());
      for (int64_t g = 0; g < source_.groups; ++g)
        split(tile, m, g, values.data() + g * size_, codes.data());
    }
  }

  std::vector<Tile> tiles;

 private:
  int32_t* words(const Tile& tile) const {
    return words_.get() + tile.first * digits_ * source_.groups * room_ / kFour;
  }
  int32_t* sums(const Tile& tile) const {
    return sums_.get() + tile.first * digits_ * source_.groups;
  }

  void widen(int64_t token, float* values) const {
    if (source_.dtype == kFp32) return widen<float>(token, values);
    source_.dtype == kFp16 ? widen<Fp16>(token, values) : widen<Bf16>(token, values);
  }

  template <typename T>
  void widen(int64_t token, float* values) const {
    const int64_t inputs = source_.inputs;
    const T* x = static_cast<const T*>(source_.x) + token * inputs;
    const T* weight = static_cast<const T*>(source_.norm_weight);
    const float factor = weight ? norm_factor(x, inputs, source_.eps) : 1.0f;
    for (int64_t k = 0; k < inputs; k += kLanes) {
      const int64_t rest = inputs - k;
      Floats v = weight ? rounded<T>(normed(x + k, weight + k, factor)) : load_some(x + k, rest);
      if (source_.multiplier) v = rounded<T>(v * load_some(source_.multiplier + k, rest));
      if (source_.divisor) v = v / load_some(source_.divisor + k, rest);
      store_floats(values + k, v);
    }
  }

  // The step of `size_` values, NaN if one of them is (or is infinite, without a given scale).
  float step(const float* values) const {
    Floats largest = {}, none = {};
    const Floats limit = Floats{} + (source_.given_scale ? 3e38f : INFINITY);
    for (int64_t k = 0; k < size_; k += kLanes) {
      const Floats v = load_some(values + k, size_ - k);
      const Floats magnitude = v < 0 ? -v : v;
      largest = magnitude > largest ? magnitude : largest;
      none += (magnitude > limit ? limit : magnitude) * 0.0f;
    }
    float found = source_.least_range;
    for (int i = 0; i < kLanes; ++i) found = std::max(found, largest[i]);
    return (source_.given_scale ? *source_.given_scale : found / kLargest) + sum(none);
  }

  void split(const Tile& tile, int64_t m, int64_t g, float* values, int8_t* codes) {
    const int64_t width = tile.size * digits_, column = m * digits_;
    const float unit = step(values);
    steps_[tile.first * source_.groups + g * tile.size + m] = unit;
    // Its digits are 0 then, and the step makes NaN of them.
    const bool is_number = !std::isnan(unit);
    for (int64_t k = 0; k < size_; ++k)
      values[k] = is_number ? std::min(std::max(values[k] / unit, -kLargest), kLargest) : 0.0f;
    for (int digit = 0; digit < digits_; ++digit) {
      int32_t sum = 0;
      for (int64_t k = 0; k < size_; ++k) {
        const float whole = std::nearbyint(values[k]);
        const int32_t code = static_cast<int32_t>(whole);
        values[k] = (values[k] - whole) * kBase;
        codes[k] = static_cast<int8_t>(code);
        sum += code;
      }
      std::fill(codes + size_, codes + room_, 0);
      sums(tile)[g * width + column + digit] = sum;
      int32_t* target = words(tile) + g * room_ / kFour * width + column + digit;
      for (int64_t k = 0; k < room_; k += kFour, target += width)
        std::memcpy(target, codes + k, sizeof(*target));
    }
  }

  const Source source_;
  const int digits_;
  const int64_t size_, room_;  // of a group
  const std::unique_ptr<int32_t[]> words_, sums_;
  const std::unique_ptr<float[]> steps_;
};

}  // namespace
