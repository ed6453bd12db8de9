// The inner loops of the kernels, each in a function of its own, for scripts/count_instructions.py to count. None is
// called; they are made of what the kernels are made of, so that a change there shows here.
#include "common/activations.h"
#include "gemm/packed.h"
#include "norm/moments.h"

using namespace NW_ISA;

#define LOOP extern "C" __attribute__((noinline))

namespace {
template <class T, int act>
NW_INLINE void normalize(const T* x, const float* weight, const float* bias, float mean, float rstd, T* y, int64_t n) {
  for_each_vector<float>(n, [&](int64_t i, auto part) NW_LAMBDA {
    vec<float> z = (load(x + i, part) - mean) * rstd * load(weight + i, part) + load(bias + i, part);
    store(y + i, activate<act, float>(z, act), part);
  });
}
template <class T>
NW_INLINE void backward(const T* dy, const T* x, const float* weight, float a, float b, T* dx, int64_t n) {
  for_each_vector<float>(n, [&](int64_t i, auto part) NW_LAMBDA {
    store(dx + i, load(dy + i, part) * load(weight + i, part) + load(x + i, part) * a + b, part);
  });
}
}  // namespace

LOOP void moments_float(const float* x, const Region* r, Moments* out) {
  *out = block_moments<false>(x, *r, double(r->length));
}
LOOP void moments_bf16(const bf16* x, const Region* r, Moments* out) {
  *out = block_moments<false>(x, *r, double(r->length));
}
LOOP void moments_masked(const float* x, const Region* r, Moments* out) {
  *out = block_moments<true>(x, *r, double(r->length));
}
LOOP void normalize_float(const float* x, const float* w, const float* b, float m, float s, float* y, int64_t n) {
  normalize<float, NW_IDENTITY>(x, w, b, m, s, y, n);
}
LOOP void normalize_bf16(const bf16* x, const float* w, const float* b, float m, float s, bf16* y, int64_t n) {
  normalize<bf16, NW_IDENTITY>(x, w, b, m, s, y, n);
}
LOOP void normalize_relu(const float* x, const float* w, const float* b, float m, float s, float* y, int64_t n) {
  normalize<float, NW_RELU>(x, w, b, m, s, y, n);
}
LOOP void normalize_silu(const float* x, const float* w, const float* b, float m, float s, float* y, int64_t n) {
  normalize<float, NW_SILU>(x, w, b, m, s, y, n);
}
LOOP void backward_float(const float* dy, const float* x, const float* w, float a, float b, float* dx, int64_t n) {
  backward(dy, x, w, a, b, dx, n);
}
LOOP void product(int64_t depth, const float* a, int64_t stride, const float* b, float* c, const float* next) {
  tile<tile_rows, panel_vectors, false, false>(depth, a, stride, b, c, panel_width, panel_width, next);
}
LOOP void pack_bits(const uint8_t* mask, int64_t n, uint64_t* bits) { pack_mask(mask, n, bits); }
