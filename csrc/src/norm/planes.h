// Passes over runs of positions that share one mean, gain and bias, forward and backward, for channels-first GroupNorm,
// InstanceNorm and BatchNorm.
#pragma once

#include "common/activations.h"
#include "common/parallel.h"
#include "norm/moments.h"

namespace NW_ISA {
namespace {

// A mask (batch, positions), which many channels read, packed into bits: an eighth of its bytes.
class PackedMasks {
 public:
  PackedMasks(const uint8_t* mask, int64_t batch, int64_t positions)
      : words_per_sample((positions + 63) / 64), has_mask_(mask), bits_(mask ? batch * words_per_sample : 0) {
    for (int64_t n = 0; has_mask_ && bits_ && n < batch; ++n) {
      pack_mask(mask + n * positions, positions, bits_.get() + n * words_per_sample);
    }
  }
  explicit operator bool() const { return bool(bits_); }
  const uint64_t* of_sample(int64_t sample) const {
    return has_mask_ ? bits_.get() + sample * words_per_sample : nullptr;
  }

  const int64_t words_per_sample;

 private:
  bool has_mask_;
  Scratch<uint64_t> bits_;
};

// z = (x - mean) * scale + shift, with scale = rstd * gain.
template <class C> struct Affine {
  SplitMean<C> mean;
  C scale, shift;
  Affine(double mean, double rstd, double gain, double bias) : mean(mean), scale(C(rstd * gain)), shift(C(bias)) {}
};

// Element i of a gain or bias, or the default where there is none.
template <class C> NW_INLINE double parameter(const void* p, int64_t i, double default_value) {
  return p ? double(static_cast<const C*>(p)[i]) : default_value;
}

// Writes y = act(z + residual) for a region; `code` is the activation's. `prefetch_offset`: how far away the run lies
// that is read next, 0 for none; it is prefetched while this one is written.
template <int act, class T>
void normalize(const T* x, const T* residual, T* y, const Region& r, const Affine<compute_t<T>>& affine, int code,
               int64_t prefetch_offset, bool non_temporal) {
  using C = compute_t<T>;
  for (int64_t p = 0; p < r.planes; ++p) {
    const int64_t at = p * r.stride;
    const uint64_t* mask = r.mask ? r.mask + p * r.mask_stride : nullptr;
    for_each_vector<C>(r.length, [&](int64_t i, auto part) NW_LAMBDA {
      vec<C> z = affine.mean.deviation(load(x + at + i, part)) * affine.scale + affine.shift;
      if (prefetch_offset) prefetch_l2(x + at + i + prefetch_offset);
      if (prefetch_offset && !non_temporal) prefetch_l2(y + at + i + prefetch_offset);
      if (residual) z += load(residual + at + i, part);
      z = activate<act, C>(z, code);
      if (mask) z = zero_invalid(z, load_valid_lanes<C>(mask, i));
      store_output(y + at + i, z, part, non_temporal);
    });
  }
}

// Reads what the backward needs of each element.
template <class T> struct PlaneGradient {
  using C = compute_t<T>;
  const T *dy, *x, *residual;
  int code;  // the activation's

  template <class Args>
  explicit PlaneGradient(const Args& a)
      : dy(static_cast<const T*>(a.dy)),
        x(static_cast<const T*>(a.x)),
        residual(static_cast<const T*>(a.residual)),
        code(a.act) {}

  // For element i of the run that begins at `start`, in padding as if x and dy were 0: the deviation of x from the
  // mean, ...
  template <class Part>
  NW_INLINE vec<C> deviation_at(int64_t start, int64_t i, Part part, const Affine<C>& affine,
                                const uint64_t* mask) const {
    return affine.mean.deviation(read(x + start, i, part, mask));
  }
  // ... and the gradient g of z.
  template <int act, class Part>
  NW_INLINE vec<C> at(int64_t start, int64_t i, Part part, const Affine<C>& affine, const uint64_t* mask,
                      vec<C>& deviation) const {
    deviation = deviation_at(start, i, part, affine, mask);
    vec<C> g = read(dy + start, i, part, mask);
    if constexpr (act != NW_IDENTITY) {
      vec<C> z = deviation * affine.scale + affine.shift;
      if (residual) z += read(residual + start, i, part, mask);
      g *= activation_derivative<act, C>(z, code);
    }
    return clear_tail<C>(g, part);
  }

 private:
  template <class Part> NW_INLINE static vec<C> read(const T* p, int64_t i, Part part, const uint64_t* mask) {
    return mask ? load(p + i, part, load_valid_lanes<C>(mask, i)) : load(p + i, part);
  }
};

// Sums over elements of g, and of g times the deviation from the mean.
struct GradSums {
  double grad = 0, grad_deviation = 0;
  void add(const GradSums& other) {
    grad += other.grad;
    grad_deviation += other.grad_deviation;
  }
};

// dx = g * gain - offset - deviation * slope.
template <class C> struct GradCoeffs {
  C gain, offset = 0, slope = 0;
};

// The sums of a block. Where `act` is expensive, g is left in dx, for input_gradient to find.
template <int act, class T>
GradSums block_grad_sums(const PlaneGradient<T>& gradient, int64_t start, const Region& r,
                         const Affine<compute_t<T>>& affine, [[maybe_unused]] T* dx) {
  using C = compute_t<T>;
  vec<C> sum_g[4] = {}, sum_gd[4] = {};
  for (int64_t p = 0; p < r.planes; ++p) {
    const int64_t at = start + p * r.stride;
    const uint64_t* mask = r.mask ? r.mask + p * r.mask_stride : nullptr;
    for_each_vector_x4<C>(r.length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      vec<C> deviation;
      vec<C> g = gradient.template at<act>(at, i, part, affine, mask, deviation);
      sum_g[k] += g;
      sum_gd[k] += g * deviation;
      if constexpr (keeps_gradient<T, act>) store(dx + at + i, g, part);
    });
  }
  return {.grad = double(sum_lanes<C>(sum_g)), .grad_deviation = double(sum_lanes<C>(sum_gd))};
}

template <int act, class T>
GradSums region_grad_sums(const PlaneGradient<T>& gradient, int64_t start, const Region& r,
                          const Affine<compute_t<T>>& affine, T* dx) {
  if (r.planes == 1 && r.length <= Blocks::max_elements) return block_grad_sums<act>(gradient, start, r, affine, dx);
  Blocks blocks(r);
  GradSums all;
  for (int64_t i = 0; i < blocks.count; ++i) {
    int64_t offset;
    Region block = blocks.at(r, i, offset);
    all.add(block_grad_sums<act>(gradient, start + offset, block, affine, dx));
  }
  return all;
}

// Writes dx and dresidual, after block_grad_sums of all; from the last plane to the first: the last ones are still in
// cache.
template <int act, class T>
void input_gradient(const PlaneGradient<T>& gradient, int64_t start, const Region& r,
                    const Affine<compute_t<T>>& affine, const GradCoeffs<compute_t<T>>& coeffs, T* dx, T* dresidual,
                    int64_t prefetch_offset, bool non_temporal) {
  using C = compute_t<T>;
  if (keeps_gradient<T, act>) non_temporal = false;  // where g lies in the caches dx takes its place
  for (int64_t p = r.planes - 1; p >= 0; --p) {
    const int64_t at = start + p * r.stride;
    const uint64_t* mask = r.mask ? r.mask + p * r.mask_stride : nullptr;
    for_each_vector<C>(r.length, [&](int64_t i, auto part) NW_LAMBDA {
      vec<C> deviation, g;
      if constexpr (keeps_gradient<T, act>) {
        deviation = gradient.deviation_at(at, i, part, affine, mask);
        g = load(dx + at + i, part);
      } else {
        g = gradient.template at<act>(at, i, part, affine, mask, deviation);
      }
      vec<C> d = g * coeffs.gain - coeffs.offset - deviation * coeffs.slope;
      if (prefetch_offset) {
        prefetch_l2(gradient.x + at + i + prefetch_offset);
        prefetch_l2(gradient.dy + at + i + prefetch_offset);
        if (!non_temporal) prefetch_l2(dx + at + i + prefetch_offset);
      }
      if (mask) d = zero_invalid(d, load_valid_lanes<C>(mask, i));
      store_output(dx + at + i, d, part, non_temporal);
      if (dresidual) store(dresidual + at + i, g, part);
    });
  }
}

}  // namespace
}  // namespace NW_ISA
