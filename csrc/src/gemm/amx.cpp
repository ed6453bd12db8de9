#include "gemm/amx.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "gemm/packed.h"

namespace NW_ISA {
namespace {

// A tile is 16 rows of 64 bytes. Of a left-hand matrix it holds 16 rows of 32 neighbours in depth, of a right-hand one
// 16 pairs of neighbours in depth for 16 columns each. Tiles that are multiplied in sequence are neighbours in memory:
// of the left-hand matrix all tiles of the same 16 rows, of the right-hand one the two tiles of a panel side by side.
constexpr int64_t amx_rows = 16, amx_depth = 32, amx_elements = amx_rows * amx_depth;
// The rows of c for which `multiply_transposed` packs the left-hand matrix at once.
constexpr int64_t transposed_rows = 128;

inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The compiler does not know that tiles are loaded from memory: everything written must be there before.
NW_INLINE void compiler_barrier() { asm volatile("" ::: "memory"); }

// 16 neighbours, of which n exist, in bfloat16.
NW_INLINE uint16_vector round_to_bf16(const float* from, int64_t n) {
  const vec<float> v = n >= amx_rows ? load(from) : n > 0 ? load(from, Partial{int(n)}) : vec<float>{};
  return (uint16_vector)_mm512_cvtneps_pbh((__m512)v);
}

// 32 neighbours in depth, of which n exist: a row of a left-hand tile.
NW_INLINE vec<float> tile_row(const float* from, int64_t n) {
  const uint16_vector halves[] = {round_to_bf16(from, n), round_to_bf16(from + amx_rows, n - amx_rows)};
  vec<float> row;
  std::memcpy(&row, halves, sizeof row);
  return row;
}

// Two neighbours in depth, of which n exist, of 16 columns: a row of a right-hand tile.
NW_INLINE vec<float> tile_pairs(const float* first, const float* second, int64_t n, int64_t columns) {
  const uint16_vector even = round_to_bf16(first, n > 0 ? columns : 0),
                      odd = round_to_bf16(second, n > 1 ? columns : 0);
  return (vec<float>)(__builtin_convertvector(even, uint32_vector) | __builtin_convertvector(odd, uint32_vector) << 16);
}

NW_INLINE void store_row(uint16_t* to, vec<float> v) { store(reinterpret_cast<float*>(to), v); }

// Left-hand and right-hand tiles are each other's transposes, a pair being one element.
NW_INLINE void store_transposed(vec<float> (&square)[amx_rows], uint16_t* to) {
  transpose(square);
  for (int i = 0; i < amx_rows; ++i) store_row(to + i * amx_depth, square[i]);
}

// c (+)= a * b for 2 tiles of rows, `a_next` elements apart, and one panel. `stride` is in bytes.
NW_INLINE void two_by_two(int64_t depth, const uint16_t* a, int64_t a_next, const uint16_t* b, float* c, int64_t stride,
                          bool add) {
  float* below = c + amx_rows * stride / int64_t(sizeof *c);
  if (add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + amx_rows, stride);
    _tile_loadd(2, below, stride);
    _tile_loadd(3, below + amx_rows, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; ++k, a += amx_elements, b += 2 * amx_elements) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + amx_elements, 64);
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + a_next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + amx_rows, stride);
  _tile_stored(2, below, stride);
  _tile_stored(3, below + amx_rows, stride);
}

// The same for 1 tile of rows.
NW_INLINE void one_by_two(int64_t depth, const uint16_t* a, const uint16_t* b, float* c, int64_t stride, bool add) {
  if (add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + amx_rows, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t k = 0; k < depth; ++k, a += amx_elements, b += 2 * amx_elements) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + amx_elements, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + amx_rows, stride);
}

// Runs f on `height` rows of one panel's columns of c, of which `rows` and `columns` exist: in place if all do, else on
// a copy.
template <class F>
NW_INLINE void on_full_tiles(int64_t rows, int64_t columns, int64_t height, float* c, int64_t stride, bool add, F f) {
  constexpr int64_t width = AmxBfloat16::panel_width;
  if (rows >= height && columns >= width) return f(c, stride * int64_t(sizeof *c));
  alignas(64) float copy[2 * amx_rows * width];
  if (rows > height) rows = height;
  if (columns > width) columns = width;
  for (int64_t r = 0; add && r < rows; ++r) std::memcpy(copy + r * width, c + r * stride, size_t(columns) * sizeof *c);
  compiler_barrier();
  f(copy, width * int64_t(sizeof *c));
  for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * stride, copy + r * width, size_t(columns) * sizeof *c);
}

// All rows of `a` by panels first .. last-1.
void multiply_panels(const uint16_t* a, int64_t rows, const uint16_t* panels, int64_t depth, int64_t columns,
                     int64_t first, int64_t last, float* c, int64_t stride, bool add) {
  constexpr int64_t width = AmxBfloat16::panel_width;
  const int64_t k = blocks(depth, amx_depth), a_next = k * amx_elements, b_next = 2 * a_next;
  compiler_barrier();
  for (int64_t p = first; p < last; ++p) {
    const uint16_t* b = panels + p * b_next;
    for (int64_t row = 0; row < rows; row += 2 * amx_rows) {
      const uint16_t* left = a + row / amx_rows * a_next;
      const bool two = rows - row > amx_rows;
      on_full_tiles(rows - row, columns - p * width, two ? 2 * amx_rows : amx_rows, c + row * stride + p * width,
                    stride, add, [&](float* to, int64_t bytes) NW_LAMBDA {
                      two ? two_by_two(k, left, a_next, b, to, bytes, add) : one_by_two(k, left, b, to, bytes, add);
                    });
    }
  }
}

}  // namespace

bool AmxBfloat16::available() {
  static const bool found = [] {
    unsigned a, b, c, d;
    constexpr unsigned tiles = 1u << 24 | 1u << 22;  // AMX-TILE and AMX-BF16
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // AVX512-BF16
    // Linux lets a process use the tile registers only after it has asked for permission.
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return found;
}

void AmxBfloat16::begin() {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } tiles = {};
  tiles.palette = 1;
  for (int i = 0; i < 8; ++i) tiles.bytes[i] = 64, tiles.rows[i] = amx_rows;
  asm volatile("" : : "r"(&tiles) : "memory");  // GCC assumes that the instruction reads eight bytes
  _tile_loadconfig(&tiles);
}
void AmxBfloat16::end() { _tile_release(); }

int64_t AmxBfloat16::packed_bytes(int64_t depth, int64_t columns) {
  return blocks(columns, panel_width) * blocks(depth, amx_depth) * 2 * amx_elements * int64_t(sizeof(uint16_t));
}

void AmxBfloat16::pack(const float* const* b, int64_t depth, int64_t columns, int64_t p, void* panels) {
  uint16_t* to = static_cast<uint16_t*>(panels) + p * blocks(depth, amx_depth) * 2 * amx_elements;
  for (int64_t k = 0; k < depth; k += amx_depth, to += 2 * amx_elements) {
    for (int64_t pair = 0; pair < amx_rows; ++pair) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t row = k + 2 * pair, column = p * panel_width + half * amx_rows, left = depth - row;
        const float *first = left > 0 ? b[row] + column : nullptr, *second = left > 1 ? b[row + 1] + column : nullptr;
        store_row(to + half * amx_elements + pair * amx_depth, tile_pairs(first, second, left, columns - column));
      }
    }
  }
}

void AmxBfloat16::pack_transposed(const float* b, int64_t stride, int64_t depth, int64_t columns, int64_t p,
                                  void* panels) {
  uint16_t* to = static_cast<uint16_t*>(panels) + p * blocks(depth, amx_depth) * 2 * amx_elements;
  for (int64_t k = 0; k < depth; k += amx_depth, to += 2 * amx_elements) {
    for (int64_t half = 0; half < 2; ++half) {
      vec<float> square[amx_rows];
      for (int64_t i = 0; i < amx_rows; ++i) {
        const int64_t column = p * panel_width + half * amx_rows + i;
        square[i] = tile_row(b + column * stride + k, column < columns ? depth - k : 0);
      }
      store_transposed(square, to + half * amx_elements);
    }
  }
}

int64_t AmxBfloat16::packed_left_bytes(int64_t rows, int64_t depth) {
  return blocks(rows, amx_rows) * blocks(depth, amx_depth) * amx_elements * int64_t(sizeof(uint16_t));
}

AmxBfloat16::Left AmxBfloat16::pack_left(int64_t rows, const float* a, int64_t stride, int64_t depth, void* memory) {
  uint16_t* to = static_cast<uint16_t*>(memory);
  for (int64_t row = 0; row < blocks(rows, amx_rows) * amx_rows; ++row) {
    uint16_t* at = to + row / amx_rows * blocks(depth, amx_depth) * amx_elements + row % amx_rows * amx_depth;
    for (int64_t k = 0; k < depth; k += amx_depth, at += amx_elements) {
      store_row(at, tile_row(a + row * stride + k, row < rows ? depth - k : 0));
    }
  }
  return {.tiles = to, .rows = rows};
}

void AmxBfloat16::multiply(const Left& a, const void* panels, int64_t depth, int64_t columns, int64_t first,
                           int64_t last, float* c, int64_t c_stride, bool add) {
  multiply_panels(a.tiles, a.rows, static_cast<const uint16_t*>(panels), depth, columns, first, last, c, c_stride, add);
}

int64_t AmxBfloat16::transposed_bytes(int64_t depth) { return packed_left_bytes(transposed_rows, depth); }

void AmxBfloat16::multiply_transposed(const float* a, int64_t a_stride, const void* panels, int64_t depth,
                                      int64_t columns, int64_t first, int64_t last, float* c, int64_t c_stride,
                                      bool add, void* memory) {
  const int64_t k_blocks = blocks(depth, amx_depth);
  uint16_t* to = static_cast<uint16_t*>(memory);
  for (int64_t row = first; row < last; row += transposed_rows) {
    const int64_t rows = last - row < transposed_rows ? last - row : transposed_rows;
    // All columns of a block of depth are packed before the next block: rows in depth are a page apart.
    for (int64_t k = 0; k < k_blocks; ++k) {
      for (int64_t at = 0; at < rows; at += amx_rows) {
        vec<float> square[amx_rows];
        for (int64_t pair = 0; pair < amx_rows; ++pair) {
          const int64_t from = k * amx_depth + 2 * pair;
          const float* first = a + from * a_stride + row + at;
          square[pair] = tile_pairs(first, first + a_stride, depth - from, rows - at);
        }
        store_transposed(square, to + (at / amx_rows * k_blocks + k) * amx_elements);
      }
    }
    multiply_panels(to, rows, static_cast<const uint16_t*>(panels), depth, columns, 0, blocks(columns, panel_width),
                    c + row * c_stride, c_stride, add);
  }
}

}  // namespace NW_ISA
