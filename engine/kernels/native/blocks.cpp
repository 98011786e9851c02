// The decoder layers of a step in one call, for a few tokens.
//
// Between two products that stream weights through the caches, an interpreter finds none of its own
// code and data there: what takes it microseconds else takes tens of them. Here nothing but the six
// kernels of a layer runs.

#include <cstdint>

namespace {

// As products.h, rowwise.cpp and attention.cpp define them.
using Multiply = void (*)(const void* matrix, const void* x, const void* norm_weight, float eps,
                          const void* residual, void* y, int64_t count, int dtype, int digits,
                          int is_gated, int threads);
using Write = void (*)(const void* q, const void* k, const void* v, int64_t q_stride,
                       int64_t k_stride, int64_t v_stride, const float* cos, const float* sin,
                       const int64_t* slots, void* q_out, void* k_cache, void* v_cache,
                       int64_t tokens, int64_t heads, int64_t groups, int64_t half,
                       int64_t block_tokens, int threads);
using Attend = void (*)(const void* q, const void* k, const void* v, const int32_t* table,
                        int64_t table_stride, const int32_t* lengths, int64_t window,
                        int64_t tokens, int64_t block_tokens, int64_t groups, int64_t heads,
                        int64_t width, float scale, void* o, int threads);

struct Product {
  Multiply multiply;
  const void* matrix;
  int64_t digits;
};

struct Block {
  Product qkv, out, gate_up, down;
  const void *attn_norm, *mlp_norm;
  void *k, *v;
};

// `h` is the stream that enters and leaves; the other buffers hold what passes between kernels:
// the stream half a layer on, the projection's rows, rotated queries, attention and MLP outputs.
struct Step {
  Write write;
  Attend attend;
  void *h, *middle, *qkv, *q, *o, *a;
  const float *cos, *sin;
  const int64_t* slots;
  const int32_t *table, *lengths;
  int64_t table_stride, window, tokens, heads, groups, head_size, block_tokens;
  float scale, eps;
  int32_t dtype, value_bytes, threads;
};

void multiply(const Product& product, const Step& s, const void* x, const void* norm_weight,
              const void* residual, void* y, int is_gated) {
  product.multiply(product.matrix, x, norm_weight, s.eps, residual, y, s.tokens, s.dtype,
                   static_cast<int>(product.digits), is_gated, s.threads);
}

}  // namespace

extern "C" void yi_run_blocks(const Block* blocks, int64_t count, const Step* step) {
  const Step& s = *step;
  const int64_t width = (s.heads + 2 * s.groups) * s.head_size;
  char* const q = static_cast<char*>(s.qkv);
  char* const k = q + s.heads * s.head_size * s.value_bytes;
  char* const v = k + s.groups * s.head_size * s.value_bytes;
  for (const Block* block = blocks; block != blocks + count; ++block) {
    multiply(block->qkv, s, s.h, block->attn_norm, nullptr, s.qkv, 0);
    s.write(q, k, v, width, width, width, s.cos, s.sin, s.slots, s.q, block->k, block->v, s.tokens,
            s.heads, s.groups, s.head_size / 2, s.block_tokens, s.threads);
    s.attend(s.q, block->k, block->v, s.table, s.table_stride, s.lengths, s.window, s.tokens,
             s.block_tokens, s.groups, s.heads / s.groups, s.head_size, s.scale, s.o, s.threads);
    multiply(block->out, s, s.o, nullptr, s.h, s.middle, 0);
    multiply(block->gate_up, s, s.middle, block->mlp_norm, nullptr, s.a, 1);
    multiply(block->down, s, s.a, nullptr, s.middle, s.h, 0);
  }
}
