// Products of tokens with 4-bit weights, by a CPU's byte-product instructions.
//
// y[m][n] = step[m] * sum over groups g of scale[n][g] * sum over inputs k of g of
//           (code[n][k] - zero[n][g]) * (digit0[m][k] + digit1[m][k] / 254 + ...)
//
// A token is written with int8 digits in units of its step, two for 16-bit types (15 bits below its
// largest value, more than they hold) and four for fp32. Sums of products of digits and codes are
// exact, and are added up in the same order however many tokens there are.
//
// Layouts, made by yi_int4_pack: rows in blocks of 16, the last filled up with zeros. A block's
// codes are 64 bytes for each 8 inputs, 4 bytes a row: byte i holds input i in its low and input
// 4 + i in its high nibble. Its scales are [R][16] fp16 or fp32, its zeros [R][16] bytes.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr float kBase = 254.0f;
constexpr float kLargest = 127.0f;
constexpr int kRows = kLanes;
constexpr int64_t kLine = 64;
constexpr int kChunk = 8;        // inputs of 64 bytes of codes
constexpr int kAhead = 4096;     // bytes from the codes in use to those fetched meanwhile
constexpr int kTaskBlocks = 4;   // blocks of rows that a tile of tokens is multiplied with at once

// Adds, for each row, the products of its four codes 0...15 with the four digits of `word`.
inline Ints add_products(Ints sums, Bytes codes, int32_t word) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums),
                                                    reinterpret_cast<__m512i>(codes),
                                                    _mm512_set1_epi32(word)));
#elif defined(__AVX2__)
  __m256i halves[2], bytes[2];
  std::memcpy(halves, &sums, sizeof(sums));
  std::memcpy(bytes, &codes, sizeof(codes));
  for (int i = 0; i < 2; ++i) {
#if defined(__AVXVNNI__)
    halves[i] = _mm256_dpbusd_avx_epi32(halves[i], bytes[i], _mm256_set1_epi32(word));
#else
    // 2 * 15 * 127 fits in 16 bits, so nothing saturates.
    const __m256i pairs = _mm256_maddubs_epi16(bytes[i], _mm256_set1_epi32(word));
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    halves[i] = _mm256_add_epi32(halves[i], fours);
#endif
  }
  std::memcpy(&sums, halves, sizeof(sums));
  return sums;
#else
  int8_t digits[4];
  std::memcpy(digits, &word, sizeof(word));
  const Ints fours = reinterpret_cast<Ints>(codes);
  for (int i = 0; i < 4; ++i) sums += (fours >> (8 * i) & 15) * digits[i];
  return sums;
#endif
}

// Tokens as digits, and their sums in each group.
struct Tokens {
  int64_t inputs, groups, stride;
  int digits;
  std::vector<int8_t> values;  // [M][digits][stride]
  std::vector<int32_t> sums;   // [M][digits][R]
  std::vector<float> steps;    // [M]

  // An odd number of cache lines: rows a power of two apart would share few places in the cache.
  Tokens(int64_t count, int64_t inputs, int64_t groups, int digits)
      : inputs(inputs), groups(groups), stride(((inputs + kLine - 1) / kLine | 1) * kLine),
        digits(digits), values(count * digits * stride), sums(count * digits * groups),
        steps(count) {}

  int8_t* value(int64_t token, int digit) {
    return values.data() + (token * digits + digit) * stride;
  }
  int32_t* sum(int64_t token, int digit) { return sums.data() + (token * digits + digit) * groups; }
};

// The largest magnitude of a token; NaN if it holds NaN or an infinity.
float range(const float* x, int64_t inputs) {
  Floats largest = {}, none = {};
  for (int64_t k = 0; k < inputs; k += kLanes) {
    const Floats value = load_floats(x + k);
    const Floats magnitude = value < 0 ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
    none += value * 0.0f;
  }
  float found = 1e-30f;
  for (int i = 0; i < kLanes; ++i) found = std::max(found, largest[i]);
  return found + sum(none);
}

void split(const float* x, Tokens& tokens, int64_t token) {
  const float largest = range(x, tokens.inputs);
  tokens.steps[token] = largest / kLargest;
  if (std::isnan(largest)) return;  // its digits stay 0, and its step makes NaN of them
  const int64_t size = tokens.inputs / tokens.groups;
  std::vector<float> rest(size);
  for (int64_t g = 0; g < tokens.groups; ++g) {
    for (int64_t k = 0; k < size; ++k) rest[k] = x[g * size + k] / tokens.steps[token];
    for (int digit = 0; digit < tokens.digits; ++digit) {
      int8_t* target = tokens.value(token, digit) + g * size;
      int32_t sum = 0;
      for (int64_t k = 0; k < size; ++k) {
        const float whole = std::nearbyint(rest[k]);
        const int32_t code = static_cast<int32_t>(whole);
        rest[k] = (rest[k] - whole) * kBase;
        target[k] = static_cast<int8_t>(code);
        sum += code;
      }
      tokens.sum(token, digit)[g] = sum;
    }
  }
}

template <typename Scale>
struct Weights {
  const uint8_t* codes;
  const Scale* scale;
  const uint8_t* zero;  // or null for 8
  int64_t outputs, inputs, groups;
};

inline int32_t load_word(const int8_t* digits) {
  int32_t word;
  std::memcpy(&word, digits, sizeof(word));
  return word;
}

// A block of rows times `Count` tokens.
template <int Count, int Digits, typename Scale>
void multiply_block(const Weights<Scale>& w, Tokens& tokens, int64_t first, int64_t block,
                    float* y) {
  // Few sums would wait for each other's last addition, so nibbles get sums of their own.
  constexpr int kWays = Count * Digits <= 4 ? 2 : 1;
  const int64_t chunks = w.inputs / w.groups / kChunk;
  const uint8_t* codes = w.codes + block * kRows * (w.inputs / 2);
  const int8_t* digits[Count][Digits];
  for (int m = 0; m < Count; ++m)
    for (int d = 0; d < Digits; ++d) digits[m][d] = tokens.value(first + m, d);
  Floats totals[Count] = {};
  int64_t k = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (block * w.groups + g) * kRows;
    const Ints zero = w.zero ? load_ints(w.zero + at) : Ints{} + 8;
    Ints sums[Count][Digits][kWays] = {};
    for (int m = 0; m < Count; ++m)
      for (int d = 0; d < Digits; ++d) sums[m][d][0] -= zero * tokens.sum(first + m, d)[g];
    for (int64_t c = 0; c < chunks; ++c, codes += kRows * kChunk / 2, k += kChunk) {
      const Bytes bytes = load<Bytes>(codes);
      __builtin_prefetch(codes + kAhead);
      const Bytes low = bytes & 15, high = bytes >> 4;
      for (int m = 0; m < Count; ++m) {
        for (int d = 0; d < Digits; ++d) {
          Ints* sum = sums[m][d];
          const int8_t* x = digits[m][d] + k;
          sum[0] = add_products(sum[0], low, load_word(x));
          sum[kWays - 1] = add_products(sum[kWays - 1], high, load_word(x + kChunk / 2));
        }
      }
    }
    const Floats scale = load_floats(w.scale + at);
    for (int m = 0; m < Count; ++m) {
      Floats whole = {};
      for (int d = Digits - 1; d >= 0; --d) {
        const Ints sum = kWays == 2 ? sums[m][d][0] + sums[m][d][kWays - 1] : sums[m][d][0];
        whole = whole * (1 / kBase) + __builtin_convertvector(sum, Floats);
      }
      totals[m] += whole * scale;
    }
  }
  const int64_t row = block * kRows, rows = std::min<int64_t>(kRows, w.outputs - row);
  for (int m = 0; m < Count; ++m) {
    const Floats result = totals[m] * tokens.steps[first + m];
    std::memcpy(y + (first + m) * w.outputs + row, &result, rows * sizeof(float));
  }
}

template <int Count, int Digits, typename Scale>
int64_t multiply_tiles(const Weights<Scale>& w, Tokens& tokens, int64_t first, int64_t count,
                       int64_t begin, int64_t end, float* y) {
  for (; first + Count <= count; first += Count)
    for (int64_t block = begin; block < end; ++block)
      multiply_block<Count, Digits>(w, tokens, first, block, y);
  return first;
}

template <int Digits, typename Scale>
void multiply(const Weights<Scale>& w, const float* x, int64_t count, float* y, int threads) {
  constexpr int kTile = 16 / Digits;  // its sums and totals stay in 32 registers
  Tokens tokens(count, w.inputs, w.groups, Digits);
  const int64_t blocks = (w.outputs + kRows - 1) / kRows;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < count; ++m) split(x + m * w.inputs, tokens, m);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < blocks; begin += kTaskBlocks) {
      const int64_t end = std::min(begin + kTaskBlocks, blocks);
      int64_t m = multiply_tiles<kTile, Digits>(w, tokens, 0, count, begin, end, y);
      m = multiply_tiles<kTile / 2, Digits>(w, tokens, m, count, begin, end, y);
      if (kTile > 4) m = multiply_tiles<2, Digits>(w, tokens, m, count, begin, end, y);
      multiply_tiles<1, Digits>(w, tokens, m, count, begin, end, y);
    }
  }
}

template <typename Scale>
void multiply(const float* x, const uint8_t* codes, const Scale* scale, const uint8_t* zero,
              float* y, int64_t count, int64_t outputs, int64_t inputs, int64_t groups, int digits,
              int threads) {
  const Weights<Scale> w{codes, scale, zero, outputs, inputs, groups};
  digits == 2 ? multiply<2>(w, x, count, y, threads) : multiply<4>(w, x, count, y, threads);
}

}  // namespace

// y fp32 [M][N] of x fp32 [M][K]; digits are 2 or 4, groups multiples of 32 inputs.
extern "C" void yi_int4_multiply_fp16(const float* x, const uint8_t* codes, const Fp16* scale,
                                      const uint8_t* zero, float* y, int64_t count,
                                      int64_t outputs, int64_t inputs, int64_t groups, int digits,
                                      int threads) {
  multiply(x, codes, scale, zero, y, count, outputs, inputs, groups, digits, threads);
}

extern "C" void yi_int4_multiply_fp32(const float* x, const uint8_t* codes, const float* scale,
                                      const uint8_t* zero, float* y, int64_t count,
                                      int64_t outputs, int64_t inputs, int64_t groups, int digits,
                                      int threads) {
  multiply(x, codes, scale, zero, y, count, outputs, inputs, groups, digits, threads);
}

// From the engine file's rows [N][K/2] in nibble blocks: byte j of a block holds input j in its low
// and input block/2 + j in its high nibble. `packed` is whole blocks of rows, zeros where none are.
extern "C" void yi_int4_pack(const uint8_t* codes, uint8_t* packed, int64_t outputs,
                             int64_t inputs, int64_t block) {
  const int64_t half = block / 2, chunks = inputs / kChunk;
  for (int64_t n = 0; n < outputs; ++n) {
    const uint8_t* row = codes + n * (inputs / 2);
    uint8_t* target = packed + n / kRows * kRows * (inputs / 2) + n % kRows * 4;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t k = c * kChunk, offset = k % block;
      uint64_t eight;
      std::memcpy(&eight, row + k / block * half + offset % half, sizeof(eight));
      eight = eight >> (offset < half ? 0 : 4) & 0x0f0f0f0f0f0f0f0fu;
      const uint32_t four = static_cast<uint32_t>(eight | eight >> 28);
      std::memcpy(target + c * kRows * 4, &four, sizeof(four));
    }
  }
}
