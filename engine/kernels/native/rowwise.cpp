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

// Channel i of each head is rotated with channel i + half; heads are next to each other in x, and
// `apart` values from each other in y.
template <typename T>
void rotate_token(const T* x, const float* cos, const float* sin, T* y, int64_t heads, int64_t half,
                  int64_t apart) {
  for (int64_t h = 0; h < heads; ++h, x += 2 * half, y += apart) {
    for (int64_t c = 0; c < half; c += kLanes) {
      const Floats low = load_floats(x + c), high = load_floats(x + half + c);
      const Floats a = load_floats(cos + c), b = load_floats(sin + c);
      store_floats(y + c, low * a - high * b);
      store_floats(y + half + c, high * a + low * b);
    }
  }
}

template <typename T>
void rotate(const T* x, int64_t x_stride, const float* cos, const float* sin, T* y, int64_t tokens,
            int64_t heads, int64_t half, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > kFew) schedule(static)
  for (int64_t t = 0; t < tokens; ++t)
    rotate_token(x + t * x_stride, cos + t * half, sin + t * half, y + t * heads * 2 * half, heads,
                 half, 2 * half);
}

// q is rotated to q_out, k to its slot of the cache [blocks][G][block_tokens][D], and v goes to its
// own; tokens lie the strides apart, their heads are next to each other.
template <typename T>
void rotate_and_write(const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride,
                      int64_t v_stride, const float* cos, const float* sin, const int64_t* slots,
                      T* q_out, T* k_cache, T* v_cache, int64_t tokens, int64_t heads,
                      int64_t groups, int64_t half, int64_t block_tokens, int threads) {
  const int64_t width = 2 * half, apart = block_tokens * width;
#pragma omp parallel for num_threads(threads) if (tokens > kFew) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const float *a = cos + t * half, *b = sin + t * half;
    rotate_token(q + t * q_stride, a, b, q_out + t * heads * width, heads, half, width);
    if (slots[t] < 0) continue;
    const int64_t block = slots[t] / block_tokens, offset = slots[t] % block_tokens;
    const int64_t at = block * groups * apart + offset * width;
    rotate_token(k + t * k_stride, a, b, k_cache + at, groups, half, apart);
    for (int64_t g = 0; g < groups; ++g)
      std::memcpy(v_cache + at + g * apart, v + t * v_stride + g * width, width * sizeof(T));
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
  }                                                                                              \
  extern "C" void yi_rotate_and_write_##name(                                                    \
      const T* q, const T* k, const T* v, int64_t q_stride, int64_t k_stride, int64_t v_stride,  \
      const float* cos, const float* sin, const int64_t* slots, T* q_out, T* k_cache,            \
      T* v_cache, int64_t tokens, int64_t heads, int64_t groups, int64_t half,                   \
      int64_t block_tokens, int threads) {                                                       \
    rotate_and_write(q, k, v, q_stride, k_stride, v_stride, cos, sin, slots, q_out, k_cache,     \
                     v_cache, tokens, heads, groups, half, block_tokens, threads);               \
  }

YI_ROWWISE(fp32, float)
YI_ROWWISE(fp16, Fp16)
YI_ROWWISE(bf16, Bf16)
