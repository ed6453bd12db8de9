// In which arithmetic the recurrent kernels multiply matrices. All that they read and write in memory is float32; what
// lies between, the packed right-hand matrix and the left-hand rows made ready for it, is a policy's own affair:
//
//   panel_width                  columns of a panel of the right-hand matrix
//   packed_bytes, pack,          memory of all its panels; one of them from the matrix whose rows are b[0], b[1], ...,
//     pack_transposed            or from the transpose of b[n * stride + k]
//   as_they_are, left_bytes,     whether rows need no making ready; memory of `rows` of them, from alignment 64; and
//     left                       how it is done
//   multiply                     c (+)= left * b for panels first .. last-1 of b
//   multiply_transposed          c (+)= a^T * b for rows first .. last-1 of c, in transposed_bytes of memory; a is
//                                (depth, rows of c)
//   begin, end                   what each thread does before its first product and after its last
#pragma once

#include "gemm/packed.h"
#if defined(NW_TILES)
#include "gemm/amx.h"
#endif

namespace NW_ISA {
namespace {

struct Float32 {
  static constexpr int64_t panel_width = NW_ISA::panel_width;
  static constexpr bool as_they_are = true;
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
  static int64_t left_bytes(int64_t, int64_t) { return 0; }
  static Left left(int64_t rows, const float* a, int64_t stride, int64_t, void*) { return {a, rows, stride}; }
  static void multiply(const Left& left, const void* panels, int64_t depth, int64_t columns, int64_t first,
                       int64_t last, float* c, int64_t c_stride, bool add) {
    NW_ISA::multiply(left.rows, left.a, left.stride, {static_cast<const float*>(panels), depth, columns}, first, last,
                     c, c_stride, add);
  }
  static int64_t transposed_bytes(int64_t depth) { return left_block * depth * int64_t(sizeof(float)); }
  static void multiply_transposed(const float* a, int64_t a_stride, const void* panels, int64_t depth, int64_t columns,
                                  int64_t first, int64_t last, float* c, int64_t c_stride, bool add, void* memory) {
    NW_ISA::multiply_transposed(a, a_stride, {static_cast<const float*>(panels), depth, columns}, first, last, c,
                                c_stride, add, static_cast<float*>(memory), [](vec<float> v) NW_LAMBDA { return v; });
  }
  static void begin() {}
  static void end() {}
};

// What bfloat16 can hold, in float.
NW_INLINE vec<float> rounded(vec<float> v) { return widen(narrow(v)); }

// Operands rounded to bfloat16, as processors without instructions for it can do it: by the tiles of float32.
struct RoundedToBfloat16 : Float32 {
  static constexpr bool as_they_are = false;

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
  static int64_t left_bytes(int64_t rows, int64_t depth) { return rows * depth * int64_t(sizeof(float)); }
  static Left left(int64_t rows, const float* a, int64_t stride, int64_t depth, void* memory) {
    float* to = static_cast<float*>(memory);
    for (int64_t r = 0; r < rows; ++r) {
      sweep<float>(depth, [&](int64_t k, auto part) NW_LAMBDA {
        store(to + r * depth + k, rounded(load(a + r * stride + k, part)), part);
      });
    }
    return {to, rows, depth};
  }
  static void multiply_transposed(const float* a, int64_t a_stride, const void* panels, int64_t depth, int64_t columns,
                                  int64_t first, int64_t last, float* c, int64_t c_stride, bool add, void* memory) {
    NW_ISA::multiply_transposed(a, a_stride, {static_cast<const float*>(panels), depth, columns}, first, last, c,
                                c_stride, add, static_cast<float*>(memory),
                                [](vec<float> v) NW_LAMBDA { return rounded(v); });
  }
};

// A right-hand matrix (depth, columns) in panels.
struct Packed {
  void* panels;
  int64_t depth, columns;
};

template <class P> inline int64_t panels_of(int64_t columns) { return (columns + P::panel_width - 1) / P::panel_width; }

// At most so many rows are made ready at once, since they should stay in the cache while the panels pass.
constexpr int64_t ready_rows = 128;
template <class P> inline int64_t ready_bytes(int64_t depth) { return P::left_bytes(ready_rows, depth); }

// c (+)= a * b for panels first .. last-1 of b, any number of rows; `memory` holds ready_bytes of b's depth. A matrix
// that every step reads may just exceed a cache, which then holds nothing of it when the next step begins; with
// `backwards` at every other step that one begins with what the one before read last.
template <class P>
inline void multiply_rows(int64_t rows, const float* a, int64_t stride, const Packed& b, int64_t first, int64_t last,
                          float* c, int64_t c_stride, bool add, void* memory, bool backwards = false) {
  const int64_t each = P::as_they_are ? rows : ready_rows;
  constexpr int64_t group = 8;
  for (int64_t row = 0; row < rows; row += each) {
    const int64_t n = rows - row < each ? rows - row : each;
    const auto left = P::left(n, a + row * stride, stride, b.depth, memory);
    const auto part = [&](int64_t from, int64_t to) {
      P::multiply(left, b.panels, b.depth, b.columns, from, to, c + row * c_stride, c_stride, add);
    };
    if (!backwards) part(first, last);
    for (int64_t to = last; backwards && to > first; to -= group) part(to - group > first ? to - group : first, to);
  }
}

// One thread's part of packing the matrix whose rows are b[0], b[1], ...
template <class P> inline void pack_shared(const float* const* b, const Packed& to, int index, int count) {
  const int64_t n = panels_of<P>(to.columns);
  for (int64_t p = n * index / count; p < n * (index + 1) / count; ++p) P::pack(b, to.depth, to.columns, p, to.panels);
}
// The same of the transpose of weights (columns, depth).
template <class P> inline void pack_weights(const float* w, const Packed& to, int index, int count) {
  const int64_t n = panels_of<P>(to.columns);
  for (int64_t p = n * index / count; p < n * (index + 1) / count; ++p) {
    P::pack_transposed(w, to.depth, to.depth, to.columns, p, to.panels);
  }
}

}  // namespace
}  // namespace NW_ISA
