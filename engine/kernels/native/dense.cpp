// Products of a few tokens with a dense matrix, as fast as memory gives the matrix.
//
// y[m][n] = sum over k of w[n][k] * x[m][k], added up in fp32 in the same order however many tokens
// there are. w [N][K] in rows, as the engine file has them.

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int kStreams = 4;   // rows that share a load of x
constexpr int kAhead = 2048;  // bytes from the weights in use to those fetched meanwhile

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float to_float(Fp16 x) {
  Fp16 padded[kLanes] = {x};
  return load_floats(padded)[0];
}

// Rows 0, `apart`, 2 `apart`... of w: each is a stream of its own through memory.
template <int Rows, int Count, typename Weight>
void multiply_rows(const Weight* w, int64_t apart, const float* x, float* y, int64_t outputs,
                   int64_t inputs) {
  Floats totals[Rows][Count] = {};
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    for (int r = 0; r < Rows; ++r) {
      const Weight* row = w + r * apart * inputs + k;
      __builtin_prefetch(reinterpret_cast<const char*>(row) + kAhead);
      const Floats weights = load_floats(row);
      for (int m = 0; m < Count; ++m) totals[r][m] += weights * load_floats(x + m * inputs + k);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    const Weight* row = w + r * apart * inputs;
    for (int m = 0; m < Count; ++m) {
      float total = sum(totals[r][m]);
      for (int64_t i = k; i < inputs; ++i) total += to_float(row[i]) * x[m * inputs + i];
      y[m * outputs + r * apart] = total;
    }
  }
}

template <int Rows, typename Weight>
void multiply_tokens(const Weight* w, int64_t apart, const float* x, float* y, int64_t count,
                     int64_t outputs, int64_t inputs) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4)
    multiply_rows<Rows, 4>(w, apart, x + m * inputs, y + m * outputs, outputs, inputs);
  for (; m + 2 <= count; m += 2)
    multiply_rows<Rows, 2>(w, apart, x + m * inputs, y + m * outputs, outputs, inputs);
  for (; m < count; ++m)
    multiply_rows<Rows, 1>(w, apart, x + m * inputs, y + m * outputs, outputs, inputs);
}

template <typename Weight>
void multiply(const float* x, const Weight* w, float* y, int64_t count, int64_t outputs,
              int64_t inputs, int threads) {
  const int64_t apart = outputs / kStreams;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < apart; ++n)
    multiply_tokens<kStreams>(w + n * inputs, apart, x, y + n, count, outputs, inputs);
  for (int64_t n = kStreams * apart; n < outputs; ++n)
    multiply_tokens<1>(w + n * inputs, 0, x, y + n, count, outputs, inputs);
}

}  // namespace

// y fp32 [M][N] of x fp32 [M][K].
extern "C" void yi_dense_fp32(const float* x, const float* w, float* y, int64_t count,
                              int64_t outputs, int64_t inputs, int threads) {
  multiply(x, w, y, count, outputs, inputs, threads);
}

extern "C" void yi_dense_fp16(const float* x, const Fp16* w, float* y, int64_t count,
                              int64_t outputs, int64_t inputs, int threads) {
  multiply(x, w, y, count, outputs, inputs, threads);
}

extern "C" void yi_dense_bf16(const float* x, const Bf16* w, float* y, int64_t count,
                              int64_t outputs, int64_t inputs, int threads) {
  multiply(x, w, y, count, outputs, inputs, threads);
}
