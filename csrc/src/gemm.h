// Matrix products for recurrent layers: few rows times a matrix that many steps share, so that one is packed once in
// panels. At these sizes this is as fast as a BLAS or faster, and a result's digits depend on no thread count.
#pragma once

#include "simd.h"

namespace NW_ISA {
namespace {

// A panel is `panel_width` columns of the right-hand matrix, row after row; a tile is up to `tile_rows` rows of the
// left-hand one. Together their accumulators fill the registers.
#if defined(NW_AVX512)
constexpr int tile_rows = 8;
#else
constexpr int tile_rows = 4;
#endif
constexpr int panel_vectors = 3;
constexpr int panel_width = panel_vectors * lanes<float>;
// Rows of the left-hand matrix that `pack_left` interleaves: a cache line of floats.
constexpr int left_width = 16;

inline int64_t panel_count(int64_t columns) { return (columns + panel_width - 1) / panel_width; }
inline int64_t packed_size(int64_t depth, int64_t columns) { return panel_count(columns) * panel_width * depth; }

// c[r][0..n) (+)= sum over k of a(r, k) * b[k][0..n), r < R, n at most V vectors. a(r, k) is a[r * stride + k], or
// a[k * left_width + r] where the left-hand matrix is packed.
template <int R, int V, bool packed, bool add>
NW_INLINE void tile(int64_t depth, const float* a, int64_t stride, const float* b, float* c, int64_t c_stride,
                    int64_t n) {
  vec<float> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = vec<float>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    vec<float> right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + k * panel_width + v * lanes<float>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float left = packed ? a[k * left_width + r] : a[r * stride + k];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_stride + v * lanes<float>;
      const int64_t left = n - v * lanes<float>;
      if (left >= lanes<float>) {
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);
      } else if (left > 0) {
        const Head head{int(left)};
        store(to, add ? load(to, head) + sum[r][v] : sum[r][v], head);
      }
    }
  }
}

template <int V, bool packed, bool add>
void tile_of(int rows, int64_t depth, const float* a, int64_t stride, const float* b, float* c, int64_t c_stride,
             int64_t n) {
  switch (rows) {
    case 1: return tile<1, V, packed, add>(depth, a, stride, b, c, c_stride, n);
    case 2: return tile<2, V, packed, add>(depth, a, stride, b, c, c_stride, n);
    case 3: return tile<3, V, packed, add>(depth, a, stride, b, c, c_stride, n);
    case 4: return tile<4, V, packed, add>(depth, a, stride, b, c, c_stride, n);
#if defined(NW_AVX512)
    case 5: return tile<5, V, packed, add>(depth, a, stride, b, c, c_stride, n);
    case 6: return tile<6, V, packed, add>(depth, a, stride, b, c, c_stride, n);
    case 7: return tile<7, V, packed, add>(depth, a, stride, b, c, c_stride, n);
    case 8: return tile<8, V, packed, add>(depth, a, stride, b, c, c_stride, n);
#endif
  }
}

// One tile against one panel; columns past the matrix are neither computed, where whole vectors of them are, nor stored.
template <bool packed>
NW_INLINE void tile_by_panel(int rows, int64_t depth, const float* a, int64_t stride, const float* b, float* c,
                             int64_t c_stride, int64_t n, bool add) {
  if (n > 2 * lanes<float>) {
    add ? tile_of<3, packed, true>(rows, depth, a, stride, b, c, c_stride, n)
        : tile_of<3, packed, false>(rows, depth, a, stride, b, c, c_stride, n);
  } else if (n > lanes<float>) {
    add ? tile_of<2, packed, true>(rows, depth, a, stride, b, c, c_stride, n)
        : tile_of<2, packed, false>(rows, depth, a, stride, b, c, c_stride, n);
  } else {
    add ? tile_of<1, packed, true>(rows, depth, a, stride, b, c, c_stride, n)
        : tile_of<1, packed, false>(rows, depth, a, stride, b, c, c_stride, n);
  }
}

// A right-hand matrix (depth, columns) in panels.
struct Panels {
  const float* data;
  int64_t depth, columns;
  const float* at(int64_t panel) const { return data + panel * panel_width * depth; }
};

// Panel `p` of the matrix b[k * k_stride + n * n_stride]; what is past its columns becomes 0.
inline void pack_panel(const float* b, int64_t k_stride, int64_t n_stride, int64_t depth, int64_t columns, int64_t p,
                       float* panels) {
  const int64_t from = p * panel_width;
  const int64_t width = columns - from < panel_width ? columns - from : panel_width;
  float* to = panels + from * depth;
  const float* source = b + from * n_stride;
  for (int64_t k = 0; k < depth; ++k, to += panel_width, source += k_stride) {
    if (n_stride == 1) {
      std::memcpy(to, source, size_t(width) * sizeof *to);
    } else {
      for (int64_t n = 0; n < width; ++n) to[n] = source[n * n_stride];
    }
    for (int64_t n = width; n < panel_width; ++n) to[n] = 0.f;
  }
}

// `rows` rows cut into tiles of nearly equal height: f(first row, rows).
template <class F> NW_INLINE void each_tile(int64_t rows, F f) {
  const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
    f(from, int(to - from));
  }
}

// c (+)= a * b for panels first .. last-1 of b.
inline void multiply(int64_t rows, const float* a, int64_t stride, const Panels& b, int64_t first, int64_t last,
                     float* c, int64_t c_stride, bool add) {
  for (int64_t p = first; p < last; ++p) {
    const int64_t at = p * panel_width;
    each_tile(rows, [&](int64_t row, int height) NW_LAMBDA {
      tile_by_panel<false>(height, b.depth, a + row * stride, stride, b.at(p), c + row * c_stride + at, c_stride,
                           b.columns - at, add);
    });
  }
}

// c (+)= a^T * b for rows first .. last-1 of c, `first` a multiple of left_width. a is (b.depth, rows of c);
// `packed` holds left_width * b.depth elements.
inline void multiply_transposed(const float* a, int64_t a_stride, const Panels& b, int64_t first, int64_t last,
                                float* c, int64_t c_stride, bool add, float* packed) {
  for (int64_t row = first; row < last; row += left_width) {
    const int64_t height = last - row < left_width ? last - row : left_width;
    for (int64_t k = 0; k < b.depth; ++k) {
      std::memcpy(packed + k * left_width, a + k * a_stride + row, size_t(height) * sizeof *packed);
    }
    for (int64_t p = 0; p < panel_count(b.columns); ++p) {
      const int64_t at = p * panel_width;
      for (int64_t r = 0; r < height; r += tile_rows) {
        tile_by_panel<true>(int(height - r < tile_rows ? height - r : tile_rows), b.depth, packed + r, 0, b.at(p),
                            c + (row + r) * c_stride + at, c_stride, b.columns - at, add);
      }
    }
  }
}

}  // namespace
}  // namespace NW_ISA
