// Attention of the last token of each sequence over a paged cache of values, in one pass over it.
//
// o[h] = softmax(scale * q[h] . k[s]) v[s] over positions first...stop - 1, in fp32. Query head h reads
// kv head h / R. Keys and values are [blocks][G][block_tokens][D], D a multiple of 16.

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t kTile = 32;  // positions widened at a time, for all heads of a group

template <typename T>
struct Cache {
  const T* values;
  const int32_t* blocks;
  int64_t block_tokens, groups, width;

  // Positions start...start + count - 1 of a group, widened to [count][D].
  void read(int64_t group, int64_t start, int64_t count, float* target) const {
    for (int64_t s = start; s < start + count; ++s) {
      const int64_t block = blocks[s / block_tokens], offset = s % block_tokens;
      const T* from = values + ((block * groups + group) * block_tokens + offset) * width;
      for (int64_t d = 0; d < width; d += kLanes, target += kLanes) {
        const Floats v = load_floats(from + d);
        std::memcpy(target, &v, sizeof(v));
      }
    }
  }
};

template <int Count>
void score_positions(const float* q, const float* keys, int64_t width, float scale, float* scores) {
  Floats totals[Count] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Floats wanted = load_floats(q + d);
    for (int i = 0; i < Count; ++i) totals[i] += wanted * load_floats(keys + i * width + d);
  }
  for (int i = 0; i < Count; ++i) scores[i] = sum(totals[i]) * scale;
}

// Scores of `count` positions for each of the group's heads, [R][room].
void score(const float* q, const float* keys, int64_t heads, int64_t count, int64_t width,
           float scale, float* scores, int64_t room) {
  for (int64_t r = 0; r < heads; ++r, q += width, scores += room) {
    int64_t s = 0;
    for (; s + 4 <= count; s += 4)
      score_positions<4>(q, keys + s * width, width, scale, scores + s);
    for (; s < count; ++s) score_positions<1>(q, keys + s * width, width, scale, scores + s);
  }
}

// Scores to weights that add up to one. The places past `count` up to whole vectors become 0.
void normalise(float* scores, int64_t count) {
  Floats largest = Floats{} + scores[0], total = {};
  int64_t whole = 0;
  for (; whole + kLanes <= count; whole += kLanes) {
    const Floats v = load_floats(scores + whole);
    largest = v > largest ? v : largest;
  }
  for (int64_t s = whole; s < count; ++s) largest[0] = std::max(largest[0], scores[s]);
  for (int i = 1; i < kLanes; ++i) largest[0] = std::max(largest[0], largest[i]);
  for (int64_t s = 0; s < count; s += kLanes) {
    Floats v = exponential(load_floats(scores + s) - largest[0]);
    for (int64_t i = count - s; i < kLanes; ++i) v[i] = 0;
    total += v;
    store_floats(scores + s, v);
  }
  const float inverse = 1.0f / sum(total);
  for (int64_t s = 0; s < count; s += kLanes)
    store_floats(scores + s, load_floats(scores + s) * inverse);
}

template <int Vectors>
void add_vectors(const float* weights, const float* values, int64_t count, int64_t width, float* o) {
  Floats totals[Vectors];
  for (int i = 0; i < Vectors; ++i) totals[i] = load_floats(o + i * kLanes);
  for (int64_t s = 0; s < count; ++s)
    for (int i = 0; i < Vectors; ++i)
      totals[i] += weights[s] * load_floats(values + s * width + i * kLanes);
  for (int i = 0; i < Vectors; ++i) store_floats(o + i * kLanes, totals[i]);
}

void add_values(const float* weights, int64_t room, const float* values, int64_t heads,
                int64_t count, int64_t width, float* o) {
  for (int64_t r = 0; r < heads; ++r, weights += room, o += width) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes)
      add_vectors<4>(weights, values + d, count, width, o + d);
    for (; d < width; d += kLanes) add_vectors<1>(weights, values + d, count, width, o + d);
  }
}

template <typename T>
void attend_group(const T* q, const Cache<T>& keys, const Cache<T>& values, int64_t group,
                  int64_t heads, int64_t first, int64_t stop, float scale, T* o) {
  const int64_t count = stop - first, width = keys.width, size = heads * width;
  const int64_t room = (count + kLanes - 1) / kLanes * kLanes;
  std::vector<float> scores(heads * room), tile(kTile * width), wide(size), totals(size);
  for (int64_t d = 0; d < size; d += kLanes) store_floats(wide.data() + d, load_floats(q + d));
  for (int64_t s = 0; s < count; s += kTile) {
    const int64_t positions = std::min(kTile, count - s);
    keys.read(group, first + s, positions, tile.data());
    score(wide.data(), tile.data(), heads, positions, width, scale, scores.data() + s, room);
  }
  for (int64_t r = 0; r < heads; ++r) normalise(scores.data() + r * room, count);
  for (int64_t s = 0; s < count; s += kTile) {
    const int64_t positions = std::min(kTile, count - s);
    values.read(group, first + s, positions, tile.data());
    add_values(scores.data() + s, room, tile.data(), heads, positions, width, totals.data());
  }
  for (int64_t d = 0; d < size; d += kLanes) store_floats(o + d, load_floats(totals.data() + d));
}

template <typename T>
void attend(const T* q, const T* k, const T* v, const int32_t* table, int64_t table_stride,
            const int32_t* lengths, int64_t window, int64_t tokens, int64_t block_tokens,
            int64_t groups, int64_t heads, int64_t width, float scale, T* o, int threads) {
  const int64_t size = heads * width;
#pragma omp parallel for num_threads(threads) collapse(2) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t length = lengths[t], first = std::max<int64_t>(0, length - window);
      const Cache<T> keys{k, table + t * table_stride, block_tokens, groups, width};
      const Cache<T> values{v, table + t * table_stride, block_tokens, groups, width};
      const int64_t at = (t * groups + g) * size;
      if (length) attend_group(q + at, keys, values, g, heads, first, length, scale, o + at);
      else std::fill(o + at, o + at + size, T{});
    }
  }
}

}  // namespace

// q and o [tokens][G][R = heads][D = width]. Token t is the last of a sequence of lengths[t]
// positions, in the blocks that row t of the table lists; it sees `window` of them at most, and of
// none it gets zeros.
#define YI_ATTEND(name, T)                                                                         \
  extern "C" void yi_attend_##name(const T* q, const T* k, const T* v, const int32_t* table,       \
                                   int64_t table_stride, const int32_t* lengths, int64_t window,   \
                                   int64_t tokens, int64_t block_tokens, int64_t groups,           \
                                   int64_t heads, int64_t width, float scale, T* o, int threads) { \
    attend(q, k, v, table, table_stride, lengths, window, tokens, block_tokens, groups, heads,     \
           width, scale, o, threads);                                                              \
  }

YI_ATTEND(fp32, float)
YI_ATTEND(fp16, Fp16)
YI_ATTEND(bf16, Bf16)
