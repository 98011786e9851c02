// Products of tokens with 4-bit weights, whose scales and zeros belong to groups of a multiple of 32
// inputs: see products.h.

#include "products.h"

YI_MULTIPLY(yi_int4_multiply_fp16, Nibbles, Fp16)
YI_MULTIPLY(yi_int4_multiply_fp32, Nibbles, float)

// From the engine file's rows [N][K/2] in nibble blocks: byte j of a block holds input j in its low
// and input block/2 + j in its high nibble. `packed` is whole blocks of rows, zeros where none are.
extern "C" void yi_int4_pack(const uint8_t* codes, uint8_t* packed, int64_t outputs,
                             int64_t inputs, int64_t block) {
  constexpr int64_t kChunk = 8;
  const int64_t half = block / 2, lines = inputs / kChunk;
  for (int64_t n = 0; n < outputs; ++n) {
    const uint8_t* row = codes + n * (inputs / 2);
    uint8_t* target = packed + n / kRows * kRows * (inputs / 2) + n % kRows * kFour;
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t k = line * kChunk, offset = k % block;
      uint64_t eight;
      std::memcpy(&eight, row + k / block * half + offset % half, sizeof(eight));
      eight = eight >> (offset < half ? 0 : 4) & 0x0f0f0f0f0f0f0f0fu;
      const uint32_t four = static_cast<uint32_t>(eight | eight >> 28);
      std::memcpy(target + line * kLine, &four, sizeof(four));
    }
  }
}
