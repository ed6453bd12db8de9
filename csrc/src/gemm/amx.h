// Matrix products on the processor's tile registers (Intel AMX), which multiply bfloat16 and add in float32.
#pragma once

#include <cstdint>

namespace NW_ISA {

// A policy of precision.h, which documents its members. Operands are rounded to bfloat16; tiles take numbers below
// 2^-126 for 0.
struct AmxBfloat16 {
  static constexpr int64_t panel_width = 32;
  static constexpr bool left_in_place = false;

  struct Left {
    const uint16_t* tiles;
    int64_t rows;
  };

  // Whether this processor has tile registers and the system lets this process use them.
  static bool available();

  static void begin();
  static void end();

  static int64_t packed_bytes(int64_t depth, int64_t columns);
  static void pack(const float* const* b, int64_t depth, int64_t columns, int64_t p, void* panels);
  static void pack_transposed(const float* b, int64_t stride, int64_t depth, int64_t columns, int64_t p, void* panels);

  static int64_t packed_left_bytes(int64_t rows, int64_t depth);
  static Left pack_left(int64_t rows, const float* a, int64_t stride, int64_t depth, void* memory);

  static void multiply(const Left& a, const void* panels, int64_t depth, int64_t columns, int64_t first, int64_t last,
                       float* c, int64_t c_stride, bool add);

  static int64_t transposed_bytes(int64_t depth);
  static void multiply_transposed(const float* a, int64_t a_stride, const void* panels, int64_t depth, int64_t columns,
                                  int64_t first, int64_t last, float* c, int64_t c_stride, bool add, void* memory);
};

}  // namespace NW_ISA
