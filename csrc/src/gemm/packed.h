// Matrix products for recurrent layers: a few rows times a matrix that many steps share, which is therefore packed
// once, in panels. At these sizes this is as fast as a BLAS or faster, and the results do not depend on the number of
// threads.
#pragma once

#include "common/simd.h"

namespace NW_ISA {
namespace {

// A panel is `panel_width` columns of the right-hand matrix, row after row; a tile is up to `tile_rows` rows of the
// left-hand one. Together their accumulators fill the registers, of which NEON has as many as AVX-512, but needs one for
// each row's number.
#if defined(NW_AVX512)
constexpr int tile_rows = 8;
#elif defined(__aarch64__)
constexpr int tile_rows = 6;
#else
constexpr int tile_rows = 4;
#endif
constexpr int panel_vectors = 3;
constexpr int panel_width = panel_vectors * lanes<float>;
// A transposed left-hand matrix is packed `left_tile_width` of its columns (a cache line) side by side, `left_block` at
// once.
constexpr int left_tile_width = 16, left_block = 64;
// Rows of a tile of that one: a whole number of them side by side.
constexpr int transposed_tile_rows = left_tile_width % tile_rows == 0 ? tile_rows : 4;

inline int64_t panel_count(int64_t columns) { return (columns + panel_width - 1) / panel_width; }
inline int64_t packed_size(int64_t depth, int64_t columns) { return panel_count(columns) * panel_width * depth; }

// c[r][0..n) (+)= sum over k of a(r, k) * b[k][0..n), r < R, n at most V vectors. a(r, k) is a[r * stride + k], or a[k
// * stride + r] where the left-hand matrix is transposed. For each k one cache line of the next panel is prefetched;
// not for a single row, which waits for b's lines anyway: one more request only delays them.
template <int R, int V, bool transposed, bool add>
NW_INLINE void tile(int64_t depth, const float* a, int64_t stride, const float* b, float* c, int64_t c_stride,
                    int64_t n, const float* next_panel) {
  vec<float> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = vec<float>{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    vec<float> right[V];
    if (R > 1) __builtin_prefetch(next_panel + k * left_tile_width, 0, 2);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + k * panel_width + v * lanes<float>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float left = transposed ? a[k * stride + r] : a[r * stride + k];
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
        const Partial part{int(left)};
        store(to, add ? load(to, part) + sum[r][v] : sum[r][v], part);
      }
    }
  }
}

template <int V, bool transposed, bool add>
void tile_for_rows(int rows, int64_t depth, const float* a, int64_t stride, const float* b, float* c, int64_t c_stride,
                   int64_t n, const float* next_panel) {
  switch (rows) {
    case 1: return tile<1, V, transposed, add>(depth, a, stride, b, c, c_stride, n, next_panel);
    case 2: return tile<2, V, transposed, add>(depth, a, stride, b, c, c_stride, n, next_panel);
    case 3: return tile<3, V, transposed, add>(depth, a, stride, b, c, c_stride, n, next_panel);
    case 4: return tile<4, V, transposed, add>(depth, a, stride, b, c, c_stride, n, next_panel);
#if defined(NW_AVX512) || defined(__aarch64__)
    case 5: return tile<5, V, transposed, add>(depth, a, stride, b, c, c_stride, n, next_panel);
    case 6: return tile<6, V, transposed, add>(depth, a, stride, b, c, c_stride, n, next_panel);
#endif
#if defined(NW_AVX512)
    case 7: return tile<7, V, transposed, add>(depth, a, stride, b, c, c_stride, n, next_panel);
    case 8: return tile<8, V, transposed, add>(depth, a, stride, b, c, c_stride, n, next_panel);
#endif
  }
}

// One tile times one panel. Columns past the matrix are not stored, and whole vectors of them are not computed.
template <bool transposed>
NW_INLINE void tile_by_panel(int rows, int64_t depth, const float* a, int64_t stride, const float* b, float* c,
                             int64_t c_stride, int64_t n, bool add, const float* next_panel) {
  if (n > 2 * lanes<float>) {
    add ? tile_for_rows<3, transposed, true>(rows, depth, a, stride, b, c, c_stride, n, next_panel)
        : tile_for_rows<3, transposed, false>(rows, depth, a, stride, b, c, c_stride, n, next_panel);
  } else if (n > lanes<float>) {
    add ? tile_for_rows<2, transposed, true>(rows, depth, a, stride, b, c, c_stride, n, next_panel)
        : tile_for_rows<2, transposed, false>(rows, depth, a, stride, b, c, c_stride, n, next_panel);
  } else {
    add ? tile_for_rows<1, transposed, true>(rows, depth, a, stride, b, c, c_stride, n, next_panel)
        : tile_for_rows<1, transposed, false>(rows, depth, a, stride, b, c, c_stride, n, next_panel);
  }
}

// A right-hand matrix (depth, columns) in panels.
struct Panels {
  const float* data;
  int64_t depth, columns;
  const float* at(int64_t panel) const { return data + panel * panel_width * depth; }
};

// Transposes a square of as many vectors as each has lanes: v[i][j] becomes v[j][i].
NW_INLINE void transpose(vec<float> (&v)[lanes<float>]) {
  constexpr int n = lanes<float>;
#pragma GCC unroll 4
  for (int half = 1; half < n; half *= 2) {
    const vmask<float> lane = iota<float>();
    const vmask<float> low = (lane & half) == 0 ? lane : lane + n - half;
    const vmask<float> high = (lane & half) == 0 ? lane + half : lane + n;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & half) continue;
      const vec<float> a = v[i], b = v[i + half];
      v[i] = shuffle<float>(a, b, low);
      v[i + half] = shuffle<float>(a, b, high);
    }
  }
}

// Packs panel `p` of the matrix whose rows are b[0], b[1], ...; columns past the matrix become 0.
inline void pack_panel(const float* const* b, int64_t depth, int64_t columns, int64_t p, float* panels) {
  const int64_t from = p * panel_width;
  const int64_t width = columns - from < panel_width ? columns - from : panel_width;
  float* to = panels + from * depth;
  if (width < panel_width) std::memset(to, 0, size_t(depth * panel_width) * sizeof *to);
  for (int64_t k = 0; k < depth; ++k) {
    std::memcpy(to + k * panel_width, b[k] + from, size_t(width) * sizeof *to);
  }
}

// Packs panel `p` of the transpose of b[n * stride + k].
inline void pack_transposed(const float* b, int64_t stride, int64_t depth, int64_t columns, int64_t p, float* panels) {
  constexpr int64_t w = lanes<float>;
  const int64_t from = p * panel_width;
  const int64_t width = columns - from < panel_width ? columns - from : panel_width;
  float* to = panels + from * depth;
  if (width < panel_width) std::memset(to, 0, size_t(depth * panel_width) * sizeof *to);
  int64_t n = 0;
  for (; n + w <= width; n += w) {
    int64_t k = 0;
    for (; k + w <= depth; k += w) {
      vec<float> square[w];
#pragma GCC unroll 16
      for (int64_t i = 0; i < w; ++i) square[i] = load(b + (from + n + i) * stride + k);
      transpose(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < w; ++i) store(to + (k + i) * panel_width + n, square[i]);
    }
    for (; k < depth; ++k) {
      for (int64_t i = n; i < n + w; ++i) to[k * panel_width + i] = b[(from + i) * stride + k];
    }
  }
  for (; n < width; ++n) {
    for (int64_t k = 0; k < depth; ++k) to[k * panel_width + n] = b[(from + n) * stride + k];
  }
}

// f(first row, rows) for `rows` rows divided into tiles of nearly equal height.
template <class F> NW_INLINE void for_each_tile(int64_t rows, F f) {
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
    // A matrix that does not fit in L2 comes from L3, which is too slow unless asked early: each tile prefetches its
    // share of the next panel.
    const float* next_panel = b.at(p + 1 < last ? p + 1 : first);
    for_each_tile(rows, [&](int64_t row, int height) NW_LAMBDA {
      tile_by_panel<false>(height, b.depth, a + row * stride, stride, b.at(p), c + row * c_stride + at, c_stride,
                           b.columns - at, add, next_panel);
      next_panel += b.depth * left_tile_width;
    });
  }
}

// c (+)= a^T * b for rows first .. last-1 of c. a is (b.depth, rows of c); `packed` holds left_block * b.depth
// elements, each of them `transform` of an element of a.
template <class Transform>
inline void multiply_transposed(const float* a, int64_t a_stride, const Panels& b, int64_t first, int64_t last,
                                float* c, int64_t c_stride, bool add, float* packed, Transform transform) {
  const int64_t strip_size = left_tile_width * b.depth;
  for (int64_t row = first; row < last; row += left_block) {
    const int64_t height = last - row < left_block ? last - row : left_block;
    for (int64_t k = 0; k < b.depth; ++k) {
      const float* from = a + k * a_stride + row;
      if (k + 8 < b.depth) {  // rows are a page apart, which the hardware prefetcher does not follow
        for (int64_t r = 0; r < height; r += left_tile_width) __builtin_prefetch(from + 8 * a_stride + r);
      }
      for_each_vector<float>(height, [&](int64_t r, auto part) NW_LAMBDA {
        store(packed + r / left_tile_width * strip_size + k * left_tile_width + r % left_tile_width,
              transform(load(from + r, part)), part);
      });
    }
    for (int64_t p = 0; p < panel_count(b.columns); ++p) {
      const int64_t at = p * panel_width;
      for (int64_t r = 0; r < height; r += transposed_tile_rows) {
        tile_by_panel<true>(int(height - r < transposed_tile_rows ? height - r : transposed_tile_rows), b.depth,
                            packed + r / left_tile_width * strip_size + r % left_tile_width, left_tile_width, b.at(p),
                            c + (row + r) * c_stride + at, c_stride, b.columns - at, add,
                            b.at(p + 1) + r / transposed_tile_rows * b.depth * left_tile_width);
      }
    }
  }
}

}  // namespace
}  // namespace NW_ISA
