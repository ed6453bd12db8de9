#include "gemm/amx.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gemm/packed.h"

namespace NW_ISA {
namespace {

// A tile is 16 rows of 64 bytes. Of a left-hand matrix: 16 rows, 32 neighbours in depth each. Of a right-hand one: 16
// pairs of neighbours in depth, each for 16 columns. Tiles that are multiplied one after the other lie so in memory:
// of the left-hand matrix all of one 16 rows, of the right-hand one the two of a panel side by side.
constexpr int64_t side = 16, deep = 32, area = side * deep;
// Rows of c that `multiply_transposed` makes ready at once.
constexpr int64_t transposed_rows = 128;

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The compiler does not know that tiles are loaded from memory: what was written there must have been.
NW_INLINE void written() { asm volatile("" ::: "memory"); }

// 16 neighbours, of which n exist, in bfloat16.
NW_INLINE half_vector rounded(const float* from, int64_t n) {
  const vec<float> v = n >= side ? load(from) : n > 0 ? load(from, Head{int(n)}) : vec<float>{};
  return (half_vector)_mm512_cvtneps_pbh((__m512)v);
}

// 32 neighbours in depth, of which n exist: a row of a left-hand tile.
NW_INLINE vec<float> tile_row(const float* from, int64_t n) {
  const half_vector halves[] = {rounded(from, n), rounded(from + side, n - side)};
  vec<float> row;
  std::memcpy(&row, halves, sizeof row);
  return row;
}

// Two neighbours in depth, of which n exist, of 16 columns: a row of a right-hand tile.
NW_INLINE vec<float> tile_pairs(const float* first, const float* second, int64_t n, int64_t columns) {
  const half_vector even = rounded(first, n > 0 ? columns : 0), odd = rounded(second, n > 1 ? columns : 0);
  return (vec<float>)(__builtin_convertvector(even, word_vector) | __builtin_convertvector(odd, word_vector) << 16);
}

NW_INLINE void store_row(uint16_t* to, vec<float> v) { store(reinterpret_cast<float*>(to), v); }

// Left-hand and right-hand tiles are each other's transposes, a pair being one element.
NW_INLINE void store_transposed(vec<float> (&square)[side], uint16_t* to) {
  transpose(square);
  for (int i = 0; i < side; ++i) store_row(to + i * deep, square[i]);
}

// c (+)= a * b for 2 tiles of rows, `a_next` elements apart, and one panel. `stride` is in bytes.
NW_INLINE void two_by_two(int64_t depth, const uint16_t* a, int64_t a_next, const uint16_t* b, float* c, int64_t stride,
                          bool add) {
  float* below = c + side * stride / int64_t(sizeof *c);
  if (add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + side, stride);
    _tile_loadd(2, below, stride);
    _tile_loadd(3, below + side, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; ++k, a += area, b += 2 * area) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + area, 64);
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + a_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + side, stride);
  _tile_stored(2, below, stride);
  _tile_stored(3, below + side, stride);
}

// The same for 1 tile of rows.
NW_INLINE void one_by_two(int64_t depth, const uint16_t* a, const uint16_t* b, float* c, int64_t stride, bool add) {
  if (add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + side, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t k = 0; k < depth; ++k, a += area, b += 2 * area) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + area, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + side, stride);
}

// f on `high` rows of one panel's columns of c, of which `rows` and `columns` exist: where they lie if all do, else on a
// copy.
template <class F>
NW_INLINE void on_whole(int64_t rows, int64_t columns, int64_t high, float* c, int64_t stride, bool add, F f) {
  constexpr int64_t wide = Tiles::panel_width;
  if (rows >= high && columns >= wide) return f(c, stride * int64_t(sizeof *c));
  alignas(64) float copy[2 * side * wide];
  if (rows > high) rows = high;
  if (columns > wide) columns = wide;
  for (int64_t r = 0; add && r < rows; ++r) std::memcpy(copy + r * wide, c + r * stride, size_t(columns) * sizeof *c);
  written();
  f(copy, wide * int64_t(sizeof *c));
  for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * stride, copy + r * wide, size_t(columns) * sizeof *c);
}

// All rows of `a` by panels first .. last-1.
void by_panels(const uint16_t* a, int64_t rows, const uint16_t* panels, int64_t depth, int64_t columns, int64_t first,
               int64_t last, float* c, int64_t stride, bool add) {
  constexpr int64_t width = Tiles::panel_width;
  const int64_t k = blocks(depth, deep), a_next = k * area, b_next = 2 * a_next;
  written();
  for (int64_t p = first; p < last; ++p) {
    const uint16_t* b = panels + p * b_next;
    for (int64_t row = 0; row < rows; row += 2 * side) {
      const uint16_t* left = a + row / side * a_next;
      const bool two = rows - row > side;
      on_whole(rows - row, columns - p * width, two ? 2 * side : side, c + row * stride + p * width, stride, add,
               [&](float* to, int64_t bytes) NW_LAMBDA {
                 two ? two_by_two(k, left, a_next, b, to, bytes, add) : one_by_two(k, left, b, to, bytes, add);
               });
    }
  }
}

}  // namespace

bool Tiles::here() {
  static const bool found = [] {
    unsigned a, b, c, d;
    constexpr unsigned tiles = 1u << 24 | 1u << 22;  // AMX-TILE and AMX-BF16
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // AVX512-BF16
    // The tiles are a part of the processor's state that Linux gives to a process that asks for it.
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return found;
}

void Tiles::begin() {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } tiles = {};
  tiles.palette = 1;
  for (int i = 0; i < 8; ++i) tiles.bytes[i] = 64, tiles.rows[i] = side;
  asm volatile("" : : "r"(&tiles) : "memory");  // GCC takes the instruction to read eight bytes
  _tile_loadconfig(&tiles);
}
void Tiles::end() { _tile_release(); }

int64_t Tiles::packed_bytes(int64_t depth, int64_t columns) {
  return blocks(columns, panel_width) * blocks(depth, deep) * 2 * area * int64_t(sizeof(uint16_t));
}

void Tiles::pack(const float* const* b, int64_t depth, int64_t columns, int64_t p, void* panels) {
  uint16_t* to = static_cast<uint16_t*>(panels) + p * blocks(depth, deep) * 2 * area;
  for (int64_t k = 0; k < depth; k += deep, to += 2 * area) {
    for (int64_t pair = 0; pair < side; ++pair) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t row = k + 2 * pair, column = p * panel_width + half * side, left = depth - row;
        const float *first = left > 0 ? b[row] + column : nullptr, *second = left > 1 ? b[row + 1] + column : nullptr;
        store_row(to + half * area + pair * deep, tile_pairs(first, second, left, columns - column));
      }
    }
  }
}

void Tiles::pack_transposed(const float* b, int64_t stride, int64_t depth, int64_t columns, int64_t p, void* panels) {
  uint16_t* to = static_cast<uint16_t*>(panels) + p * blocks(depth, deep) * 2 * area;
  for (int64_t k = 0; k < depth; k += deep, to += 2 * area) {
    for (int64_t half = 0; half < 2; ++half) {
      vec<float> square[side];
      for (int64_t i = 0; i < side; ++i) {
        const int64_t column = p * panel_width + half * side + i;
        square[i] = tile_row(b + column * stride + k, column < columns ? depth - k : 0);
      }
      store_transposed(square, to + half * area);
    }
  }
}

int64_t Tiles::left_bytes(int64_t rows, int64_t depth) {
  return blocks(rows, side) * blocks(depth, deep) * area * int64_t(sizeof(uint16_t));
}

Tiles::Left Tiles::left(int64_t rows, const float* a, int64_t stride, int64_t depth, void* memory) {
  uint16_t* to = static_cast<uint16_t*>(memory);
  for (int64_t row = 0; row < blocks(rows, side) * side; ++row) {
    uint16_t* at = to + row / side * blocks(depth, deep) * area + row % side * deep;
    for (int64_t k = 0; k < depth; k += deep, at += area) {
      store_row(at, tile_row(a + row * stride + k, row < rows ? depth - k : 0));
    }
  }
  return {to, rows};
}

void Tiles::multiply(const Left& a, const void* panels, int64_t depth, int64_t columns, int64_t first, int64_t last,
                     float* c, int64_t c_stride, bool add) {
  by_panels(a.tiles, a.rows, static_cast<const uint16_t*>(panels), depth, columns, first, last, c, c_stride, add);
}

int64_t Tiles::transposed_bytes(int64_t depth) { return left_bytes(transposed_rows, depth); }

void Tiles::multiply_transposed(const float* a, int64_t a_stride, const void* panels, int64_t depth, int64_t columns,
                                int64_t first, int64_t last, float* c, int64_t c_stride, bool add, void* memory) {
  const int64_t k_blocks = blocks(depth, deep);
  uint16_t* to = static_cast<uint16_t*>(memory);
  for (int64_t row = first; row < last; row += transposed_rows) {
    const int64_t rows = last - row < transposed_rows ? last - row : transposed_rows;
    // A depth's rows are taken in turn for all columns: they are a page apart.
    for (int64_t k = 0; k < k_blocks; ++k) {
      for (int64_t at = 0; at < rows; at += side) {
        vec<float> square[side];
        for (int64_t pair = 0; pair < side; ++pair) {
          const int64_t from = k * deep + 2 * pair;
          const float* first = a + from * a_stride + row + at;
          square[pair] = tile_pairs(first, first + a_stride, depth - from, rows - at);
        }
        store_transposed(square, to + (at / side * k_blocks + k) * area);
      }
    }
    by_panels(to, rows, static_cast<const uint16_t*>(panels), depth, columns, 0, blocks(columns, panel_width),
              c + row * c_stride, c_stride, add);
  }
}

}  // namespace NW_ISA
