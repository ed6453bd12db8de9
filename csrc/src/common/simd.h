// Vectors one hardware register wide, at the instruction set that the including file is compiled for.
// Kernels are written once in these; the last, partial vector of a run goes through the same code with a Head.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#ifndef NW_ISA
#error "compile with -DNW_ISA=<avx512|avx2|baseline>: it is the namespace that keeps the instruction sets apart"
#endif

#define NW_INLINE inline __attribute__((always_inline))
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

template <class T> struct ComputeType { using type = float; };
template <> struct ComputeType<double> { using type = double; };
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

// Which lanes of a vector belong to the run: all of them, or the first n.
struct Full {};
struct Head {
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

template <class C> NW_INLINE vec<C> keep(vec<C> v, Full) { return v; }
template <class C> NW_INLINE vec<C> keep(vec<C> v, Head head) { return iota<C>() < head.n ? v : vec<C>{}; }

// --- loads: memory of type T into a vector of compute_t<T>; lanes past the head are 0 and their memory is not touched.

template <class V, class T> NW_INLINE V raw_load(const T* p, Full = {}) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> NW_INLINE V raw_load(const T* p, Head head) {
  V v{};
  std::memcpy(&v, p, size_t(head.n) * sizeof(T));
  return v;
}

typedef uint16_t half_vector __attribute__((vector_size(vector_bytes / 2)));
typedef uint32_t word_vector __attribute__((vector_size(vector_bytes)));
NW_INLINE vec<float> widen(half_vector h) { return (vec<float>)(__builtin_convertvector(h, word_vector) << 16); }
// Round to nearest, ties to even, as torch; a NaN stays one instead of rounding up to infinity.
NW_INLINE half_vector narrow(vec<float> v) {
  word_vector bits = (word_vector)v;
  word_vector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = v != v ? (word_vector{} + 0x7fc0u) : rounded;
  return __builtin_convertvector(rounded, half_vector);
}

NW_INLINE vec<float> load(const float* p, Full = {}) { return raw_load<vec<float>>(p); }
NW_INLINE vec<double> load(const double* p, Full = {}) { return raw_load<vec<double>>(p); }
NW_INLINE vec<float> load(const bf16* p, Full = {}) { return widen(raw_load<half_vector>(p)); }

NW_INLINE void store(float* p, vec<float> v, Full = {}) { std::memcpy(p, &v, sizeof v); }
NW_INLINE void store(double* p, vec<double> v, Full = {}) { std::memcpy(p, &v, sizeof v); }
NW_INLINE void store(bf16* p, vec<float> v, Full = {}) {
  half_vector h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

#if defined(NW_AVX512)
NW_INLINE __mmask16 first(Head head) { return __mmask16((1u << head.n) - 1u); }
NW_INLINE vec<float> load(const float* p, Head h) { return (vec<float>)_mm512_maskz_loadu_ps(first(h), p); }
NW_INLINE vec<double> load(const double* p, Head h) {
  return (vec<double>)_mm512_maskz_loadu_pd(__mmask8(first(h)), p);
}
NW_INLINE vec<float> load(const bf16* p, Head h) {
  return widen((half_vector)_mm256_maskz_loadu_epi16(first(h), p));
}
NW_INLINE void store(float* p, vec<float> v, Head h) { _mm512_mask_storeu_ps(p, first(h), (__m512)v); }
NW_INLINE void store(double* p, vec<double> v, Head h) { _mm512_mask_storeu_pd(p, __mmask8(first(h)), (__m512d)v); }
NW_INLINE void store(bf16* p, vec<float> v, Head h) { _mm256_mask_storeu_epi16(p, first(h), (__m256i)narrow(v)); }
#else
#if defined(__AVX2__)
NW_INLINE vec<float> load(const float* p, Head h) {
  return (vec<float>)_mm256_maskload_ps(p, (__m256i)(iota<float>() < h.n));
}
NW_INLINE void store(float* p, vec<float> v, Head h) {
  _mm256_maskstore_ps(p, (__m256i)(iota<float>() < h.n), (__m256)v);
}
#else
NW_INLINE vec<float> load(const float* p, Head h) { return raw_load<vec<float>>(p, h); }
NW_INLINE void store(float* p, vec<float> v, Head h) { std::memcpy(p, &v, size_t(h.n) * sizeof *p); }
#endif
NW_INLINE vec<double> load(const double* p, Head h) { return raw_load<vec<double>>(p, h); }
NW_INLINE vec<float> load(const bf16* p, Head h) { return widen(raw_load<half_vector>(p, h)); }
NW_INLINE void store(double* p, vec<double> v, Head h) { std::memcpy(p, &v, size_t(h.n) * sizeof *p); }
NW_INLINE void store(bf16* p, vec<float> v, Head h) {
  half_vector half = narrow(v);
  std::memcpy(p, &half, size_t(h.n) * sizeof *p);
}
#endif

// --- large outputs go past the caches: what is written there would be gone before anyone reads it, and a store into a
// cache fetches the line first, which is a third of a norm's traffic.

constexpr int64_t past_cache_bytes = 4 << 20;  // about the L2 of a few cores
template <class T> constexpr int64_t store_bytes = lanes<compute_t<T>> * int64_t(sizeof(T));

// Whether an output of `elements` in runs of `run` neighbours is written so: large, and each of its vectors aligned.
template <class T> inline bool goes_past_cache(const T* out, int64_t elements, int64_t run) {
#if defined(__SSE2__)
  return elements * int64_t(sizeof(T)) >= past_cache_bytes && uintptr_t(out) % store_bytes<T> == 0 &&
         run * int64_t(sizeof(T)) % store_bytes<T> == 0;
#else
  return false;
#endif
}

template <int bytes> NW_INLINE void stream_bytes(void* p, const void* v) {
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
NW_INLINE void stream(float* p, vec<float> v) { stream_bytes<sizeof v>(p, &v); }
NW_INLINE void stream(double* p, vec<double> v) { stream_bytes<sizeof v>(p, &v); }
NW_INLINE void stream(bf16* p, vec<float> v) {
  half_vector h = narrow(v);
  stream_bytes<sizeof h>(p, &h);
}
template <class T, class V> NW_INLINE void store_output(T* p, V v, Full full, bool past_cache) {
  if (past_cache) {
    stream(p, v);
  } else {
    store(p, v, full);
  }
}
template <class T, class V> NW_INLINE void store_output(T* p, V v, Head head, bool) { store(p, v, head); }

// Before another thread may read what went past the caches.
NW_INLINE void finish_output() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Which lanes a mask calls valid whose i-th bit, the lowest first, is that of lane 0; i is a multiple of the lanes.
// load(p, part, valid) reads 0 in the others, whatever stands there, pick(v, valid) puts 0 there, and add and add_square
// leave them out of a sum.
#if defined(NW_AVX512)
template <class C> using Valid = __mmask16;
template <class C> NW_INLINE Valid<C> load_valid(const uint64_t* mask, int64_t i) {
  const char* from = reinterpret_cast<const char*>(mask) + i / 8;
  if constexpr (sizeof(C) == 8) return uint8_t(*from);
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}
NW_INLINE vec<float> pick(vec<float> v, __mmask16 valid) { return (vec<float>)_mm512_maskz_mov_ps(valid, (__m512)v); }
NW_INLINE vec<double> pick(vec<double> v, __mmask16 valid) {
  return (vec<double>)_mm512_maskz_mov_pd(__mmask8(valid), (__m512d)v);
}
template <class Part> NW_INLINE vec<float> load(const float* p, Part, __mmask16 valid) {
  return (vec<float>)_mm512_maskz_loadu_ps(valid, p);
}
template <class Part> NW_INLINE vec<double> load(const double* p, Part, __mmask16 valid) {
  return (vec<double>)_mm512_maskz_loadu_pd(__mmask8(valid), p);
}
template <class Part> NW_INLINE vec<float> load(const bf16* p, Part, __mmask16 valid) {
  return widen((half_vector)_mm256_maskz_loadu_epi16(valid, p));
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
template <class C> using Valid = vmask<C>;
template <class C> NW_INLINE Valid<C> load_valid(const uint64_t* mask, int64_t i) {
  using Lane = decltype(vmask<C>{}[0] + 0);
  const vmask<C> own = (vmask<C>{} + Lane(1)) << iota<C>();
  const int bits = reinterpret_cast<const uint8_t*>(mask)[i / 8] >> (i % 8);
  return ((vmask<C>{} + Lane(bits)) & own) == own;
}
NW_INLINE vec<float> pick(vec<float> v, vmask<float> valid) { return valid ? v : vec<float>{}; }
NW_INLINE vec<double> pick(vec<double> v, vmask<double> valid) { return valid ? v : vec<double>{}; }
template <class T, class Part> NW_INLINE vec<compute_t<T>> load(const T* p, Part part, Valid<compute_t<T>> valid) {
  return pick(load(p, part), valid);
}
template <class V, class M> NW_INLINE void add(V& sum, V v, M valid) { sum += pick(v, valid); }
template <class V, class M> NW_INLINE void add_square(V& sum, V v, M valid) {
  v = pick(v, valid);
  sum += v * v;
}
#endif

// A mask's n bytes as bits, (n + 63) / 64 words; bits past the last are 0.
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
#else
    for (int64_t k = 0; k < length; ++k) word |= uint64_t(mask[start + k] != 0) << k;
#endif
    bits[start / 64] = word;
  }
}

// How many of n mask bytes say valid. Sums of single bytes, so that the compiler takes a whole vector of them at once.
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

// -most .. most; NaN stays NaN.
template <class V, class C> NW_INLINE V bounded(V x, C most) {
#if defined(NW_AVX512)
  if constexpr (sizeof(C) == 4) {
    return (V)_mm512_maskz_min_ps(0xffff, (__m512)splat(most),
                                  _mm512_maskz_max_ps(0xffff, (__m512)splat(-most), (__m512)x));
  }
#endif
  x = x < -most ? splat(-most) : x;
  return x > most ? splat(most) : x;
}

// 2^k of an integer k
NW_INLINE vec<float> power_of_two(vec<float> k) {
#if defined(NW_AVX512)
  return (vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)splat(1.f), (__m512)k);
#else
  return (vec<float>)((__builtin_convertvector(k, vmask<float>) + 127) << 23);
#endif
}

// Asks for memory that the next row or channel will want; an address past the end of an array does no harm. The
// processor fetches ahead by itself within a run, but while it computes it does not start on the next one.
template <class T> NW_INLINE void prefetch(const T* p) { __builtin_prefetch(static_cast<const void*>(p)); }
// The same into L2, for what is not needed at once.
template <class T> NW_INLINE void prefetch_l2(const T* p) { __builtin_prefetch(static_cast<const void*>(p), 0, 2); }

// Calls body(i, part) for a run of n elements, a vector at a time.
template <class C, class Body> NW_INLINE void sweep(int64_t n, Body body) {
  constexpr int64_t w = lanes<C>;
  int64_t i = 0;
  for (; i + w <= n; i += w) body(i, Full{});
  if (i < n) body(i, Head{int(n - i)});
}

// The same for sums: k = 0..3 names one of four accumulators, so that an addition does not wait for the one before.
template <class C, class Body> NW_INLINE void sweep_sums(int64_t n, Body body) {
  constexpr int64_t w = lanes<C>;
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    body(i, Full{}, 0);
    body(i + w, Full{}, 1);
    body(i + 2 * w, Full{}, 2);
    body(i + 3 * w, Full{}, 3);
  }
  for (; i + w <= n; i += w) body(i, Full{}, 0);
  if (i < n) body(i, Head{int(n - i)}, 1);
}

}  // namespace
}  // namespace NW_ISA
