// Operations that treat each token alone, in one pass over it: for few tokens they otherwise take
// longer than a small matrix product, being several calls each.
//
// Widths are multiples of 16; sums are fp32, and each result is rounded as PyTorch's steps do.

#include "norm.h"

namespace {

constexpr int64_t kFew = 8;  // tokens that are not worth waking other threads for

template <typename T>
void rms_norm(const T* x, const T* weight, T* y, int64_t tokens, int64_t width, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > kFew) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const T* from = x + t * width;
    T* to = y + t * width;
    const float factor = norm_factor(from, width, eps);
    for (int64_t e = 0; e < width; e += kLanes)
      store_floats(to + e, normed(from + e, weight + e, factor));
  }
}

// Channel i of each head is rotated with channel i + half; a token's heads are next to each other.
template <typename T>
void rotate(const T* x, int64_t x_stride, const float* cos, const float* sin, T* y, int64_t tokens,
            int64_t heads, int64_t half, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > kFew) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const T* from = x + t * x_stride + h * 2 * half;
      T* to = y + (t * heads + h) * 2 * half;
      for (int64_t c = 0; c < half; c += kLanes) {
        const Floats low = load_floats(from + c), high = load_floats(from + half + c);
        const Floats a = load_floats(cos + t * half + c), b = load_floats(sin + t * half + c);
        store_floats(to + c, low * a - high * b);
        store_floats(to + half + c, high * a + low * b);
      }
    }
  }
}

}  // namespace

#define YI_ROWWISE(name, T)                                                                      \
  extern "C" void yi_rms_norm_##name(const T* x, const T* weight, T* y, int64_t tokens,          \
                                     int64_t width, float eps, int threads) {                    \
    rms_norm(x, weight, y, tokens, width, eps, threads);                                         \
  }                                                                                              \
  extern "C" void yi_rotate_##name(const T* x, int64_t x_stride, const float* cos,               \
                                   const float* sin, T* y, int64_t tokens, int64_t heads,        \
                                   int64_t half, int threads) {                                  \
    rotate(x, x_stride, cos, sin, y, tokens, heads, half, threads);                              \
  }

YI_ROWWISE(fp32, float)
YI_ROWWISE(fp16, Fp16)
YI_ROWWISE(bf16, Bf16)
