// Some rows of one step, backward: from the gradient of the state to those of the two products and of the state before.
// Gates are computed again from the products that the forward kept.
#pragma once

#include "rnn/cells_forward.h"

namespace NW_ISA {
namespace {

// One thread's sums over rows, of which the gradients of gains, biases and few inputs' weights are made.
struct Sums {
  float *bias_ih, *bias_hh, *gain_ih, *gain_hh, *inner;  // stacked
  float *gain_c, *bias_c;                                // units
  float* thin;                                           // (most_thin, stacked): of dz times the scaled input
  float* tilts;                                          // (groups, most_thin, most_thin)
  static int64_t size(const Layer& k) { return thin_at(k) + most_thin * k.stacked + 4 * most_thin * most_thin; }
  static int64_t thin_at(const Layer& k) { return 5 * k.stacked + 2 * k.units; }
  Sums(const Layer& k, float* memory)
      : bias_ih(memory), bias_hh(memory + k.stacked), gain_ih(memory + 2 * k.stacked), gain_hh(memory + 3 * k.stacked),
        inner(memory + 4 * k.stacked), gain_c(memory + 5 * k.stacked), bias_c(memory + 5 * k.stacked + k.units),
        thin(memory + thin_at(k)), tilts(thin + most_thin * k.stacked) {}
};

struct BackwardRow {
  Inputs in;             // as in ForwardRow
  const float* q;        // stacked; activated gates of an LSTM without norms
  const float* stats;
  const float* h_before; // units: the state that the step started from
  const float* c_before; // units; LSTM
  const float* h;        // units: the row's output
  const float* cell;     // units: its c as carried; LSTM
  const float* doutput;  // units, or null: 0
  const float* dh;       // units: gradient of h by way of the next step
  float* direct;         // units: filled with the part of dh_before that does not go through the products; GRU. May be dh
  float* dc;             // units: in: gradient of c, out: of c before; LSTM
  float* dp;             // stacked: filled; the same as dq unless p and q are apart; not used with few inputs
  float* dq;             // stacked: filled
  float* dx;             // few inputs: filled, or null
  float* scratch;        // 2 * stacked + 2 * units
  int64_t ahead;         // from p and q to those of the row that comes row_block rows later
};
using BackwardCell = void (*)(const Layer&, const BackwardRow*, int rows, const Sums&);

template <class Part> NW_INLINE vec<float> dh_of(const BackwardRow& r, int64_t j, Part part) {
  const vec<float> dh = load(r.dh + j, part);
  return r.doutput ? dh + load(r.doutput + j, part) : dh;
}

// What the forward kept lies in memory row by row in an order that the processor does not foresee.
template <int terms, bool thin> NW_INLINE void fetch_next(const Layer& k, const BackwardRow& r, int64_t j) {
  for (int g = 0; g < k.gates; ++g) {
    __builtin_prefetch(r.q + r.ahead + g * k.units + j);
    if (!thin && (terms == NW_SEPARATE || k.hidden_apart)) __builtin_prefetch(r.in.p + r.ahead + g * k.units + j);
  }
}

template <int R> NW_INLINE void add_rows(float* sum, float* const* v, int64_t n) {
  sweep<float>(n, [&](int64_t i, auto part) NW_LAMBDA {
    vec<float> total = load(sum + i, part);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total += load(v[r] + i, part);
    store(sum + i, total, part);
  });
}

// For each row dv of z = v * rstd * gain, v less its mean over each group, by groups; dgain += dz * v * rstd; and
// dbias += dz, if there is such.
template <int R>
NW_INLINE void norm_gradient(const Layer& k, float* const* dz, const float* const* v, const float* gain,
                             const float (*rstd)[4], float* dgain, float* dbias, float* const* dv) {
  for (int g = 0; g < k.group_count; ++g) {
    const int64_t from = k.group_from[g] * k.units, n = k.group_from[g + 1] * k.units - from;
    float by[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) by[r] = rstd[r][k.group_from[g]];
    vec<float> one[R] = {}, along[R] = {};
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const int64_t i = from + j;
      const vec<float> scale = load(gain + i, part);
      vec<float> gains = load(dgain + i, part), biases{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vec<float> d = load(dz[r] + i, part), x = load(v[r] + i, part), dx = d * x;
        gains += dx * by[r];
        biases += d;
        one[r] += d * scale;
        along[r] += dx * scale;
      }
      store(dgain + i, gains, part);
      if (dbias) store(dbias + i, load(dbias + i, part) + biases, part);
    });
    // dv = rstd * (w - avg(w) - hat * avg(w * hat)) with w = dz * gain and hat = v * rstd
    float shift[R], tilt[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float scale = -by[r] / float(n);
      shift[r] = k.center ? scale * sum_lanes<float>(one[r]) : 0.f;
      tilt[r] = scale * by[r] * by[r] * sum_lanes<float>(along[r]);
    }
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const int64_t i = from + j;
      const vec<float> scale = load(gain + i, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vec<float> rest = load(v[r] + i, part) * tilt[r] + shift[r];
        store(dv[r] + i, load(dz[r] + i, part) * (by[r] * scale) + rest, part);
      }
    });
  }
}

// The same for few inputs: dx, and sums of which dW_ih and dgain_ih are made in the end (see `finish_thin`).
template <int terms, int R>
NW_INLINE void thin_gradient(const Layer& k, const BackwardRow* rows, float* const* dz, const Scales* s,
                             const Sums& sums) {
  float dx[R][most_thin] = {};
  const int groups = terms == NW_PLAIN ? 1 : k.group_count;
  for (int g = 0; g < groups; ++g) {
    const int gate = terms == NW_PLAIN ? 0 : k.group_from[g];
    const int64_t from = gate * k.units, n = terms == NW_PLAIN ? k.stacked : k.group_from[g + 1] * k.units - from;
    float dots[R][most_thin];
    for (int i = 0; i < k.thin; ++i) {
      vec<float> dot[R] = {};
      const float* scaled = k.thin_scaled + i * k.stacked + from;
      float* sum = sums.thin + i * k.stacked + from;
      sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
        const vec<float> weight = load(scaled + j, part);
        vec<float> total = load(sum + j, part);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const vec<float> d = load(dz[r] + from + j, part);
          total += s[r].x[gate][i] * d;
          dot[r] += weight * d;
        }
        store(sum + j, total, part);
      });
      for (int r = 0; r < R; ++r) dots[r][i] = sum_lanes<float>(dot[r]);
    }
    for (int r = 0; r < R; ++r) {
      const float rstd = terms == NW_PLAIN ? 1.f : s[r].p[gate];
      const float* x = s[r].x[gate];
      float tilt = 0.f;  // avg(w * hat)
      for (int i = 0; terms != NW_PLAIN && i < k.thin; ++i) tilt += x[i] * dots[r][i] / float(n);
      for (int i = 0; i < k.thin; ++i) {
        float along = 0.f;  // avg(hat * column i)
        for (int other = 0; other < k.thin; ++other) {
          along += x[other] * k.thin_gram[g][i * most_thin + other];
          sums.tilts[(g * most_thin + i) * most_thin + other] += x[i] * x[other] * tilt;
        }
        dx[r][i] += rstd * (dots[r][i] - tilt * float(n) * along);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; rows[r].dx && i < k.thin; ++i) rows[r].dx[i] = dx[r][i];
  }
}

// From dz, the gradients of the two terms, to dp and dq; the same gradient unless a GRU's reset gate came between.
template <int terms, bool thin, int R>
NW_INLINE void products_gradient(const Layer& k, const BackwardRow* rows, const Scales* s, const Sums& sums,
                                 float* const* dz_ih, float* const* dz_hh) {
  float *dp[R], *dq[R], rstd_p[R][4], rstd_q[R][4];
  const float *p[R], *q[R];
  for (int r = 0; r < R; ++r) {
    dp[r] = rows[r].dp, dq[r] = rows[r].dq, p[r] = rows[r].in.p, q[r] = rows[r].q;
    for (int g = 0; g < 4; ++g) rstd_p[r][g] = s[r].p[g], rstd_q[r][g] = s[r].q[g];
  }
  float* bias_hh = k.hidden_apart ? sums.bias_hh : nullptr;
  if constexpr (thin || terms == NW_PLAIN) add_rows<R>(sums.bias_ih, dz_ih, k.stacked);
  if constexpr (thin) {
    thin_gradient<terms, R>(k, rows, dz_ih, s, sums);
  } else if constexpr (terms == NW_SEPARATE) {
    norm_gradient<R>(k, dz_ih, p, k.gain_ih, rstd_p, sums.gain_ih, sums.bias_ih, dp);
  }
  if constexpr (terms == NW_PLAIN) {
    if (bias_hh) add_rows<R>(bias_hh, dz_hh, k.stacked);
  } else {
    norm_gradient<R>(k, dz_hh, q, k.gain_hh, rstd_q, sums.gain_hh, terms == NW_SUM ? sums.bias_ih : bias_hh, dq);
  }
  if constexpr (terms == NW_SUM) add_rows<R>(sums.inner, dq, k.stacked);
}

// Where the gradient of the summed input goes first: without a norm it is that of the products.
template <int terms> NW_INLINE float* gradient_row(const BackwardRow& r) {
  return terms == NW_PLAIN ? r.dq : r.scratch;
}

template <int terms, bool thin, bool normalized, int R>
NW_INLINE void lstm_backward(const Layer& k, const BackwardRow* rows, const Sums& sums) {
  const int64_t n = k.units;
  const bool carried = k.cell_norm == NW_CELL_CARRIED;
  Scales scales[R];
  float* dz_rows[R];
  Stat cells[R];
  float all[R], along[R];
  for (int row = 0; row < R; ++row) {
    read_row<terms, thin>(k, rows[row].in, rows[row].stats, scales[row]);
    dz_rows[row] = gradient_row<terms>(rows[row]);
    if constexpr (normalized) cells[row] = {rows[row].stats[k.stat_width - 2], rows[row].stats[k.stat_width - 1]};
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
    const Scales& s = scales[row];
    const Stat m = cells[row];
    float *dz = dz_rows[row], *dshown = r.scratch + 2 * k.stacked, *c_hat = dshown + n;
    vec<float> one{}, hat{};
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      fetch_next<terms, thin>(k, r, j);
      vec<float> i, f, g, o;
      if constexpr (terms == NW_PLAIN) {
        i = load(r.q + j, part), f = load(r.q + n + j, part);
        g = load(r.q + 2 * n + j, part), o = load(r.q + 3 * n + j, part);
      } else {
        i = gate(summed<terms, thin>(k, s, r.in, r.q, 0, j, part));
        f = gate(summed<terms, thin>(k, s, r.in, r.q, 1, j, part));
        g = tanh(summed<terms, thin>(k, s, r.in, r.q, 2, j, part));
        o = gate(summed<terms, thin>(k, s, r.in, r.q, 3, j, part));
      }
      const vec<float> dh = dh_of(r, j, part);
      if constexpr (normalized) {
        const vec<float> c = carried ? f * load(r.c_before + j, part) + i * g : load(r.cell + j, part);
        const vec<float> gain = load(k.gain_c + j, part), h = (c - m.mean) * m.rstd;
        const vec<float> t = tanh(h * gain + load(k.bias_c + j, part));
        vec<float> d = dh * o * (1.f - t * t);
        if (carried) d += load(r.dc + j, part);
        store(dshown + j, d, part);
        d *= gain;
        one += d;
        hat += d * h;
        store(c_hat + j, h, part);
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
    all[row] = k.center ? sum_lanes<float>(one) / float(n) : 0.f;
    along[row] = sum_lanes<float>(hat) / float(n);
  }
  if constexpr (normalized) {
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> gain = load(k.gain_c + j, part);
      vec<float> gains = load(sums.gain_c + j, part), biases = load(sums.bias_c + j, part);
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        const BackwardRow& r = rows[row];
        float *dz = dz_rows[row], *dshown = r.scratch + 2 * k.stacked;
        const vec<float> d = load(dshown + j, part), h = load(dshown + n + j, part);
        gains += d * h;
        biases += d;
        vec<float> dc = cells[row].rstd * (d * gain - all[row] - h * along[row]);
        if (!carried) dc += load(r.dc + j, part);
        through_gates(r, dz, j, part, load(dz + j, part), load(dz + n + j, part), load(dz + 2 * n + j, part), dc);
      }
      store(sums.gain_c + j, gains, part);
      store(sums.bias_c + j, biases, part);
    });
  }
  products_gradient<terms, thin, R>(k, rows, scales, sums, dz_rows, dz_rows);
}

template <int terms, bool thin, int R>
NW_INLINE void gru_backward(const Layer& k, const BackwardRow* rows, const Sums& sums) {
  const int64_t n = k.units;
  Scales scales[R];
  float *dz_ih_rows[R], *dz_hh_rows[R];
  for (int row = 0; row < R; ++row) {
    const BackwardRow r = rows[row];
    Scales& s = scales[row];
    read_row<terms, thin>(k, r.in, r.stats, s);
    // With few inputs there is no dp to fill.
    float* dz_ih = terms == NW_PLAIN && k.hidden_apart && !thin ? r.dp
                   : terms == NW_PLAIN && !k.hidden_apart       ? r.dq
                                                                : r.scratch;
    float* dz_hh = !k.hidden_apart ? dz_ih : terms == NW_PLAIN ? r.dq : r.scratch + k.stacked;
    dz_ih_rows[row] = dz_ih, dz_hh_rows[row] = dz_hh;
    sweep<float>(n, [&](int64_t j, auto part) NW_LAMBDA {
      fetch_next<terms, thin>(k, r, j);
      vec<float> reset, z, hidden, candidate;
      if (k.hidden_apart) {
        reset = gate(input_term<terms, thin>(k, s, r.in, 0, j, part) + hidden_term<terms>(k, s, r.q, 0, j, part));
        z = input_term<terms, thin>(k, s, r.in, 1, j, part) + hidden_term<terms>(k, s, r.q, 1, j, part);
        hidden = hidden_term<terms>(k, s, r.q, 2, j, part);
        candidate = tanh(input_term<terms, thin>(k, s, r.in, 2, j, part) + reset * hidden);
      } else {
        reset = gate(summed<terms, thin>(k, s, r.in, r.q, 0, j, part));
        z = summed<terms, thin>(k, s, r.in, r.q, 1, j, part);
        hidden = summed<terms, thin>(k, s, r.in, r.q, 2, j, part);
        candidate = tanh(reset * hidden);
      }
      z = gate(z + k.update_offset);
      const vec<float> old = keeps(k, z), dh = dh_of(r, j, part);
      vec<float> dz = dh * (load(r.h_before + j, part) - candidate) * (z * (1.f - z));
      if (k.update_paper) dz = -dz;
      const vec<float> dn = dh * (1.f - old) * (1.f - candidate * candidate);
      const vec<float> dr = dn * hidden * (reset * (1.f - reset));
      store(r.direct + j, dh * old, part);
      store(dz_ih + j, dr, part);
      store(dz_ih + n + j, dz, part);
      store(dz_ih + 2 * n + j, k.hidden_apart ? dn : dn * reset, part);
      if (k.hidden_apart) {
        store(dz_hh + j, dr, part);
        store(dz_hh + n + j, dz, part);
        store(dz_hh + 2 * n + j, dn * reset, part);
      }
    });
  }
  products_gradient<terms, thin, R>(k, rows, scales, sums, dz_ih_rows, dz_hh_rows);
}

template <int terms, bool thin, bool relu, int R>
NW_INLINE void rnn_backward(const Layer& k, const BackwardRow* rows, const Sums& sums) {
  Scales scales[R];
  float* dz_rows[R];
  for (int row = 0; row < R; ++row) {
    const BackwardRow r = rows[row];
    read_row<terms, thin>(k, r.in, r.stats, scales[row]);
    float* dz = dz_rows[row] = gradient_row<terms>(r);
    sweep<float>(k.units, [&](int64_t j, auto part) NW_LAMBDA {
      const vec<float> h = load(r.h + j, part), dh = dh_of(r, j, part);
      store(dz + j, dh * (relu ? act_slope<NW_RELU, float>(h) : 1.f - h * h), part);
    });
  }
  products_gradient<terms, thin, R>(k, rows, scales, sums, dz_rows, dz_rows);
}

template <int cell, int terms, bool thin, int R>
NW_INLINE void rows_backward_of(const Layer& k, const BackwardRow* rows, const Sums& sums) {
  if constexpr (cell == NW_LSTM && terms != NW_PLAIN) {
    return k.cell_norm ? lstm_backward<terms, thin, true, R>(k, rows, sums)
                       : lstm_backward<terms, thin, false, R>(k, rows, sums);
  }
  if constexpr (cell == NW_LSTM && terms == NW_PLAIN) return lstm_backward<terms, thin, false, R>(k, rows, sums);
  if constexpr (cell == NW_GRU) return gru_backward<terms, thin, R>(k, rows, sums);
  if constexpr (cell == NW_RNN_TANH) return rnn_backward<terms, thin, false, R>(k, rows, sums);
  if constexpr (cell == NW_RNN_RELU) return rnn_backward<terms, thin, true, R>(k, rows, sums);
}

template <int cell, int terms, bool thin>
void block_backward(const Layer& k, const BackwardRow* rows, int count, const Sums& sums) {
  if (count == row_block) return rows_backward_of<cell, terms, thin, row_block>(k, rows, sums);
  for (int r = 0; r < count; ++r) rows_backward_of<cell, terms, thin, 1>(k, rows + r, sums);
}

template <int terms, bool thin> BackwardCell backward_cell_of(const nw_recurrent& a) {
  switch (a.cell) {
    case NW_LSTM: return block_backward<NW_LSTM, terms, thin>;
    case NW_GRU: return block_backward<NW_GRU, terms, thin>;
    case NW_RNN_TANH: return block_backward<NW_RNN_TANH, terms, thin>;
    default: return block_backward<NW_RNN_RELU, terms, thin>;
  }
}
inline BackwardCell backward_cell(const nw_recurrent& a) {
  if (a.terms == NW_SUM) return backward_cell_of<NW_SUM, false>(a);
  if (few_inputs(a)) {
    return a.terms == NW_PLAIN ? backward_cell_of<NW_PLAIN, true>(a) : backward_cell_of<NW_SEPARATE, true>(a);
  }
  return a.terms == NW_PLAIN ? backward_cell_of<NW_PLAIN, false>(a) : backward_cell_of<NW_SEPARATE, false>(a);
}

// From the sums of all rows to the gradients of few inputs' weights and gain: with hat the sum over i of x_i * column i,
// dgain = sum of dz * hat, and dW is the sum over rows of x * rstd * (w - avg(w) - hat * avg(w * hat)), w = dz * gain.
inline void finish_thin(const Layer& k, const double* thin, const double* tilts, float* dweight, float* dgain) {
  const bool plain = k.terms == NW_PLAIN;
  for (int g = 0; g < (plain ? 1 : k.group_count); ++g) {
    const int64_t from = plain ? 0 : k.group_from[g] * k.units;
    const int64_t end = plain ? k.stacked : k.group_from[g + 1] * k.units;
    for (int i = 0; dweight && i < k.thin; ++i) {
      const double* sum = thin + i * k.stacked;
      double mean = 0;
      for (int64_t j = from; !plain && k.center && j < end; ++j) mean += sum[j] * k.gain_ih[j] / double(end - from);
      for (int64_t j = from; j < end; ++j) {
        double d = plain ? sum[j] : sum[j] * k.gain_ih[j] - mean;
        for (int other = 0; other < k.thin; ++other) {
          d -= tilts[(g * most_thin + i) * most_thin + other] * k.thin_weight[other * k.stacked + j];
        }
        dweight[j * k.thin + i] = float(d);
      }
    }
    for (int64_t j = from; dgain && j < end; ++j) {
      double d = 0;
      for (int i = 0; i < k.thin; ++i) d += double(k.thin_weight[i * k.stacked + j]) * thin[i * k.stacked + j];
      dgain[j] = float(d);
    }
  }
}

}  // namespace
}  // namespace NW_ISA
