// The special case of at most four inputs that have no norm in common with the hidden term. p = W_ih x is then cheaper
// to compute in the cells than to write and read, and its statistics follow from x and the Gram matrix of the weight.
// Everything that is particular to it is here; the other files test `small_input`.
#pragma once

#include "common/rstd.h"
#include "rnn/row.h"

namespace NW_ISA {
namespace {

// Fills layer.small; `memory` has room for two weights of max_small_inputs inputs.
inline void prepare_small_input(const nw_recurrent& a, Layer& layer, float* memory) {
  const float* w = static_cast<const float*>(a.weight_ih);
  float *weight = memory, *scaled = memory + max_small_inputs * layer.gate_units;
  layer.small.inputs = int(a.inputs), layer.small.weight = weight, layer.small.scaled_weight = scaled;
  for (int g = 0; g < (a.norm_placement == NW_UNNORMALIZED ? 1 : layer.group_count); ++g) {
    const int64_t from = a.norm_placement == NW_UNNORMALIZED ? 0 : layer.group_begin[g] * layer.units;
    const int64_t end = a.norm_placement == NW_UNNORMALIZED ? layer.gate_units : layer.group_begin[g + 1] * layer.units;
    for (int i = 0; i < layer.small.inputs; ++i) {
      double mean = 0;
      for (int64_t j = from; j < end; ++j) mean += w[j * layer.small.inputs + i];
      mean = a.norm_placement != NW_UNNORMALIZED && layer.center ? mean / double(end - from) : 0;
      for (int64_t j = from; j < end; ++j) {
        weight[i * layer.gate_units + j] = float(w[j * layer.small.inputs + i] - mean);
        scaled[i * layer.gate_units + j] =
            weight[i * layer.gate_units + j] * (a.norm_placement == NW_UNNORMALIZED ? 1.f : layer.gain_ih[j]);
      }
      for (int k = 0; k <= i; ++k) {
        double sum = 0;
        for (int64_t j = from; j < end; ++j) {
          sum += double(weight[i * layer.gate_units + j]) * weight[k * layer.gate_units + j];
        }
        const float average = float(sum / double(end - from));
        layer.small.gram[g][i * max_small_inputs + k] = layer.small.gram[g][k * max_small_inputs + i] = average;
      }
    }
  }
}

template <int placement> NW_INLINE void scale_small_input(const Layer& layer, const float* x, RowScales& s) {
  for (int gate = 0; gate < layer.gates; ++gate) {
    for (int i = 0; i < layer.small.inputs; ++i) {
      s.scaled_x[gate][i] = placement == NW_SEPARATE ? x[i] * s.rstd_p[gate] : x[i];
    }
  }
}

// The rstd of group g of p.
NW_INLINE float small_input_rstd(const Layer& layer, int g, const float* x) {
  float sum = 0.f;
  for (int i = 0; i < layer.small.inputs; ++i) {
    for (int k = 0; k < layer.small.inputs; ++k) sum += x[i] * x[k] * layer.small.gram[g][i * max_small_inputs + k];
  }
  return rstd_of(sum > 0.f ? sum : 0.f, layer.eps);
}

// N_ih(p) without its bias, units `at`.. of all gates, of which the first belongs to gate g.
template <class Part>
NW_INLINE vec<float> small_input_term(const Layer& layer, const RowScales& s, int g, int64_t at, Part part) {
  vec<float> v{};
  for (int i = 0; i < layer.small.inputs; ++i) {
    v += s.scaled_x[g][i] * load(layer.small.scaled_weight + i * layer.gate_units + at, part);
  }
  return v;
}

// For R rows: dx, and the sums from which finish_small_input computes dW_ih and dgain_ih.
template <int placement, int R>
NW_INLINE void small_input_gradient(const Layer& layer, const BackwardRow* rows, float* const* dz, const RowScales* s,
                                    const ParamGradSums& sums) {
  float dx[R][max_small_inputs] = {};
  const int groups = placement == NW_UNNORMALIZED ? 1 : layer.group_count;
  for (int g = 0; g < groups; ++g) {
    const int gate = placement == NW_UNNORMALIZED ? 0 : layer.group_begin[g];
    const int64_t from = gate * layer.units,
                  n = placement == NW_UNNORMALIZED ? layer.gate_units : layer.group_begin[g + 1] * layer.units - from;
    float dots[R][max_small_inputs];
    for (int i = 0; i < layer.small.inputs; ++i) {
      vec<float> dot[R] = {};
      const float* scaled = layer.small.scaled_weight + i * layer.gate_units + from;
      float* sum = sums.small_weight + i * layer.gate_units + from;
      for_each_vector<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
        const vec<float> weight = load(scaled + j, part);
        vec<float> total = load(sum + j, part);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const vec<float> d = load(dz[r] + from + j, part);
          total += s[r].scaled_x[gate][i] * d;
          dot[r] += weight * d;
        }
        store(sum + j, total, part);
      });
      for (int r = 0; r < R; ++r) dots[r][i] = sum_lanes<float>(dot[r]);
    }
    for (int r = 0; r < R; ++r) {
      const float rstd = placement == NW_UNNORMALIZED ? 1.f : s[r].rstd_p[gate];
      const float* x = s[r].scaled_x[gate];
      float projection = 0.f;  // avg(w * hat)
      for (int i = 0; placement != NW_UNNORMALIZED && i < layer.small.inputs; ++i) {
        projection += x[i] * dots[r][i] / float(n);
      }
      for (int i = 0; i < layer.small.inputs; ++i) {
        float overlap = 0.f;  // avg(hat * row i of the weight)
        for (int k = 0; k < layer.small.inputs; ++k) {
          overlap += x[k] * layer.small.gram[g][i * max_small_inputs + k];
          sums.small_gram[(g * max_small_inputs + i) * max_small_inputs + k] += x[i] * x[k] * projection;
        }
        dx[r][i] += rstd * (dots[r][i] - projection * float(n) * overlap);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; rows[r].dx && i < layer.small.inputs; ++i) rows[r].dx[i] = dx[r][i];
  }
}

// From the sums of all rows to the gradients of the weight and its gain. With hat the sum over i of x_i * row i of the
// weight, dgain = sum of dz * hat, and dW is the sum over rows of x * rstd * (w - avg(w) - hat * avg(w * hat)), where
// w = dz * gain.
inline void finish_small_input(const Layer& layer, const double* weight_sums, const double* gram_sums, float* dweight,
                               float* dgain) {
  const bool unnormalized = layer.norm_placement == NW_UNNORMALIZED;
  for (int g = 0; g < (unnormalized ? 1 : layer.group_count); ++g) {
    const int64_t from = unnormalized ? 0 : layer.group_begin[g] * layer.units;
    const int64_t end = unnormalized ? layer.gate_units : layer.group_begin[g + 1] * layer.units;
    for (int i = 0; dweight && i < layer.small.inputs; ++i) {
      const double* sum = weight_sums + i * layer.gate_units;
      double mean = 0;
      for (int64_t j = from; !unnormalized && layer.center && j < end; ++j) {
        mean += sum[j] * layer.gain_ih[j] / double(end - from);
      }
      for (int64_t j = from; j < end; ++j) {
        double d = unnormalized ? sum[j] : sum[j] * layer.gain_ih[j] - mean;
        for (int k = 0; k < layer.small.inputs; ++k) {
          d -= gram_sums[(g * max_small_inputs + i) * max_small_inputs + k] *
               layer.small.weight[k * layer.gate_units + j];
        }
        dweight[j * layer.small.inputs + i] = float(d);
      }
    }
    for (int64_t j = from; dgain && j < end; ++j) {
      double d = 0;
      for (int i = 0; i < layer.small.inputs; ++i) {
        d += double(layer.small.weight[i * layer.gate_units + j]) * weight_sums[i * layer.gate_units + j];
      }
      dgain[j] = float(d);
    }
  }
}

}  // namespace
}  // namespace NW_ISA
