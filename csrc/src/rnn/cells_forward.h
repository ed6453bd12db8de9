// The cells, forward: for some rows of one step, from the two products to the next state.
#pragma once

#include "common/activations.h"
#include "rnn/row_norm.h"
#include "rnn/small_input.h"

namespace NW_ISA {
namespace {

NW_INLINE vec<float> sigmoid(vec<float> z) {
  vec<float> scale;
  const vec<float> p = scaled_expm1(-clamp(z, 87.f), scale);
  return reciprocal(p * scale + (scale + 1.f));
}

// tanh|x| = e / (e + 2) with e = exp(2|x|) - 1, which stays accurate near 0. Beyond 10 it is 1 in float.
NW_INLINE vec<float> tanh(vec<float> x) {
  const vmask<float> sign = (vmask<float>)x & INT32_MIN;
  vec<float> scale;
  const vec<float> p = scaled_expm1(clamp((vec<float>)((vmask<float>)(x + x) ^ sign), 20.f), scale);
  const vec<float> e = p * scale + (scale - 1.f);
  return (vec<float>)((vmask<float>)(e * reciprocal(e + 2.f)) | sign);
}

// Copies a number per group to each of its gates.
NW_INLINE void expand_groups(const Layer& layer, const float* by_group, float* by_gate) {
  for (int g = 0; g < layer.group_count; ++g) {
    for (int gate = layer.group_begin[g]; gate < layer.group_begin[g + 1]; ++gate) by_gate[gate] = by_group[g];
  }
}

// Centers q, computes the statistics of a row, and stores them in `stats` unless it is null.
template <int placement, bool small_input>
NW_INLINE void measure_statistics(const Layer& layer, RowInput in, const float* q, float* centered, float* stats,
                                  RowScales& s) {
  if constexpr (placement != NW_UNNORMALIZED) {
    float local[8];
    float* row_stats = stats ? stats : local;
    for (int g = 0; g < layer.group_count; ++g) {
      const int64_t from = layer.group_begin[g] * layer.units, n = layer.group_begin[g + 1] * layer.units - from;
      if constexpr (placement == NW_SEPARATE) {
        row_stats[g] = small_input ? small_input_rstd(layer, g, in.x) : in.rstd[g];
        row_stats[layer.group_count + g] = center_and_rstd(q + from, n, layer.center, layer.eps, centered + from);
      } else {
        row_stats[g] = center_and_rstd(q + from, n, layer.center, layer.eps, centered + from);
      }
    }
    if constexpr (placement == NW_SEPARATE) expand_groups(layer, row_stats, s.rstd_p);
    expand_groups(layer, row_stats + (placement == NW_SEPARATE ? layer.group_count : 0), s.rstd_q);
  }
  if constexpr (small_input) scale_small_input<placement>(layer, in.x, s);
}
template <int placement, bool small_input>
NW_INLINE void read_statistics(const Layer& layer, RowInput in, const float* stats, RowScales& s) {
  if constexpr (placement == NW_SEPARATE) expand_groups(layer, stats, s.rstd_p);
  if constexpr (placement != NW_UNNORMALIZED) {
    expand_groups(layer, stats + (placement == NW_SEPARATE ? layer.group_count : 0), s.rstd_q);
  }
  if constexpr (small_input) scale_small_input<placement>(layer, in.x, s);
}

// N_ih(p) and N_hh(q) of gate `g`, units j.., without biases.
template <int placement, bool small_input, class Part>
NW_INLINE vec<float> normalized_input(const Layer& layer, const RowScales& s, RowInput in, int g, int64_t j,
                                      Part part) {
  const int64_t at = g * layer.units + j;
  if constexpr (small_input) {
    return small_input_term(layer, s, g, at, part);
  } else if constexpr (placement == NW_SEPARATE) {
    return load(in.p + at, part) * (s.rstd_p[g] * load(layer.gain_ih + at, part));
  } else {
    return load(in.p + at, part);
  }
}
template <int placement, class Part>
NW_INLINE vec<float> normalized_hidden(const Layer& layer, const RowScales& s, const float* q, int g, int64_t j,
                                       Part part) {
  const int64_t at = g * layer.units + j;
  if constexpr (placement == NW_UNNORMALIZED) return load(q + at, part);
  return load(q + at, part) * (s.rstd_q[g] * load(layer.gain_hh + at, part));
}

// The summed input of the step; q holds p + q unless they are separate or the cells compute p.
template <int placement, bool small_input, class Part>
NW_INLINE vec<float> summed_input(const Layer& layer, const RowScales& s, RowInput in, const float* q, int g, int64_t j,
                                  Part part) {
  const vec<float> hidden =
      normalized_hidden<placement>(layer, s, q, g, j, part) + load(layer.bias + g * layer.units + j, part);
  if constexpr (placement == NW_SEPARATE || small_input) {
    return normalized_input<placement, small_input>(layer, s, in, g, j, part) + hidden;
  }
  return hidden;
}
// The two terms by themselves, for a GRU whose reset gate acts on the hidden one.
template <int placement, bool small_input, class Part>
NW_INLINE vec<float> input_term(const Layer& layer, const RowScales& s, RowInput in, int g, int64_t j, Part part) {
  return normalized_input<placement, small_input>(layer, s, in, g, j, part) +
         load(layer.bias_ih + g * layer.units + j, part);
}
template <int placement, class Part>
NW_INLINE vec<float> hidden_term(const Layer& layer, const RowScales& s, const float* q, int g, int64_t j, Part part) {
  return normalized_hidden<placement>(layer, s, q, g, j, part) + load(layer.bias_hh + g * layer.units + j, part);
}

template <class Part> NW_INLINE void store_state(const ForwardRow& r, int64_t j, vec<float> h, Part part) {
  store(r.h + j, h, part);
  store(r.output + j, h, part);
}

template <int placement, bool small_input, bool normalized>
void lstm_forward(const Layer& layer, const ForwardRow* rows, int count) {
  const int64_t n = layer.units;
  RowScales scales[row_block];
  float mean[row_block] = {}, rstd[row_block];
  for (int row = 0; row < count; ++row) {
    measure_statistics<placement, small_input>(layer, rows[row].in, rows[row].q, rows[row].centered, rows[row].stats,
                                               scales[row]);
  }
  for (int row = 0; row < count; ++row) {
    const ForwardRow r = rows[row];
    const RowScales& s = scales[row];
    const float* q = placement == NW_UNNORMALIZED ? r.q : r.centered;
    vec<float> sum{};
    for_each_vector<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> i = sigmoid(summed_input<placement, small_input>(layer, s, r.in, q, 0, j, part));
      const vec<float> f = sigmoid(summed_input<placement, small_input>(layer, s, r.in, q, 1, j, part));
      const vec<float> g = tanh(summed_input<placement, small_input>(layer, s, r.in, q, 2, j, part));
      const vec<float> o = sigmoid(summed_input<placement, small_input>(layer, s, r.in, q, 3, j, part));
      const vec<float> c = f * load(r.c + j, part) + i * g;
      store(r.c + j, c, part);
      if constexpr (normalized) {
        sum += clear_tail<float>(c, part);
        store(r.scratch + j, o, part);
      } else {
        store_state(r, j, o * tanh(c), part);
        if (r.cell) store(r.cell + j, c, part);
      }
      if constexpr (placement == NW_UNNORMALIZED) {
        if (r.gates) {
          store(r.gates + j, i, part);
          store(r.gates + n + j, f, part);
          store(r.gates + 2 * n + j, g, part);
          store(r.gates + 3 * n + j, o, part);
        }
      }
    });
    if constexpr (normalized) mean[row] = layer.center ? sum_lanes<float>(sum) / float(n) : 0.f;
  }
  if constexpr (normalized) {
    for (int row = 0; row < count; ++row) {
      vec<float> square[4] = {};
      for_each_vector_x4<float>(n, [&](int64_t j, auto part, int at) NW_LAMBDA {
        const vec<float> d = clear_tail<float>(load(rows[row].c + j, part) - mean[row], part);
        square[at] += d * d;
      });
      rstd[row] = rstd_of(sum_lanes<float>(square) / float(n), layer.eps);
    }
    const bool normalizes_state = layer.cell_norm == NW_CELL_STATE;
    for (int row = 0; row < count; ++row) {
      const ForwardRow r = rows[row];
      if (r.stats) r.stats[layer.stat_width - 2] = mean[row], r.stats[layer.stat_width - 1] = rstd[row];
      for_each_vector<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
        const vec<float> c = load(r.c + j, part);
        const vec<float> readout =
            (c - mean[row]) * (rstd[row] * load(layer.gain_c + j, part)) + load(layer.bias_c + j, part);
        if (normalizes_state) store(r.c + j, readout, part);
        if (r.cell) store(r.cell + j, normalizes_state ? readout : c, part);
        store_state(r, j, load(r.scratch + j, part) * tanh(readout), part);
      });
    }
  }
}

// The weight of the old state in the new one, from the update gate.
template <class V> NW_INLINE V old_state_weight(const Layer& layer, V z) { return layer.update_paper ? 1.f - z : z; }

template <int placement, bool small_input> void gru_forward(const Layer& layer, const ForwardRow* rows, int count) {
  RowScales scales[row_block];
  for (int row = 0; row < count; ++row) {
    measure_statistics<placement, small_input>(layer, rows[row].in, rows[row].q, rows[row].centered, rows[row].stats,
                                               scales[row]);
  }
  for (int row = 0; row < count; ++row) {
    const ForwardRow r = rows[row];
    const RowScales& s = scales[row];
    const float* q = placement == NW_UNNORMALIZED ? r.q : r.centered;
    for_each_vector<float>(layer.units, [&](int64_t j, auto part) NW_LAMBDA {
      vec<float> candidate, z;
      if (layer.reset_on_hidden) {
        const vec<float> reset = sigmoid(input_term<placement, small_input>(layer, s, r.in, 0, j, part) +
                                         hidden_term<placement>(layer, s, q, 0, j, part));
        z = input_term<placement, small_input>(layer, s, r.in, 1, j, part) +
            hidden_term<placement>(layer, s, q, 1, j, part);
        candidate = tanh(input_term<placement, small_input>(layer, s, r.in, 2, j, part) +
                         reset * hidden_term<placement>(layer, s, q, 2, j, part));
      } else {
        const vec<float> reset = sigmoid(summed_input<placement, small_input>(layer, s, r.in, q, 0, j, part));
        z = summed_input<placement, small_input>(layer, s, r.in, q, 1, j, part);
        candidate = tanh(reset * summed_input<placement, small_input>(layer, s, r.in, q, 2, j, part));
      }
      const vec<float> old = old_state_weight(layer, sigmoid(z + layer.update_offset));
      store_state(r, j, old * load(r.h + j, part) + (1.f - old) * candidate, part);
    });
  }
}

template <int placement, bool small_input, bool relu>
void rnn_forward(const Layer& layer, const ForwardRow* rows, int count) {
  RowScales scales[row_block];
  for (int row = 0; row < count; ++row) {
    measure_statistics<placement, small_input>(layer, rows[row].in, rows[row].q, rows[row].centered, rows[row].stats,
                                               scales[row]);
  }
  for (int row = 0; row < count; ++row) {
    const ForwardRow r = rows[row];
    for_each_vector<float>(layer.units, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> z = summed_input<placement, small_input>(
          layer, scales[row], r.in, placement == NW_UNNORMALIZED ? r.q : r.centered, 0, j, part);
      store_state(r, j, relu ? activate<NW_RELU, float>(z) : tanh(z), part);
    });
  }
}

inline ForwardCell forward_cell(const nw_recurrent& a) {
  return with_placement(a, [&](auto norm_placement, auto few_inputs) {
    constexpr int placement = decltype(norm_placement)::value;
    constexpr bool small_input = decltype(few_inputs)::value;
    return with_cell(a, [&](auto kind) -> ForwardCell {
      constexpr int cell = decltype(kind)::value;
      if constexpr (cell == NW_LSTM) {
        return a.cell_norm ? lstm_forward<placement, small_input, true> : lstm_forward<placement, small_input, false>;
      }
      if constexpr (cell == NW_GRU) return gru_forward<placement, small_input>;
      if constexpr (cell == NW_RNN_TANH) return rnn_forward<placement, small_input, false>;
      if constexpr (cell == NW_RNN_RELU) return rnn_forward<placement, small_input, true>;
    });
  });
}

}  // namespace
}  // namespace NW_ISA
