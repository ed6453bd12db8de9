// Vectors one hardware register wide, for the instruction set that the including file is compiled for. A kernel is
// written once; the last vector of a run, of which only some lanes exist, goes through the same code as a Partial.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/cache.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef NW_ISA
#error "compile with -DNW_ISA=<avx512|avx2|baseline>: the namespace that separates the instruction sets"
#endif

#define NW_INLINE inline __attribute__((always_inline))
#define NW_NOINLINE __attribute__((noinline))
#define NW_LAMBDA __attribute__((always_inline))

// Everything has internal linkage: an inline function that the linker merged across instruction sets could put
// AVX-512 code into the baseline path.
namespace NW_ISA {
namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define NW_AVX512 1
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};

template <class T> struct ComputeType {
  using type = float;
};
template <> struct ComputeType<double> {
  using type = double;
};
template <class T> using compute_t = typename ComputeType<T>::type;

template <class C> struct Vector;
template <> struct Vector<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
  typedef int32_t mask __attribute__((vector_size(vector_bytes)));
};
template <> struct Vector<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
  typedef int64_t mask __attribute__((vector_size(vector_bytes)));
};
template <class C> using vec = typename Vector<C>::type;
template <class C> using vmask = typename Vector<C>::mask;
template <class C> constexpr int lanes = vector_bytes / int(sizeof(C));

// Which lanes of a vector exist: all of them, or the first n.
struct Full {};
struct Partial {
  int n;
};

template <class C> NW_INLINE vec<C> splat(C value) { return vec<C>{} + value; }

template <class C> NW_INLINE vmask<C> iota() {
  using Lane = decltype(vmask<C>{}[0] + 0);
  alignas(64) static constexpr Lane numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vmask<C> v;
  std::memcpy(&v, numbers, sizeof v);
  return v;
}

// Zeros in the lanes that do not exist.
template <class C> NW_INLINE vec<C> clear_tail(vec<C> v, Full) { return v; }
template <class C> NW_INLINE vec<C> clear_tail(vec<C> v, Partial part) { return iota<C>() < part.n ? v : vec<C>{}; }

// --- Loads from memory of type T into a vector of compute_t<T>, and stores. Lanes that do not exist read as 0, and
// their memory is not touched.

template <class V, class T> NW_INLINE V load_bytes(const T* p, Full = {}) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Copies the first n of up to `most` elements, a power of two; 0 <= n < most.
template <int most, class T> NW_INLINE void copy_first(T* to, const T* from, int n) {
#if defined(__AVX2__)
  std::memcpy(to, from, size_t(n) * sizeof(T));
#else
  // In halves of constant size, since a copy of a size known only at run time is a call.
  if constexpr (most > 1) {
    constexpr int half = most / 2;
    if (n >= half) {
      std::memcpy(to, from, half * sizeof(T));
      copy_first<half>(to + half, from + half, n - half);
    } else {
      copy_first<half>(to, from, n);
    }
  }
#endif
}
template <class V, class T> NW_INLINE V load_bytes(const T* p, Partial part) {
  V v{};
  copy_first<sizeof v / sizeof(T)>(reinterpret_cast<T*>(&v), p, part.n);
  return v;
}
template <class V, class T> NW_INLINE void store_first(T* p, V v, Partial part) {
  copy_first<sizeof v / sizeof(T)>(p, reinterpret_cast<const T*>(&v), part.n);
}

typedef uint16_t uint16_vector __attribute__((vector_size(vector_bytes / 2)));
typedef uint32_t uint32_vector __attribute__((vector_size(vector_bytes)));
#if defined(__AVX2__) && !defined(NW_AVX512)
// GCC 12 widens each half by itself, which takes four shuffles, and masks what fits before it narrows.
NW_INLINE uint32_vector widen_bits(uint16_vector h) { return (uint32_vector)_mm256_cvtepu16_epi32((__m128i)h); }
NW_INLINE uint16_vector narrow_bits(uint32_vector v) {
  return (uint16_vector)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
#else
NW_INLINE uint32_vector widen_bits(uint16_vector h) { return __builtin_convertvector(h, uint32_vector); }
NW_INLINE uint16_vector narrow_bits(uint32_vector v) { return __builtin_convertvector(v, uint16_vector); }
#endif
#if defined(__aarch64__)
// One instruction; GCC 12 widens lane by lane.
NW_INLINE vec<float> widen(uint16_vector h) { return (vec<float>)vshll_n_u16((uint16x4_t)h, 16); }
#else
NW_INLINE vec<float> widen(uint16_vector h) { return (vec<float>)(widen_bits(h) << 16); }
#endif
// Round to nearest, ties to even, as torch; a NaN stays one instead of rounding up to infinity.
NW_INLINE uint16_vector narrow(vec<float> v) {
  uint32_vector bits = (uint32_vector)v;
#if defined(__aarch64__)
  bits = v != v ? uint32_vector{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return (uint16_vector)vshrn_n_u32((uint32x4_t)bits, 16);
#else
  uint32_vector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = v != v ? (uint32_vector{} + 0x7fc0u) : rounded;
  return narrow_bits(rounded);
#endif
}

NW_INLINE vec<float> load(const float* p, Full = {}) { return load_bytes<vec<float>>(p); }
NW_INLINE vec<double> load(const double* p, Full = {}) { return load_bytes<vec<double>>(p); }
NW_INLINE vec<float> load(const bf16* p, Full = {}) { return widen(load_bytes<uint16_vector>(p)); }

NW_INLINE void store(float* p, vec<float> v, Full = {}) { std::memcpy(p, &v, sizeof v); }
NW_INLINE void store(double* p, vec<double> v, Full = {}) { std::memcpy(p, &v, sizeof v); }
NW_INLINE void store(bf16* p, vec<float> v, Full = {}) {
  uint16_vector h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

#if defined(NW_AVX512)
NW_INLINE __mmask16 lane_mask(Partial part) { return __mmask16((1u << part.n) - 1u); }
NW_INLINE vec<float> load(const float* p, Partial part) {
  return (vec<float>)_mm512_maskz_loadu_ps(lane_mask(part), p);
}
NW_INLINE vec<double> load(const double* p, Partial part) {
  return (vec<double>)_mm512_maskz_loadu_pd(__mmask8(lane_mask(part)), p);
}
NW_INLINE vec<float> load(const bf16* p, Partial part) {
  return widen((uint16_vector)_mm256_maskz_loadu_epi16(lane_mask(part), p));
}
NW_INLINE void store(float* p, vec<float> v, Partial part) { _mm512_mask_storeu_ps(p, lane_mask(part), (__m512)v); }
NW_INLINE void store(double* p, vec<double> v, Partial part) {
  _mm512_mask_storeu_pd(p, __mmask8(lane_mask(part)), (__m512d)v);
}
NW_INLINE void store(bf16* p, vec<float> v, Partial part) {
  _mm256_mask_storeu_epi16(p, lane_mask(part), (__m256i)narrow(v));
}
#else
#if defined(__AVX2__)
NW_INLINE vec<float> load(const float* p, Partial part) {
  return (vec<float>)_mm256_maskload_ps(p, (__m256i)(iota<float>() < part.n));
}
NW_INLINE void store(float* p, vec<float> v, Partial part) {
  _mm256_maskstore_ps(p, (__m256i)(iota<float>() < part.n), (__m256)v);
}
#else
NW_INLINE vec<float> load(const float* p, Partial part) { return load_bytes<vec<float>>(p, part); }
NW_INLINE void store(float* p, vec<float> v, Partial part) { store_first(p, v, part); }
#endif
NW_INLINE vec<double> load(const double* p, Partial part) { return load_bytes<vec<double>>(p, part); }
NW_INLINE vec<float> load(const bf16* p, Partial part) { return widen(load_bytes<uint16_vector>(p, part)); }
NW_INLINE void store(double* p, vec<double> v, Partial part) { store_first(p, v, part); }
NW_INLINE void store(bf16* p, vec<float> v, Partial part) { store_first(p, narrow(v), part); }
#endif

// --- Non-temporal stores for large outputs. They bypass the caches: a large output would be evicted before anyone
// reads it, and an ordinary store fetches the cache line first, which is a third of a norm's memory traffic.

// Bytes from which an output is large: the L2 of two cores cannot hold it. With 1.25 MiB of L2 a BatchNorm and what
// reads its output take less time so at 6.1 MiB, about as much at 3.1 MiB and more at 0.8 MiB (docs/kernels.md). Where
// L2 is small, L3 serves instead: less than 2 MiB never go past it.
inline int64_t non_temporal_bytes() { return l2_cache_bytes > 1 << 20 ? 2 * l2_cache_bytes : 2 << 20; }
template <class T> constexpr int64_t store_bytes = lanes<compute_t<T>> * int64_t(sizeof(T));

// Whether an output of `elements`, written in runs of `run` neighbours, takes non-temporal stores: it is large, and each
// of its vectors is aligned and half a cache line at least. (Two threads that write quarters, as bfloat16 does with AVX2,
// flush write-combining buffers before they are full: up to three times the time.)
// On arm64 none does: the instruction there, stnp, stores two registers, and a vector is one.
template <class T> inline bool use_non_temporal(const T* out, int64_t elements, int64_t run) {
#if defined(__SSE2__)
  return store_bytes<T> >= 32 && elements * int64_t(sizeof(T)) >= non_temporal_bytes() &&
         uintptr_t(out) % store_bytes<T> == 0 && run * int64_t(sizeof(T)) % store_bytes<T> == 0;
#else
  (void)out, (void)elements, (void)run;
  return false;
#endif
}

template <int bytes> NW_INLINE void store_bytes_non_temporal(void* p, const void* v) {
#if defined(NW_AVX512)
  if constexpr (bytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_loadu_si512(v));
#endif
#if defined(__AVX2__)
  if constexpr (bytes == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(p), _mm256_loadu_si256(static_cast<const __m256i*>(v)));
  }
#endif
#if defined(__SSE2__)
  if constexpr (bytes == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(p), _mm_loadu_si128(static_cast<const __m128i*>(v)));
  }
#endif
  std::memcpy(p, v, bytes);
}
NW_INLINE void store_non_temporal(float* p, vec<float> v) { store_bytes_non_temporal<sizeof v>(p, &v); }
NW_INLINE void store_non_temporal(double* p, vec<double> v) { store_bytes_non_temporal<sizeof v>(p, &v); }
NW_INLINE void store_non_temporal(bf16* p, vec<float> v) {
  uint16_vector h = narrow(v);
  store_bytes_non_temporal<sizeof h>(p, &h);
}
template <class T, class V> NW_INLINE void store_output(T* p, V v, Full full, bool non_temporal) {
  if (non_temporal) {
    store_non_temporal(p, v);
  } else {
    store(p, v, full);
  }
}
template <class T, class V> NW_INLINE void store_output(T* p, V v, Partial part, bool) { store(p, v, part); }

// Makes non-temporal stores visible before another thread may read them.
NW_INLINE void fence_non_temporal() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// --- Masks. load_valid_lanes(mask, i): which lanes of the vector at element i are valid, from a mask of bits, lowest
// first; i is a multiple of the lanes. In invalid lanes load(p, part, valid) reads 0, whatever the memory holds,
// zero_invalid(v, valid) puts 0, and add and add_square leave the sum as it is.
#if defined(NW_AVX512)
template <class C> using ValidLanes = __mmask16;
template <class C> NW_INLINE ValidLanes<C> load_valid_lanes(const uint64_t* mask, int64_t i) {
  const char* from = reinterpret_cast<const char*>(mask) + i / 8;
  if constexpr (sizeof(C) == 8) return uint8_t(*from);
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}
NW_INLINE vec<float> zero_invalid(vec<float> v, __mmask16 valid) {
  return (vec<float>)_mm512_maskz_mov_ps(valid, (__m512)v);
}
NW_INLINE vec<double> zero_invalid(vec<double> v, __mmask16 valid) {
  return (vec<double>)_mm512_maskz_mov_pd(__mmask8(valid), (__m512d)v);
}
template <class Part> NW_INLINE vec<float> load(const float* p, Part, __mmask16 valid) {
  return (vec<float>)_mm512_maskz_loadu_ps(valid, p);
}
template <class Part> NW_INLINE vec<double> load(const double* p, Part, __mmask16 valid) {
  return (vec<double>)_mm512_maskz_loadu_pd(__mmask8(valid), p);
}
template <class Part> NW_INLINE vec<float> load(const bf16* p, Part, __mmask16 valid) {
  return widen((uint16_vector)_mm256_maskz_loadu_epi16(valid, p));
}
NW_INLINE void add(vec<float>& sum, vec<float> v, __mmask16 valid) {
  sum = (vec<float>)_mm512_mask_add_ps((__m512)sum, valid, (__m512)sum, (__m512)v);
}
NW_INLINE void add(vec<double>& sum, vec<double> v, __mmask16 valid) {
  sum = (vec<double>)_mm512_mask_add_pd((__m512d)sum, __mmask8(valid), (__m512d)sum, (__m512d)v);
}
NW_INLINE void add_square(vec<float>& sum, vec<float> v, __mmask16 valid) {
  sum = (vec<float>)_mm512_mask3_fmadd_ps((__m512)v, (__m512)v, (__m512)sum, valid);
}
NW_INLINE void add_square(vec<double>& sum, vec<double> v, __mmask16 valid) {
  sum = (vec<double>)_mm512_mask3_fmadd_pd((__m512d)v, (__m512d)v, (__m512d)sum, __mmask8(valid));
}
#else
template <class C> using ValidLanes = vmask<C>;
template <class C> NW_INLINE ValidLanes<C> load_valid_lanes(const uint64_t* mask, int64_t i) {
  using Lane = decltype(vmask<C>{}[0] + 0);
  const vmask<C> own = (vmask<C>{} + Lane(1)) << iota<C>();
  const int bits = reinterpret_cast<const uint8_t*>(mask)[i / 8] >> (i % 8);
  return ((vmask<C>{} + Lane(bits)) & own) == own;
}
NW_INLINE vec<float> zero_invalid(vec<float> v, vmask<float> valid) { return valid ? v : vec<float>{}; }
NW_INLINE vec<double> zero_invalid(vec<double> v, vmask<double> valid) { return valid ? v : vec<double>{}; }
template <class T, class Part> NW_INLINE vec<compute_t<T>> load(const T* p, Part part, ValidLanes<compute_t<T>> valid) {
  return zero_invalid(load(p, part), valid);
}
template <class V, class M> NW_INLINE void add(V& sum, V v, M valid) { sum += zero_invalid(v, valid); }
template <class V, class M> NW_INLINE void add_square(V& sum, V v, M valid) {
  v = zero_invalid(v, valid);
  sum += v * v;
}
#endif

// Packs the n bytes of a mask into bits, (n + 63) / 64 words; bits past the last are 0.
inline void pack_mask(const uint8_t* mask, int64_t n, uint64_t* bits) {
  for (int64_t start = 0; start < n; start += 64) {
    const int64_t length = n - start < 64 ? n - start : 64;
    uint64_t word = 0;
#if defined(__SSE2__)
    for (int64_t k = 0; length == 64 && k < 64; k += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + start + k));
      word |= uint64_t(0xffff & ~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()))) << k;
    }
    for (int64_t k = length < 64 ? 0 : 64; k < length; ++k) word |= uint64_t(mask[start + k] != 0) << k;
#elif defined(__aarch64__)
    if (length == 64) {
      const uint8x16_t own = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
      const auto bits_at = [&](int k) {
        const uint8x16_t bytes = vld1q_u8(mask + start + k);
        return vandq_u8(vtstq_u8(bytes, bytes), own);
      };
      // Each sum of neighbours halves the bytes that the bits of eight elements lie in, until it is one.
      const uint8x16_t fours = vpaddq_u8(vpaddq_u8(bits_at(0), bits_at(16)), vpaddq_u8(bits_at(32), bits_at(48)));
      word = vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(fours, fours)), 0);
    }
    for (int64_t k = length < 64 ? 0 : 64; k < length; ++k) word |= uint64_t(mask[start + k] != 0) << k;
#else
    for (int64_t k = 0; k < length; ++k) word |= uint64_t(mask[start + k] != 0) << k;
#endif
    bits[start / 64] = word;
  }
}

// How many of n mask bytes say valid. Sums are of single bytes, so that the compiler vectorizes them fully.
inline int64_t count_valid(const uint8_t* mask, int64_t n) {
  int64_t count = 0, i = 0;
  for (; i + 128 <= n; i += 128) {
    uint8_t some = 0;
    for (int64_t k = 0; k < 128; ++k) some = uint8_t(some + (mask[i + k] != 0));
    count += some;
  }
  for (; i < n; ++i) count += mask[i] != 0;
  return count;
}

// Lane i of the result is lane from[i] of a followed by b. Clang's own takes constants only, and sees that these are.
template <class C> NW_INLINE vec<C> shuffle(vec<C> a, vec<C> b, vmask<C> from) {
#if defined(__clang__)
  vec<C> out;
  for (int i = 0; i < lanes<C>; ++i) out[i] = from[i] < lanes<C> ? a[from[i]] : b[from[i] - lanes<C>];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Adds the upper half of the lanes to the lower one until one is left.
template <int half, class C> NW_INLINE vec<C> fold(vec<C> v) {
  v += shuffle<C>(v, v, iota<C>() ^ half);
  if constexpr (half > 1) {
    return fold<half / 2, C>(v);
  } else {
    return v;
  }
}
template <class C> NW_INLINE C sum_lanes(vec<C> v) { return fold<lanes<C> / 2, C>(v)[0]; }
template <class C> NW_INLINE C sum_lanes(const vec<C> (&v)[4]) { return sum_lanes<C>((v[0] + v[1]) + (v[2] + v[3])); }

// 1 / x for 1 <= x <= 2^127, within a unit in the last place; a division has several times the latency.
NW_INLINE vec<float> reciprocal(vec<float> x) {
#if defined(NW_AVX512)
  const vec<float> r = (vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return r + r * (1.f - x * r);
#else
  return 1.f / x;
#endif
}
NW_INLINE vec<double> reciprocal(vec<double> x) { return 1.0 / x; }

// x limited to -limit .. limit; NaN stays NaN.
template <class V, class C> NW_INLINE V clamp(V x, C limit) {
#if defined(__aarch64__)
  if constexpr (sizeof(C) == 4) return (V)vminq_f32(vmaxq_f32((float32x4_t)x, vdupq_n_f32(-limit)), vdupq_n_f32(limit));
#endif
#if defined(NW_AVX512)
  if constexpr (sizeof(C) == 4) {
    return (V)_mm512_maskz_min_ps(0xffff, (__m512)splat(limit),
                                  _mm512_maskz_max_ps(0xffff, (__m512)splat(-limit), (__m512)x));
  }
#endif
  x = x < -limit ? splat(-limit) : x;
  return x > limit ? splat(limit) : x;
}

// 2^k for a k that holds an integer.
NW_INLINE vec<float> exp2_of_integer(vec<float> k) {
#if defined(NW_AVX512)
  return (vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)splat(1.f), (__m512)k);
#else
  return (vec<float>)((__builtin_convertvector(k, vmask<float>) + 127) << 23);
#endif
}

// Prefetches memory that the next row or channel will read; an address past the end of an array does no harm. The
// hardware prefetcher follows a run by itself, but does not start on the next one.
template <class T> NW_INLINE void prefetch(const T* p) { __builtin_prefetch(static_cast<const void*>(p)); }
// The same into L2, for what is not needed immediately.
template <class T> NW_INLINE void prefetch_l2(const T* p) { __builtin_prefetch(static_cast<const void*>(p), 0, 2); }

template <class T> NW_INLINE void zero_fill(T* p, int64_t n) {
  std::memset(static_cast<void*>(p), 0, size_t(n) * sizeof(T));
}

// Calls body(i, part) for each vector of a run of n elements.
template <class C, class Body> NW_INLINE void for_each_vector(int64_t n, Body body) {
  constexpr int64_t w = lanes<C>;
  int64_t i = 0;
  for (; i + w <= n; i += w) body(i, Full{});
  if (i < n) body(i, Partial{int(n - i)});
}

// The same for sums: body(i, part, k), where k = 0..3 selects one of four accumulators, so that an addition does not
// wait for the one before.
template <class C, class Body> NW_INLINE void for_each_vector_x4(int64_t n, Body body) {
  constexpr int64_t w = lanes<C>;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    body(i, Full{}, 0);
    body(i + w, Full{}, 1);
    body(i + 2 * w, Full{}, 2);
    body(i + 3 * w, Full{}, 3);
  }
  for (; i + w <= n; i += w) body(i, Full{}, 0);
  if (i < n) body(i, Partial{int(n - i)}, 1);
}

}  // namespace
}  // namespace NW_ISA
