// Sixteen numbers at a time, by the vector extensions of GCC and Clang: one register of AVX-512,
// two of AVX2, four of SSE and NEON.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kLanes = 16;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Quarters __attribute__((vector_size(kLanes)));

template <typename Vector>
inline Vector load(const void* address) {
  Vector v;
  std::memcpy(&v, address, sizeof(v));
  return v;
}

// Bits of the two 16-bit types, so that overloads tell them apart.
struct Fp16 { uint16_t bits; };
struct Bf16 { uint16_t bits; };

inline Floats load_floats(const float* address) { return load<Floats>(address); }

inline Floats load_floats(const Bf16* address) {
  return reinterpret_cast<Floats>(__builtin_convertvector(load<Halves>(address), Ints) << 16);
}

// Fraction and exponent moved to fp32's places give 2^-112 times the value, subnormals included.
inline Floats load_floats(const Fp16* address) {
  const Ints bits = __builtin_convertvector(load<Halves>(address), Ints);
  const Floats magnitude = reinterpret_cast<Floats>((bits & 0x7fff) << 13) * 0x1p112f;
  const Ints infinite = (bits & 0x7c00) == 0x7c00;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(magnitude) | (infinite & 0x7f800000) |
                                  (bits & 0x8000) << 16);
}

// Stores round to nearest, ties to even, as PyTorch's casts do; subnormal fp16 may be rounded twice.
inline void store_floats(float* address, Floats v) { std::memcpy(address, &v, sizeof(v)); }

template <int Dropped>
inline Ints round_bits(Ints bits) {
  return (bits + ((1 << (Dropped - 1)) - 1) + (bits >> Dropped & 1)) >> Dropped;
}

inline void store_halves(void* address, Ints magnitude, Ints sign) {
  const Halves halves = __builtin_convertvector(magnitude | sign, Halves);
  std::memcpy(address, &halves, sizeof(halves));
}

inline void store_floats(Bf16* address, Floats v) {
  const Ints bits = reinterpret_cast<Ints>(v), magnitude = bits & 0x7fffffff;
  const Ints rounded = magnitude > 0x7f800000 ? Ints{} + 0x7fc0 : round_bits<16>(magnitude);
  store_halves(address, rounded, bits >> 16 & 0x8000);
}

inline void store_floats(Fp16* address, Floats v) {
  const Ints bits = reinterpret_cast<Ints>(v), magnitude = bits & 0x7fffffff;
  const Floats scaled = reinterpret_cast<Floats>(magnitude) * 0x1p-112f;
  Ints rounded = round_bits<13>(reinterpret_cast<Ints>(scaled));
  rounded = rounded > 0x7c00 ? Ints{} + 0x7c00 : rounded;
  rounded = magnitude > 0x7f800000 ? Ints{} + 0x7e00 : rounded;
  store_halves(address, rounded, bits >> 16 & 0x8000);
}

// The first `count` of 16 numbers, zeros for the rest.
template <typename T>
inline Floats load_some(const T* address, int64_t count) {
  if (count >= kLanes) return load_floats(address);
  T padded[kLanes] = {};
  std::memcpy(padded, address, count * sizeof(T));
  return load_floats(padded);
}

template <typename T>
inline void store_some(T* address, Floats v, int64_t count) {
  if (count >= kLanes) return store_floats(address, v);
  T padded[kLanes];
  store_floats(padded, v);
  std::memcpy(address, padded, count * sizeof(T));
}

// As a store and a load would round it.
template <typename T>
inline Floats rounded(Floats v) {
  T stored[kLanes];
  store_floats(stored, v);
  return load_floats(stored);
}

inline Ints load_ints(const uint8_t* address) {
  return __builtin_convertvector(load<Quarters>(address), Ints);
}

// Halves are added to each other, in registers.
inline float sum(Floats v) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight eights[2];
  std::memcpy(eights, &v, sizeof(v));
  const Eight eight = eights[0] + eights[1];
  Four fours[2];
  std::memcpy(fours, &eight, sizeof(eight));
  const Four four = fours[0] + fours[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x for x <= 0, to 2 units in the last place; what would be subnormal is about 1e-38.
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats whole = __builtin_convertvector(power, Floats);
  const Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats y = Floats{} + 1.0f / 720;
  for (const float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = y * rest + coefficient;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(y) + (power << 23));
}

}  // namespace
