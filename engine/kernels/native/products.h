// Products of tokens with codes of a few bits, by a CPU's byte-product instructions.
//
// y[m][n] = sum over groups g of scale[n][g] * step[m][g] * sum over inputs k of g of
//           (code[n][k] - zero[n][g]) * (digit0[m][k] + digit1[m][k] / 254 + ...)
//
// Sums of products of digits and codes are exact, and are added up in the same order however many
// tokens there are. SwiGLU and a residual are applied to the sums, which are rounded once.
//
// Rows are packed in blocks of 16, a lane a row, the last block filled up with zeros: a digit is
// broadcast to 16 rows, and no sum is added up across lanes.

#pragma once

#include "tokens.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Where results go: y[m][n] of `dtype`, with N = `width`; `apart` blocks of rows lie between a gate
// and its partner, 0 for no SwiGLU.
struct Target {
  void* y;
  const void* residual;
  int64_t width, apart;
  int dtype;

  void store(int64_t token, int64_t block, Floats v) const {
    if (dtype == kFp32) return store_as<float>(token, block, v);
    dtype == kFp16 ? store_as<Fp16>(token, block, v) : store_as<Bf16>(token, block, v);
  }

  template <typename T>
  void store_as(int64_t token, int64_t block, Floats v) const {
    const int64_t at = token * width + block * kLanes, rows = width - block * kLanes;
    if (residual) v += load_some(static_cast<const T*>(residual) + at, rows);
    store_some(static_cast<T*>(y) + at, v, rows);
  }
};

// A packed matrix, as native/product.py has it: N = `outputs`, K = `inputs`.
struct Matrix {
  const uint8_t* codes;      // blocks of 16 rows
  const void* scale;         // [N/16][R][16] fp16 or fp32
  const uint8_t* zero;       // as scale, or null for the codes' middle
  const float *multiplier, *divisor, *given_scale;  // of tokens, see Source
  int64_t outputs, inputs, groups;
  float least_range;
};

// Tokens, what is around their product, and the number of digits they are written with.
struct Call {
  const void *x, *norm_weight, *residual;
  void* y;
  int64_t count;
  float eps;
  int dtype, digits, is_gated, threads;
};

namespace {

constexpr int kRows = kLanes;
constexpr int64_t kLine = 64;   // bytes of codes for a block's next inputs
constexpr int kAhead = 4096;    // bytes from the codes in use to those fetched meanwhile
constexpr int kTaskBlocks = 4;  // blocks of rows that a tile is multiplied with in turn
// Words of a tile side by side: as many sums as half of the registers hold.
#if defined(__AVX512F__)
constexpr int kWords = 16;
#else
constexpr int kWords = 4;
#endif

// Two nibbles a byte, of inputs 0...3 the low ones, of 4...7 the high ones.
struct Nibbles {
  static constexpr int kFours = 2, kLargest = 15, kZero = 8;
  static void read(const uint8_t* codes, Bytes* fours) {
    const Bytes bytes = load<Bytes>(codes);
    fours[0] = bytes & 15;
    fours[1] = bytes >> 4;
  }
};

// Signed bytes plus 128.
struct WholeBytes {
  static constexpr int kFours = 1, kLargest = 255, kZero = 128;
  static void read(const uint8_t* codes, Bytes* fours) { fours[0] = load<Bytes>(codes); }
};

#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
template <int Largest>
inline __m256i add_fours(__m256i sums, __m256i codes, __m256i digits) {
  if (Largest < 128) {
    // 2 * 127 * 127 fits in 16 bits, so nothing saturates.
    const __m256i pairs = _mm256_maddubs_epi16(codes, digits);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(digits, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8),
                                        _mm256_srai_epi16(digits, 8));
  return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
}
#endif

// Adds, for each row, the products of its four codes 0...Largest with the four digits of `word`.
template <int Largest>
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
    halves[i] = add_fours<Largest>(halves[i], bytes[i], _mm256_set1_epi32(word));
#endif
  }
  std::memcpy(&sums, halves, sizeof(sums));
  return sums;
#else
  int8_t digits[4];
  std::memcpy(digits, &word, sizeof(word));
  const Ints fours = reinterpret_cast<Ints>(codes);
  for (int i = 0; i < 4; ++i) sums += (fours >> (8 * i) & Largest) * digits[i];
  return sums;
#endif
}

template <typename Scale>
struct Weights {
  const uint8_t* codes;  // [blocks][R][lines of a group][64]
  const Scale* scale;    // [blocks][R][16]
  const uint8_t* zero;   // as scale, or null for the codes' middle
  int64_t groups, lines;
};

// A block of rows times a tile of `Count` tokens.
template <typename Codes, int Count, int Digits_, typename Scale>
void multiply_block(const Weights<Scale>& w, const Digits& tile, int64_t block, Floats* totals) {
  constexpr int kWidth = Count * Digits_;
  // Few sums would wait for each other's last addition, so each four inputs get sums of their own.
  constexpr int kWays = kWidth <= 4 ? Codes::kFours : 1;
  const uint8_t* codes = w.codes + block * w.groups * w.lines * kLine;
  const int32_t* words = tile.words;
  for (int m = 0; m < Count; ++m) totals[m] = Floats{};
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (block * w.groups + g) * kRows;
    const Ints zero = w.zero ? load_ints(w.zero + at) : Ints{} + Codes::kZero;
    Ints sums[kWidth][kWays] = {};
    for (int i = 0; i < kWidth; ++i) sums[i][0] -= zero * tile.sums[g * kWidth + i];
    for (int64_t line = 0; line < w.lines; ++line, codes += kLine) {
      Bytes fours[Codes::kFours];
      Codes::read(codes, fours);
      __builtin_prefetch(codes + kAhead);
      for (int j = 0; j < Codes::kFours; ++j, words += kWidth)
        for (int i = 0; i < kWidth; ++i) {
          Ints& sum = sums[i][j % kWays];
          sum = add_products<Codes::kLargest>(sum, fours[j], words[i]);
        }
    }
    const Floats scale = load_floats(w.scale + at);
    for (int m = 0; m < Count; ++m) {
      Floats whole = {};
      for (int d = Digits_ - 1; d >= 0; --d) {
        Ints sum = sums[m * Digits_ + d][0];
        for (int way = 1; way < kWays; ++way) sum += sums[m * Digits_ + d][way];
        whole = whole * (1 / kBase) + __builtin_convertvector(sum, Floats);
      }
      totals[m] += whole * scale * tile.steps[g * Count + m];
    }
  }
}

inline Floats silu(Floats x) {
  const Floats small = exponential(x < 0 ? x : -x);
  return x * (x < 0 ? small : Floats{} + 1.0f) / (small + 1.0f);
}

// Blocks begin...end - 1 of the target times a tile, whose size is a power of two up to Count.
template <typename Codes, int Count, int Digits_, typename Scale>
void multiply_tile(const Weights<Scale>& w, const Tile& tile, const Digits& digits,
                   const Target& target, int64_t begin, int64_t end) {
  if constexpr (Count > 1) {
    if (tile.size < Count) {
      multiply_tile<Codes, Count / 2, Digits_>(w, tile, digits, target, begin, end);
      return;
    }
  }
  Floats totals[2][kTaskBlocks][Count];
  for (int part = 0; part < (target.apart ? 2 : 1); ++part)
    for (int64_t b = begin; b < end; ++b)
      multiply_block<Codes, Count, Digits_>(w, digits, part * target.apart + b,
                                            totals[part][b - begin]);
  for (int64_t b = begin; b < end; ++b)
    for (int m = 0; m < Count; ++m) {
      const Floats y = totals[0][b - begin][m];
      target.store(tile.first + m, b, target.apart ? silu(y) * totals[1][b - begin][m] : y);
    }
}

template <typename Codes, int Digits_, typename Scale>
void multiply(const Source& source, const Weights<Scale>& w, const Target& target, int threads) {
  constexpr int kTile = kWords / Digits_;
  Tokens tokens(source, Digits_, kTile, Codes::kFours * kFour);
  const int64_t tiles = tokens.tiles.size();
  const int64_t blocks = target.apart ? target.apart : (target.width + kRows - 1) / kRows;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) tokens.fill(tokens.tiles[t]);
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < blocks; begin += kTaskBlocks)
      for (const Tile& tile : tokens.tiles)
        multiply_tile<Codes, kTile, Digits_>(w, tile, tokens.digits(tile), target, begin,
                                             std::min(begin + kTaskBlocks, blocks));
  }
}

template <typename Codes, typename Scale>
void multiply(const Matrix& m, const Call& call) {
  constexpr int64_t kChunk = Codes::kFours * kFour;
  const int64_t lines = (m.inputs / m.groups + kChunk - 1) / kChunk;
  const Weights<Scale> w{m.codes, static_cast<const Scale*>(m.scale), m.zero, m.groups, lines};
  const Source source{call.x,     call.norm_weight, m.multiplier, m.divisor,     m.given_scale,
                      call.count, m.inputs,         m.groups,     call.eps,      m.least_range,
                      call.dtype};
  const int64_t width = call.is_gated ? m.outputs / 2 : m.outputs;
  const Target target{call.y, call.residual, width, call.is_gated ? width / kRows : 0, call.dtype};
  if (call.digits == 1) return multiply<Codes, 1>(source, w, target, call.threads);
  if (call.digits == 2) return multiply<Codes, 2>(source, w, target, call.threads);
  multiply<Codes, 4>(source, w, target, call.threads);
}

}  // namespace

#define YI_MULTIPLY(name, Codes, Scale)                                                           \
  extern "C" void name(const Matrix* matrix, const void* x, const void* norm_weight, float eps,   \
                       const void* residual, void* y, int64_t count, int dtype, int digits,       \
                       int is_gated, int threads) {                                               \
    multiply<Codes, Scale>(*matrix, {x, norm_weight, residual, y, count, eps, dtype, digits,      \
                                     is_gated, threads});                                         \
  }
