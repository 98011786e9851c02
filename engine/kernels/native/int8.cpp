// Products of tokens with 8-bit weights, one scale a row: see products.h.

#include "products.h"

YI_MULTIPLY(yi_int8_multiply, WholeBytes, float)

// From int8 rows [N][K]: a line of a block is the next 4 codes of each row, plus 128. `packed` is
// whole blocks of rows and whole lines, with any values where no codes are.
extern "C" void yi_int8_pack(const int8_t* codes, uint8_t* packed, int64_t outputs,
                             int64_t inputs) {
  const int64_t lines = (inputs + kFour - 1) / kFour;
  for (int64_t n = 0; n < outputs; ++n) {
    const int8_t* row = codes + n * inputs;
    uint8_t* target = packed + n / kRows * lines * kLine + n % kRows * kFour;
    for (int64_t line = 0; line < lines; ++line) {
      uint32_t four = 0;
      const int64_t k = line * kFour;
      std::memcpy(&four, row + k, std::min<int64_t>(kFour, inputs - k));
      four ^= 0x80808080u;
      std::memcpy(target + line * kLine, &four, sizeof(four));
    }
  }
}
