// GroupNorm and InstanceNorm on (batch, positions, channels): statistics down the columns of one sample, then across
// the columns of a group. Each thread computes whole samples: the second pass then finds the end of the sample in
// cache. With too few samples for the threads, they share the chunks of rows of all samples instead; the chunks, and
// the order in which they are merged, stay the same, so the results do too.
#include "common/activations.h"
#include "norm/columns_backward.h"
#include "norm/groups.h"

namespace NW_ISA {
namespace {

// How the work is divided among threads. Each sample goes through four stages: prepare(sample, slot),
// accumulate(sample, chunk, slot) for every chunk, reduce(sample, slot), apply(sample, chunk, slot) for every chunk.
// Samples that are in progress at the same time have a slot of scratch memory each.
struct Plan {
  int64_t samples;
  Chunks chunks;
  int threads;
  bool by_sample;
  int64_t slots;

  template <class Args>
  explicit Plan(const Args& a)
      : samples(a.batch),
        chunks(row_chunks(a.positions)),
        threads(useful_threads(a.batch * a.channels * a.positions, a.threads)),
        by_sample(fills_threads(samples, threads)),
        slots(by_sample && threads < samples ? threads : samples) {}

  template <class Prepare, class Accumulate, class Reduce, class Apply>
  void run(Prepare prepare, Accumulate accumulate, Reduce reduce, Apply apply) const {
    if (by_sample) {
      parallel_for(slots, threads, [&](int64_t slot) {
        for (int64_t n = samples * slot / slots; n < samples * (slot + 1) / slots; ++n) {
          prepare(n, slot);
          for (int64_t k = 0; k < chunks.count; ++k) accumulate(n, k, slot);
          reduce(n, slot);
          for (int64_t k = chunks.count - 1; k >= 0; --k) apply(n, k, slot);
        }
      });
      return;
    }
    const int64_t tasks = samples * chunks.count;
    for (int64_t n = 0; n < samples; ++n) prepare(n, n);
    parallel_for(tasks, threads, [&](int64_t i) { accumulate(i / chunks.count, i % chunks.count, i / chunks.count); });
    for (int64_t n = 0; n < samples; ++n) reduce(n, n);
    parallel_for(tasks, threads, [&](int64_t i) { apply(i / chunks.count, i % chunks.count, i / chunks.count); });
  }
};

template <class C, class Args> void set_affine(const Args& a, int64_t sample, ColumnCoeffs<C>& coeffs) {
  const int64_t channels = a.channels / a.groups;
  for (int64_t c = 0; c < a.channels; ++c) coeffs.set(c, affine_of<C>(a, sample * a.groups + c / channels, c));
  coeffs.repeat_affine();
}

template <class T, int act> int forward(const nw_groups_forward_args& a) {
  using C = compute_t<T>;
  const Plan plan(a);
  const Chunks& chunks = plan.chunks;
  const int64_t channels = a.channels / a.groups, run = run_length(a.positions, a.channels, a.mask);
  const int64_t coeff_count = ColumnCoeffs<C>::arrays * run;
  ChunkMoments<C> moments(plan.slots * chunks.count, a.channels, run);
  Scratch<C> coeff_memory(plan.slots * coeff_count);
  if (!moments || !coeff_memory) return NW_OUT_OF_MEMORY;

  plan.run([](int64_t, int64_t) {},
           [&](int64_t n, int64_t k, int64_t slot) {
             moments.compute(slot * chunks.count + k, forward_arrays<T>(a, n * a.positions, run), chunks.begin(k),
                             chunks.end(k));
           },
           [&](int64_t n, int64_t slot) {
             const ColumnMoments m = moments.merged(slot * chunks.count, chunks.count);
             for (int64_t g = 0; g < a.groups; ++g) {
               Moments group;
               for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
                 group.merge({.count = m.count, .mean = m.mean[c], .m2 = m.m2[c]});
               }
               store_statistics(a, n * a.groups + g, group);
             }
             ColumnCoeffs<C> coeffs(coeff_memory.get() + slot * coeff_count, a.channels, run);
             set_affine(a, n, coeffs);
           },
           [&](int64_t n, int64_t k, int64_t slot) {
             const ColumnCoeffs<C> coeffs(coeff_memory.get() + slot * coeff_count, a.channels, run);
             normalize_rows<T, act>(forward_arrays<T>(a, n * a.positions, run), coeffs, chunks.begin(k), chunks.end(k));
           });
  return NW_OK;
}

template <class T, int act> int backward(const nw_groups_backward_args& a) {
  using C = compute_t<T>;
  const Plan plan(a);
  const Chunks& chunks = plan.chunks;
  const int64_t channels = a.channels / a.groups, run = run_length(a.positions, a.channels, a.mask);
  const int64_t coeff_count = ColumnCoeffs<C>::arrays * run;
  ChunkGradSums<C> partial(plan.slots * chunks.count, a.channels, run);
  Scratch<C> coeff_memory(plan.slots * coeff_count);
  Scratch<GradSums> sums(a.batch * a.channels);
  if (!partial || !coeff_memory || !sums) return NW_OUT_OF_MEMORY;

  plan.run(
      [&](int64_t n, int64_t slot) {
        ColumnCoeffs<C> coeffs(coeff_memory.get() + slot * coeff_count, a.channels, run);
        set_affine(a, n, coeffs);
      },
      [&](int64_t n, int64_t k, int64_t slot) {
        const ColumnCoeffs<C> coeffs(coeff_memory.get() + slot * coeff_count, a.channels, run);
        partial.template compute<act>(slot * chunks.count + k, backward_arrays<T>(a, n * a.positions, run), coeffs,
                                      chunks.begin(k), chunks.end(k));
      },
      [&](int64_t n, int64_t slot) {
        const double* summed = partial.summed(slot * chunks.count, chunks.count);
        GradSums* const sample_sums = sums.get() + n * a.channels;
        for (int64_t c = 0; c < a.channels; ++c) {
          sample_sums[c] = sums_of_column(summed, a.channels, c, affine_of<C>(a, n * a.groups + c / channels, c));
        }
        ColumnCoeffs<C> coeffs(coeff_memory.get() + slot * coeff_count, a.channels, run);
        const double count = count_elements(a, n);
        for (int64_t g = 0; g < a.groups; ++g) {
          const GroupGradCoeffs<C> group_coeffs(a, n * a.groups + g, sample_sums + g * channels, count);
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t channel = g * channels + c;
            coeffs.set(channel, affine_of<C>(a, n * a.groups + g, channel), group_coeffs.of(c));
          }
        }
        coeffs.repeat_gradient();
      },
      [&](int64_t n, int64_t k, int64_t slot) {
        const ColumnCoeffs<C> coeffs(coeff_memory.get() + slot * coeff_count, a.channels, run);
        input_gradient_rows<T, act>(backward_arrays<T>(a, n * a.positions, run), coeffs, chunks.begin(k),
                                    chunks.end(k));
      });
  parameter_gradients<C>(a, sums.get(), plan.threads);
  return NW_OK;
}

}  // namespace

int groups_last_forward(const nw_groups_forward_args& a) {
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return forward<T, act>(a); });
}

int groups_last_backward(const nw_groups_backward_args& a) {
  return dispatch_dtype_and_act(a.dtype, a.act, [&]<class T, int act>() { return backward<T, act>(a); });
}

}  // namespace NW_ISA
