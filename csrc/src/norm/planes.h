// Normalize runs of positions that share one mean, gain and bias: what GroupNorm, InstanceNorm and channels-first
// BatchNorm do once they have their statistics.
#pragma once

#include "common/activations.h"
#include "norm/moments.h"
#include "common/parallel.h"

namespace NW_ISA {
namespace {

// The mask of (batch, positions), which many channels read, in an eighth of its bytes.
class SampleMasks {
 public:
  SampleMasks(const uint8_t* mask, int64_t batch, int64_t positions)
      : words((positions + 63) / 64), given_(mask), bits_(mask ? batch * words : 0) {
    for (int64_t n = 0; given_ && bits_ && n < batch; ++n) {
      pack_mask(mask + n * positions, positions, bits_.get() + n * words);
    }
  }
  explicit operator bool() const { return bool(bits_); }
  const uint64_t* of(int64_t sample) const { return given_ ? bits_.get() + sample * words : nullptr; }

  const int64_t words;  // of a sample

 private:
  bool given_;
  Scratch<uint64_t> bits_;
};

// z = (x - mean) * scale + shift, scale = rstd * gain.
template <class C> struct Line {
  Centre<C> centre;
  C scale, shift;
  Line(double mean, double rstd, double gain, double bias) : centre(mean), scale(C(rstd * gain)), shift(C(bias)) {}
};

template <class C> NW_INLINE double parameter(const void* p, int64_t i, double otherwise) {
  return p ? double(static_cast<const C*>(p)[i]) : otherwise;
}

// `ahead`: how far off the run lies that is read next, 0 if none is; it is fetched while this one is written.
template <int act, class T>
void normalize(const T* x, const T* residual, T* y, const Region& r, const Line<compute_t<T>>& line, int64_t ahead,
               bool past_cache) {
  using C = compute_t<T>;
  for (int64_t p = 0; p < r.planes; ++p) {
    const int64_t at = p * r.stride;
    const uint64_t* mask = r.mask ? r.mask + p * r.mask_stride : nullptr;
    sweep<C>(r.length, [&](int64_t i, auto part) NW_LAMBDA {
      vec<C> z = line.centre.distance(load(x + at + i, part)) * line.scale + line.shift;
      if (ahead) prefetch_l2(x + at + i + ahead);
      if (ahead && !past_cache) prefetch_l2(y + at + i + ahead);
      if (residual) z += load(residual + at + i, part);
      z = act_value<act, C>(z);
      if (mask) z = pick(z, load_valid<C>(mask, i));
      store_output(y + at + i, z, part, past_cache);
    });
  }
}

template <class T> struct Gradient {
  using C = compute_t<T>;
  const T *dy, *x, *residual;

  Gradient(const void* dy, const void* x, const void* residual)
      : dy(static_cast<const T*>(dy)), x(static_cast<const T*>(x)), residual(static_cast<const T*>(residual)) {}

  // Of element i of the run that begins at `start`: the gradient that arrives at z, 0 in padding, and x's distance from
  // the mean, there that of an x of 0.
  template <int act, class Part>
  NW_INLINE vec<C> at(int64_t start, int64_t i, Part part, const Line<C>& line, const uint64_t* mask,
                      vec<C>& distance) const {
    const auto read = [&](const T* p) NW_LAMBDA {
      return mask ? load(p + start + i, part, load_valid<C>(mask, i)) : load(p + start + i, part);
    };
    distance = line.centre.distance(read(x));
    vec<C> g = read(dy);
    if constexpr (act != NW_IDENTITY) {
      vec<C> z = distance * line.scale + line.shift;
      if (residual) z += read(residual);
      g *= act_slope<act, C>(z);
    }
    return keep<C>(g, part);
  }
};

struct Sums {
  double g = 0, gx = 0;  // sum of g, and of g times the distance from the mean
  void add(const Sums& other) {
    g += other.g;
    gx += other.gx;
  }
};

// dx = g * gain - offset - distance * slope.
template <class C> struct Slope {
  C gain, offset = 0, slope = 0;
};

template <int act, class T>
Sums block_sums(const Gradient<T>& gradient, int64_t start, const Region& r, const Line<compute_t<T>>& line) {
  using C = compute_t<T>;
  vec<C> one[4] = {}, x[4] = {};
  for (int64_t p = 0; p < r.planes; ++p) {
    const int64_t at = start + p * r.stride;
    const uint64_t* mask = r.mask ? r.mask + p * r.mask_stride : nullptr;
    sweep_sums<C>(r.length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      vec<C> distance;
      vec<C> g = gradient.template at<act>(at, i, part, line, mask, distance);
      one[k] += g;
      x[k] += g * distance;
    });
  }
  return {double(sum_lanes<C>(one)),
          double(sum_lanes<C>(x))};
}

template <int act, class T>
Sums region_sums(const Gradient<T>& gradient, int64_t start, const Region& r, const Line<compute_t<T>>& line) {
  Blocks blocks(r);
  Sums all;
  for (int64_t i = 0; i < blocks.count; ++i) {
    int64_t offset;
    Region block = blocks.at(r, i, offset);
    all.add(block_sums<act>(gradient, start + offset, block, line));
  }
  return all;
}

// The gradient of every element, from the last plane to the first: the last ones are still in cache.
template <int act, class T>
void input_gradient(const Gradient<T>& gradient, int64_t start, const Region& r, const Line<compute_t<T>>& line,
                    const Slope<compute_t<T>>& s, T* dx, T* dresidual, int64_t ahead, bool past_cache) {
  using C = compute_t<T>;
  for (int64_t p = r.planes - 1; p >= 0; --p) {
    const int64_t at = start + p * r.stride;
    const uint64_t* mask = r.mask ? r.mask + p * r.mask_stride : nullptr;
    sweep<C>(r.length, [&](int64_t i, auto part) NW_LAMBDA {
      vec<C> distance;
      vec<C> g = gradient.template at<act>(at, i, part, line, mask, distance);
      vec<C> d = g * s.gain - s.offset - distance * s.slope;
      if (ahead) {
        prefetch_l2(gradient.x + at + i + ahead);
        prefetch_l2(gradient.dy + at + i + ahead);
        if (!past_cache) prefetch_l2(dx + at + i + ahead);
      }
      if (mask) d = pick(d, load_valid<C>(mask, i));
      store_output(dx + at + i, d, part, past_cache);
      if (dresidual) store(dresidual + at + i, g, part);
    });
  }
}

}  // namespace
}  // namespace NW_ISA
