// The precisions in which the recurrent kernels multiply matrices. All that they read and write in memory is float32;
// how operands are packed and multiplied in between is up to a policy, which has these members:
//
//   panel_width                     the columns of a panel of the right-hand matrix
//   packed_bytes                    the memory of all its panels
//   pack, pack_transposed           pack one panel from the matrix whose rows are b[0], b[1], ..., or from the
//                                   transpose of b[n * stride + k]
//   left_in_place                   whether left-hand rows are multiplied where they are, without packing
//   packed_left_bytes, pack_left    the memory of `rows` packed rows, aligned to 64 bytes; packs them
//   multiply                        c (+)= left * b for panels first .. last-1 of b
//   multiply_transposed             c (+)= a^T * b for rows first .. last-1 of c, using transposed_bytes of memory;
//                                   a is (depth, rows of c)
//   begin, end                      what each thread does before its first product and after its last
#pragma once

#include "gemm/packed.h"
#include "normwise.h"
#if defined(NW_AMX)
#include "gemm/amx.h"
#endif

namespace NW_ISA {
namespace {

struct Float32 {
  static constexpr int64_t panel_width = NW_ISA::panel_width;
  static constexpr bool left_in_place = true;
  struct Left {
    const float* a;
    int64_t rows, stride;
  };

  static int64_t packed_bytes(int64_t depth, int64_t columns) {
    return packed_size(depth, columns) * int64_t(sizeof(float));
  }
  static void pack(const float* const* b, int64_t depth, int64_t columns, int64_t panel, void* panels) {
    pack_panel(b, depth, columns, panel, static_cast<float*>(panels));
  }
  static void pack_transposed(const float* b, int64_t stride, int64_t depth, int64_t columns, int64_t panel,
                              void* panels) {
    NW_ISA::pack_transposed(b, stride, depth, columns, panel, static_cast<float*>(panels));
  }
  static int64_t packed_left_bytes(int64_t, int64_t) { return 0; }
  static Left pack_left(int64_t rows, const float* a, int64_t stride, int64_t, void*) {
    return {.a = a, .rows = rows, .stride = stride};
  }
  static void multiply(const Left& left, const void* panels, int64_t depth, int64_t columns, int64_t first,
                       int64_t last, float* c, int64_t c_stride, bool add) {
    NW_ISA::multiply(left.rows, left.a, left.stride,
                     {.data = static_cast<const float*>(panels), .depth = depth, .columns = columns}, first, last, c,
                     c_stride, add);
  }
  static int64_t transposed_bytes(int64_t depth) { return left_block * depth * int64_t(sizeof(float)); }
  static void multiply_transposed(const float* a, int64_t a_stride, const void* panels, int64_t depth, int64_t columns,
                                  int64_t first, int64_t last, float* c, int64_t c_stride, bool add, void* memory) {
    NW_ISA::multiply_transposed(
        a, a_stride, {.data = static_cast<const float*>(panels), .depth = depth, .columns = columns}, first, last, c,
        c_stride, add, static_cast<float*>(memory), [](vec<float> v) NW_LAMBDA { return v; });
  }
  static void begin() {}
  static void end() {}
};

// v rounded to bfloat16, as float.
NW_INLINE vec<float> rounded(vec<float> v) { return widen(narrow(v)); }

// Operands rounded to bfloat16 and multiplied in float32, for processors without bfloat16 instructions.
struct EmulatedBfloat16 : Float32 {
  static constexpr bool left_in_place = false;

  static void round_panel(int64_t depth, int64_t panel, void* panels) {
    float* at = static_cast<float*>(panels) + panel * panel_width * depth;
    for (int64_t i = 0; i < panel_width * depth; i += lanes<float>) store(at + i, rounded(load(at + i)));
  }
  static void pack(const float* const* b, int64_t depth, int64_t columns, int64_t panel, void* panels) {
    Float32::pack(b, depth, columns, panel, panels);
    round_panel(depth, panel, panels);
  }
  static void pack_transposed(const float* b, int64_t stride, int64_t depth, int64_t columns, int64_t panel,
                              void* panels) {
    Float32::pack_transposed(b, stride, depth, columns, panel, panels);
    round_panel(depth, panel, panels);
  }
  static int64_t packed_left_bytes(int64_t rows, int64_t depth) { return rows * depth * int64_t(sizeof(float)); }
  static Left pack_left(int64_t rows, const float* a, int64_t stride, int64_t depth, void* memory) {
    float* to = static_cast<float*>(memory);
    for (int64_t r = 0; r < rows; ++r) {
      for_each_vector<float>(depth, [&](int64_t k, auto part) NW_LAMBDA {
        store(to + r * depth + k, rounded(load(a + r * stride + k, part)), part);
      });
    }
    return {.a = to, .rows = rows, .stride = depth};
  }
  static void multiply_transposed(const float* a, int64_t a_stride, const void* panels, int64_t depth, int64_t columns,
                                  int64_t first, int64_t last, float* c, int64_t c_stride, bool add, void* memory) {
    NW_ISA::multiply_transposed(
        a, a_stride, {.data = static_cast<const float*>(panels), .depth = depth, .columns = columns}, first, last, c,
        c_stride, add, static_cast<float*>(memory), [](vec<float> v) NW_LAMBDA { return rounded(v); });
  }
};

// A right-hand matrix (depth, columns) in panels.
struct PackedMatrix {
  void* panels;
  int64_t depth, columns;
};

template <class P> inline int64_t panel_count_of(int64_t columns) {
  return (columns + P::panel_width - 1) / P::panel_width;
}

// At most this many left-hand rows are packed at once, so that they stay in the cache while the panels pass.
constexpr int64_t left_chunk_rows = 128;
template <class P> inline int64_t left_chunk_bytes(int64_t depth) {
  return P::packed_left_bytes(left_chunk_rows, depth);
}

// c (+)= a * b for panels first .. last-1 of b and any number of rows; `memory` holds left_chunk_bytes of b's depth. A
// matrix that is read at every step may just exceed a cache, which then holds nothing useful when the next step begins;
// with `reverse` at every other step, a step begins with the panels that the one before read last.
template <class P>
inline void multiply_rows(int64_t rows, const float* a, int64_t stride, const PackedMatrix& b, int64_t first,
                          int64_t last, float* c, int64_t c_stride, bool add, void* memory, bool reverse = false) {
  const int64_t rows_at_once = P::left_in_place ? rows : left_chunk_rows;
  constexpr int64_t panels_at_once = 8;
  for (int64_t row = 0; row < rows; row += rows_at_once) {
    const int64_t n = rows - row < rows_at_once ? rows - row : rows_at_once;
    const auto left = P::pack_left(n, a + row * stride, stride, b.depth, memory);
    const auto multiply_panels = [&](int64_t from, int64_t to) {
      P::multiply(left, b.panels, b.depth, b.columns, from, to, c + row * c_stride, c_stride, add);
    };
    if (!reverse) multiply_panels(first, last);
    for (int64_t to = last; reverse && to > first; to -= panels_at_once) {
      multiply_panels(to - panels_at_once > first ? to - panels_at_once : first, to);
    }
  }
}

// One thread's share of packing the matrix whose rows are b[0], b[1], ...
template <class P> inline void pack_share(const float* const* b, const PackedMatrix& to, int index, int count) {
  const int64_t n = panel_count_of<P>(to.columns);
  for (int64_t p = n * index / count; p < n * (index + 1) / count; ++p) P::pack(b, to.depth, to.columns, p, to.panels);
}
// The same for the transpose of weights (columns, depth).
template <class P> inline void pack_weights_share(const float* w, const PackedMatrix& to, int index, int count) {
  const int64_t n = panel_count_of<P>(to.columns);
  for (int64_t p = n * index / count; p < n * (index + 1) / count; ++p) {
    P::pack_transposed(w, to.depth, to.depth, to.columns, p, to.panels);
  }
}

// f(policy) for the precision that `products`, an nw_dtype, names.
template <class F> inline int with_precision(int products, bool use_amx, F f) {
#if defined(NW_AMX)
  if (use_amx && products == NW_BFLOAT16) return f(AmxBfloat16{});
#endif
  (void)use_amx;
  return products == NW_BFLOAT16 ? f(EmulatedBfloat16{}) : f(Float32{});
}

}  // namespace
}  // namespace NW_ISA
