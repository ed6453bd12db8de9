// Mean and variance: the one home of the C++ side.
#pragma once

#include "common/simd.h"

namespace NW_ISA {
namespace {

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: sum of squared distances from the mean

  // Chan, Golub, LeVeque (1979): exact for any split, and no cancellation as in E[x^2] - E[x]^2.
  NW_INLINE void merge(const Moments& other) {
    if (other.count == 0) return;
    double total = count + other.count, delta = other.mean - mean;
    double share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
  double rstd(double eps) const { return 1.0 / std::sqrt((count > 0 ? m2 / count : 0.0) + eps); }
};

// `planes` runs of `length` neighbours, `stride` apart; the mask, where there is one, has a bit for each element, and
// planes that begin with a word and have a stride of their own (0: all planes share one).
struct Region {
  int64_t planes, stride, length;
  const uint64_t* mask = nullptr;
  int64_t mask_stride = 0;
  const int64_t* counts = nullptr;  // how many elements of each of its blocks count, where that is known
};

// Cuts a region into blocks of about 4096 elements: they fit in L1, float sums over them keep their digits, and the
// order in which blocks are merged depends on the shape alone.
struct Blocks {
  static constexpr int64_t target = 4096;
  int64_t per_plane, length, planes_each, count;

  explicit Blocks(const Region& r) {
    per_plane = r.length > target ? (r.length + target - 1) / target : 1;
    length = per_plane > 1 ? ((r.length + per_plane - 1) / per_plane + 63) / 64 * 64 : r.length;
    per_plane = length > 0 ? (r.length + length - 1) / length : 0;
    planes_each = length > 0 && length < target ? target / length : 1;
    count = per_plane > 1 ? r.planes * per_plane : per_plane * ((r.planes + planes_each - 1) / planes_each);
    if (per_plane > 1) planes_each = 1;
  }
  // The i-th block as a region; `offset` receives where it starts in the array.
  NW_INLINE Region at(const Region& r, int64_t i, int64_t& offset) const {
    int64_t plane = i / per_plane * planes_each, start = i % per_plane * length;
    Region block = r;
    block.planes = r.planes - plane < planes_each ? r.planes - plane : planes_each;
    block.length = r.length - start < length ? r.length - start : length;
    offset = plane * r.stride + start;
    block.counts = r.counts ? r.counts + i : nullptr;
    const bool all = block.counts && *block.counts == block.planes * block.length;
    block.mask = r.mask && !all ? r.mask + plane * r.mask_stride + start / 64 : nullptr;
    return block;
  }
};

// How many elements of a block count.
inline int64_t count_valid(const Region& r) {
  if (!r.mask) return r.planes * r.length;
  if (r.counts) return *r.counts;
  int64_t count = 0;
  for (int64_t p = 0; p < r.planes; ++p) {
    const uint64_t* mask = r.mask + p * r.mask_stride;
    for (int64_t i = 0; i < (r.length + 63) / 64; ++i) count += __builtin_popcountll(mask[i]);
  }
  return count;
}

// Moments of `count` elements of one block, centred twice: the first mean is rounded to float, the sums about it are
// small and give back what the rounding took.
template <bool masked, class T> NW_INLINE Moments block_moments(const T* x, const Region& r, double count) {
  using C = compute_t<T>;
  vec<C> total[4] = {};
  for (int64_t p = 0; p < r.planes; ++p) {
    const T* run = x + p * r.stride;
    const uint64_t* mask = r.mask + p * r.mask_stride;
    sweep_sums<C>(r.length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      if constexpr (masked) {
        add(total[k], load(run + i, part), load_valid<C>(mask, i));
      } else {
        total[k] += load(run + i, part);
      }
    });
  }
  const C mean = C(double(sum_lanes<C>(total)) / count);

  vec<C> first[4] = {}, second[4] = {};
  for (int64_t p = 0; p < r.planes; ++p) {
    const T* run = x + p * r.stride;
    const uint64_t* mask = r.mask + p * r.mask_stride;
    sweep_sums<C>(r.length, [&](int64_t i, auto part, int k) NW_LAMBDA {
      vec<C> d = load(run + i, part) - mean;
      if constexpr (masked) {
        const Valid<C> valid = load_valid<C>(mask, i);
        add(first[k], d, valid);
        add_square(second[k], d, valid);
      } else {
        d = keep<C>(d, part);
        first[k] += d;
        second[k] += d * d;
      }
    });
  }
  double s1 = sum_lanes<C>(first);
  double s2 = sum_lanes<C>(second);
  return {count, double(mean) + s1 / count, s2 - s1 * s1 / count};
}

template <class T> NW_INLINE Moments block_moments(const T* x, const Region& r) {
  const int64_t count = count_valid(r);
  if (count == 0) return {};
  return count < r.planes * r.length ? block_moments<true>(x, r, double(count)) : block_moments<false>(x, r, double(count));
}

// Counts for a region whose mask many channels share.
inline void count_blocks(const Region& r, const Blocks& blocks, int64_t* counts) {
  for (int64_t i = 0; i < blocks.count; ++i) {
    int64_t offset;
    counts[i] = count_valid(blocks.at(r, i, offset));
  }
}

template <class T> inline Moments region_moments(const T* x, const Region& r) {
  if (r.planes == 1 && r.length <= Blocks::target && !r.mask) return block_moments<false>(x, r, double(r.length));
  Blocks blocks(r);
  Moments all;
  for (int64_t i = 0; i < blocks.count; ++i) {
    int64_t offset;
    Region block = blocks.at(r, i, offset);
    all.merge(block_moments(x + offset, block));
  }
  return all;
}

// A mean in double as the two numbers of the compute type that (x - high) - low needs.
template <class C> struct Centre {
  C high, low;
  explicit Centre(double mean) : high(C(mean)), low(C(mean - double(C(mean)))) {}
  NW_INLINE vec<C> distance(vec<C> x) const { return (x - high) - low; }
};

}  // namespace
}  // namespace NW_ISA
