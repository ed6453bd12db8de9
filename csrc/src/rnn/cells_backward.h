// The cells, backward: for some rows of one step, from the gradient of the state to those of the two products and of
// the state before. Gates are recomputed from the products that the forward saved.
#pragma once

#include "rnn/cells_forward.h"

namespace NW_ISA {
namespace {

template <class Part> NW_INLINE vec<float> total_dh(const BackwardRow& r, int64_t j, Part part) {
  const vec<float> dh = load(r.dh + j, part);
  return r.doutput ? dh + load(r.doutput + j, part) : dh;
}

// The rows that the forward saved are read in an order that the hardware prefetcher does not follow.
template <int placement, bool small_input>
NW_INLINE void prefetch_next(const Layer& layer, const BackwardRow& r, int64_t j) {
  for (int g = 0; g < layer.gates; ++g) {
    __builtin_prefetch(r.q + r.prefetch_offset + g * layer.units + j);
    if (!small_input && (placement == NW_SEPARATE || layer.reset_on_hidden)) {
      __builtin_prefetch(r.in.p + r.prefetch_offset + g * layer.units + j);
    }
  }
}

template <int R> NW_INLINE void add_rows(float* sum, float* const* v, int64_t n) {
  for_each_vector<float>(n, [&](int64_t i, auto part) NW_LAMBDA {
    vec<float> total = load(sum + i, part);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total += load(v[r] + i, part);
    store(sum + i, total, part);
  });
}

// From dz_ih and dz_hh, the gradients of the two terms, to dp and dq. They are the same unless a GRU's reset gate acts
// on the hidden term.
template <int placement, bool small_input, int R>
NW_INLINE void products_gradient(const Layer& layer, const BackwardRow* rows, const RowScales* s,
                                 const ParamGradSums& sums, float* const* dz_ih, float* const* dz_hh) {
  float *dp[R], *dq[R], rstd_p[R][4], rstd_q[R][4];
  const float *p[R], *q[R];
  for (int r = 0; r < R; ++r) {
    dp[r] = rows[r].dp, dq[r] = rows[r].dq, p[r] = rows[r].in.p, q[r] = rows[r].q;
    for (int g = 0; g < 4; ++g) rstd_p[r][g] = s[r].rstd_p[g], rstd_q[r][g] = s[r].rstd_q[g];
  }
  float* bias_hh = layer.reset_on_hidden ? sums.bias_hh : nullptr;
  if constexpr (small_input || placement == NW_UNNORMALIZED) add_rows<R>(sums.bias_ih, dz_ih, layer.gate_units);
  if constexpr (small_input) {
    small_input_gradient<placement, R>(layer, rows, dz_ih, s, sums);
  } else if constexpr (placement == NW_SEPARATE) {
    norm_gradient<R>(layer, dz_ih, p, layer.gain_ih, rstd_p, sums.gain_ih, sums.bias_ih, dp);
  }
  if constexpr (placement == NW_UNNORMALIZED) {
    if (bias_hh) add_rows<R>(bias_hh, dz_hh, layer.gate_units);
  } else {
    norm_gradient<R>(layer, dz_hh, q, layer.gain_hh, rstd_q, sums.gain_hh, placement == NW_SUM ? sums.bias_ih : bias_hh,
                     dq);
  }
  if constexpr (placement == NW_SUM) add_rows<R>(sums.bias_inner, dq, layer.gate_units);
}

// Where the gradient of the summed input is written first: without a norm it is that of the products.
template <int placement> NW_INLINE float* dz_row(const BackwardRow& r) {
  return placement == NW_UNNORMALIZED ? r.dq : r.scratch;
}

// Mean and rstd of a row's c.
struct CellStats {
  float mean, rstd;
};

template <int placement, bool small_input, bool normalized, int R>
NW_INLINE void lstm_backward(const Layer& layer, const BackwardRow* rows, const ParamGradSums& sums) {
  const int64_t n = layer.units;
  const bool normalizes_state = layer.cell_norm == NW_CELL_STATE;
  RowScales scales[R];
  float* dz_rows[R];
  CellStats cells[R];
  float mean_d[R], mean_d_hat[R];
  for (int row = 0; row < R; ++row) {
    read_statistics<placement, small_input>(layer, rows[row].in, rows[row].stats, scales[row]);
    dz_rows[row] = dz_row<placement>(rows[row]);
    if constexpr (normalized) {
      cells[row] = {.mean = rows[row].stats[layer.stat_width - 2], .rstd = rows[row].stats[layer.stat_width - 1]};
    }
  }
  const auto through_gates = [&](const BackwardRow& r, float* dz, int64_t j, auto part, vec<float> i, vec<float> f,
                                 vec<float> g, vec<float> dc) NW_LAMBDA {
    store(dz + j, dc * g * (i * (1.f - i)), part);
    store(dz + n + j, dc * load(r.c_before + j, part) * (f * (1.f - f)), part);
    store(dz + 2 * n + j, dc * i * (1.f - g * g), part);
    store(r.dc + j, dc * f, part);
  };
  for (int row = 0; row < R; ++row) {
    const BackwardRow r = rows[row];
    const RowScales& s = scales[row];
    const CellStats cell = cells[row];
    float *dz = dz_rows[row], *dreadout = r.scratch + 2 * layer.gate_units, *c_hat = dreadout + n;
    vec<float> sum_d{}, sum_d_hat{};
    for_each_vector<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      prefetch_next<placement, small_input>(layer, r, j);
      vec<float> i, f, g, o;
      if constexpr (placement == NW_UNNORMALIZED) {
        i = load(r.q + j, part), f = load(r.q + n + j, part);
        g = load(r.q + 2 * n + j, part), o = load(r.q + 3 * n + j, part);
      } else {
        i = sigmoid(summed_input<placement, small_input>(layer, s, r.in, r.q, 0, j, part));
        f = sigmoid(summed_input<placement, small_input>(layer, s, r.in, r.q, 1, j, part));
        g = tanh(summed_input<placement, small_input>(layer, s, r.in, r.q, 2, j, part));
        o = sigmoid(summed_input<placement, small_input>(layer, s, r.in, r.q, 3, j, part));
      }
      const vec<float> dh = total_dh(r, j, part);
      if constexpr (normalized) {
        const vec<float> c = normalizes_state ? f * load(r.c_before + j, part) + i * g : load(r.cell + j, part);
        const vec<float> gain = load(layer.gain_c + j, part), hat = (c - cell.mean) * cell.rstd;
        const vec<float> t = tanh(hat * gain + load(layer.bias_c + j, part));
        vec<float> d = dh * o * (1.f - t * t);
        if (normalizes_state) d += load(r.dc + j, part);
        store(dreadout + j, d, part);
        d *= gain;
        sum_d += d;
        sum_d_hat += d * hat;
        store(c_hat + j, hat, part);
        store(dz + j, i, part);
        store(dz + n + j, f, part);
        store(dz + 2 * n + j, g, part);
        store(dz + 3 * n + j, dh * t * (o * (1.f - o)), part);
      } else {
        const vec<float> t = tanh(load(r.cell + j, part));
        store(dz + 3 * n + j, dh * t * (o * (1.f - o)), part);
        through_gates(r, dz, j, part, i, f, g, load(r.dc + j, part) + dh * o * (1.f - t * t));
      }
    });
    mean_d[row] = layer.center ? sum_lanes<float>(sum_d) / float(n) : 0.f;
    mean_d_hat[row] = sum_lanes<float>(sum_d_hat) / float(n);
  }
  if constexpr (normalized) {
    for_each_vector<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> gain = load(layer.gain_c + j, part);
      vec<float> gains = load(sums.gain_c + j, part), biases = load(sums.bias_c + j, part);
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        const BackwardRow& r = rows[row];
        float *dz = dz_rows[row], *dreadout = r.scratch + 2 * layer.gate_units;
        const vec<float> d = load(dreadout + j, part), hat = load(dreadout + n + j, part);
        gains += d * hat;
        biases += d;
        vec<float> dc = cells[row].rstd * (d * gain - mean_d[row] - hat * mean_d_hat[row]);
        if (!normalizes_state) dc += load(r.dc + j, part);
        through_gates(r, dz, j, part, load(dz + j, part), load(dz + n + j, part), load(dz + 2 * n + j, part), dc);
      }
      store(sums.gain_c + j, gains, part);
      store(sums.bias_c + j, biases, part);
    });
  }
  products_gradient<placement, small_input, R>(layer, rows, scales, sums, dz_rows, dz_rows);
}

template <int placement, bool small_input, int R>
NW_INLINE void gru_backward(const Layer& layer, const BackwardRow* rows, const ParamGradSums& sums) {
  const int64_t n = layer.units;
  RowScales scales[R];
  float *dz_ih_rows[R], *dz_hh_rows[R];
  for (int row = 0; row < R; ++row) {
    const BackwardRow r = rows[row];
    RowScales& s = scales[row];
    read_statistics<placement, small_input>(layer, r.in, r.stats, s);
    // With small inputs there is no dp to fill.
    float* dz_ih = placement == NW_UNNORMALIZED && layer.reset_on_hidden && !small_input ? r.dp
                   : placement == NW_UNNORMALIZED && !layer.reset_on_hidden              ? r.dq
                                                                                         : r.scratch;
    float* dz_hh = !layer.reset_on_hidden ? dz_ih : placement == NW_UNNORMALIZED ? r.dq : r.scratch + layer.gate_units;
    dz_ih_rows[row] = dz_ih, dz_hh_rows[row] = dz_hh;
    for_each_vector<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      prefetch_next<placement, small_input>(layer, r, j);
      vec<float> reset, z, hidden, candidate;
      if (layer.reset_on_hidden) {
        reset = sigmoid(input_term<placement, small_input>(layer, s, r.in, 0, j, part) +
                        hidden_term<placement>(layer, s, r.q, 0, j, part));
        z = input_term<placement, small_input>(layer, s, r.in, 1, j, part) +
            hidden_term<placement>(layer, s, r.q, 1, j, part);
        hidden = hidden_term<placement>(layer, s, r.q, 2, j, part);
        candidate = tanh(input_term<placement, small_input>(layer, s, r.in, 2, j, part) + reset * hidden);
      } else {
        reset = sigmoid(summed_input<placement, small_input>(layer, s, r.in, r.q, 0, j, part));
        z = summed_input<placement, small_input>(layer, s, r.in, r.q, 1, j, part);
        hidden = summed_input<placement, small_input>(layer, s, r.in, r.q, 2, j, part);
        candidate = tanh(reset * hidden);
      }
      z = sigmoid(z + layer.update_offset);
      const vec<float> old = old_state_weight(layer, z), dh = total_dh(r, j, part);
      vec<float> dz = dh * (load(r.h_before + j, part) - candidate) * (z * (1.f - z));
      if (layer.update_paper) dz = -dz;
      const vec<float> dn = dh * (1.f - old) * (1.f - candidate * candidate);
      const vec<float> dr = dn * hidden * (reset * (1.f - reset));
      store(r.dh_direct + j, dh * old, part);
      store(dz_ih + j, dr, part);
      store(dz_ih + n + j, dz, part);
      store(dz_ih + 2 * n + j, layer.reset_on_hidden ? dn : dn * reset, part);
      if (layer.reset_on_hidden) {
        store(dz_hh + j, dr, part);
        store(dz_hh + n + j, dz, part);
        store(dz_hh + 2 * n + j, dn * reset, part);
      }
    });
  }
  products_gradient<placement, small_input, R>(layer, rows, scales, sums, dz_ih_rows, dz_hh_rows);
}

template <int placement, bool small_input, bool relu, int R>
NW_INLINE void rnn_backward(const Layer& layer, const BackwardRow* rows, const ParamGradSums& sums) {
  RowScales scales[R];
  float* dz_rows[R];
  for (int row = 0; row < R; ++row) {
    const BackwardRow r = rows[row];
    read_statistics<placement, small_input>(layer, r.in, r.stats, scales[row]);
    float* dz = dz_rows[row] = dz_row<placement>(r);
    for_each_vector<float>(layer.units, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> h = load(r.h + j, part), dh = total_dh(r, j, part);
      store(dz + j, dh * (relu ? activation_derivative<NW_RELU, float>(h) : 1.f - h * h), part);
    });
  }
  products_gradient<placement, small_input, R>(layer, rows, scales, sums, dz_rows, dz_rows);
}

template <int cell, int placement, bool small_input, int R>
NW_INLINE void rows_backward_of(const Layer& layer, const BackwardRow* rows, const ParamGradSums& sums) {
  if constexpr (cell == NW_LSTM && placement != NW_UNNORMALIZED) {
    return layer.cell_norm ? lstm_backward<placement, small_input, true, R>(layer, rows, sums)
                           : lstm_backward<placement, small_input, false, R>(layer, rows, sums);
  }
  if constexpr (cell == NW_LSTM && placement == NW_UNNORMALIZED) {
    return lstm_backward<placement, small_input, false, R>(layer, rows, sums);
  }
  if constexpr (cell == NW_GRU) return gru_backward<placement, small_input, R>(layer, rows, sums);
  if constexpr (cell == NW_RNN_TANH) return rnn_backward<placement, small_input, false, R>(layer, rows, sums);
  if constexpr (cell == NW_RNN_RELU) return rnn_backward<placement, small_input, true, R>(layer, rows, sums);
}

template <int cell, int placement, bool small_input>
void block_backward(const Layer& layer, const BackwardRow* rows, int count, const ParamGradSums& sums) {
  if (count == row_block) return rows_backward_of<cell, placement, small_input, row_block>(layer, rows, sums);
  for (int r = 0; r < count; ++r) rows_backward_of<cell, placement, small_input, 1>(layer, rows + r, sums);
}

inline BackwardCell backward_cell(const nw_recurrent& a) {
  return with_placement(a, [&](auto placement, auto small_input) {
    return with_cell(a, [](auto cell) -> BackwardCell {
      return block_backward<decltype(cell)::value, decltype(placement)::value, decltype(small_input)::value>;
    });
  });
}

}  // namespace
}  // namespace NW_ISA
