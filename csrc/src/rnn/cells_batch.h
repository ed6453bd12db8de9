// What the forward and the backward of a layer with statistics over samples share: for a block of units, the norms and
// biases of all gates at one step, and the gates of one row.
#pragma once

#include "rnn/cells_forward.h"
#include "rnn/column_norm.h"

namespace NW_ISA {
namespace {

struct StepTerms {
  const float *p, *q;       // rows of the step's samples; p is null where q holds p + q
  const float *mean, *var;  // of the step
  bool given;               // they are not those of these samples
  float *to_mean, *to_var;  // the same, to be filled; or null, if they are known
};

// Measures the columns of v from `at` where this is to be done; the statistics of v begin at `first`, -1: it has none.
// Returns the part of the mean that its rounding left.
template <int V, class Part>
NW_NOINLINE Columns<V> measure(const StepTerms& t, int64_t samples, int64_t first, const float* v, int64_t stride,
                               int64_t at, Part part) {
  if (first < 0 || t.given) return {};
  const int64_t to = first + at;
  if (t.to_mean) return column_moments<V>(v + at, stride, samples, t.to_mean + to, t.to_var + to, part);
  return column_averages<V>(v + at, stride, samples, load_columns<V>(t.mean + to, part), part);
}

// The units from j of every gate: N_ih(p), N_hh(q) and the biases after them.
template <int gates, int V> struct GateNorms {
  ColumnScales<V> p[gates], q[gates];
  Columns<V> bias[gates];       // b_ih + b_hh
  Columns<V> bias_ih, bias_hh;  // of the candidate alone, in a GRU whose reset gate acts on the hidden term
};

template <int gates, int V, class Part>
NW_INLINE void prepare_gates(const Layer& layer, const StatColumns& stats, const StepTerms& t, int64_t samples,
                             int64_t j, Part part, GateNorms<gates, V>& norms) {
  const auto row = [](const float* of_step, int64_t first, int64_t at)
                       NW_LAMBDA -> const float* { return first < 0 ? nullptr : of_step + first + at; };
#pragma GCC unroll 4
  for (int g = 0; g < gates; ++g) {
    const int64_t at = g * layer.units + j;
    const Columns<V> rest_p = measure<V>(t, samples, stats.ih, t.p, layer.gate_units, at, part);
    const Columns<V> rest_q = measure<V>(t, samples, stats.hh, t.q, layer.gate_units, at, part);
    norms.p[g] = column_scales<V>(row(t.mean, stats.ih, at), row(t.var, stats.ih, at), layer.gain_ih + at, layer.eps,
                                  rest_p, part);
    norms.q[g] = column_scales<V>(row(t.mean, stats.hh, at), row(t.var, stats.hh, at), layer.gain_hh + at, layer.eps,
                                  rest_q, part);
    norms.bias[g] = load_columns<V>(layer.bias + at, part);
  }
  norms.bias_ih = load_columns<V>(layer.bias_ih + (gates - 1) * layer.units + j, part);
  norms.bias_hh = load_columns<V>(layer.bias_hh + (gates - 1) * layer.units + j, part);
}

// N(v) of the k-th vector without a bias; `at` is where it begins in a row of gates.
template <int V, class Part>
NW_INLINE vec<float> normalized(const ColumnScales<V>& s, const float* v, int64_t at, int k, Part part) {
  return s.deviation(load(v + at, part), k) * s.scale.at[k];
}
template <bool separate, int gates, int V, class Part>
NW_INLINE vec<float> gate_input(const Layer& layer, const GateNorms<gates, V>& norms, const float* p, const float* q,
                                int g, int64_t j, int k, Part part) {
  const int64_t at = g * layer.units + j + k * lanes<float>;
  const vec<float> hidden = normalized<V>(norms.q[g], q, at, k, part) + norms.bias[g].at[k];
  if constexpr (separate) return normalized<V>(norms.p[g], p, at, k, part) + hidden;
  return hidden;
}

struct GruGates {
  vec<float> reset, z, hidden, candidate;  // hidden: what the reset gate is multiplied with
};
template <bool separate, int V, class Part>
NW_INLINE GruGates gru_gates(const Layer& layer, const GateNorms<3, V>& norms, const float* p, const float* q,
                             int64_t j, int k, Part part) {
  GruGates gates;
  gates.reset = sigmoid(gate_input<separate>(layer, norms, p, q, 0, j, k, part));
  gates.z = sigmoid(gate_input<separate>(layer, norms, p, q, 1, j, k, part) + layer.update_offset);
  if (layer.reset_on_hidden) {
    const int64_t at = 2 * layer.units + j + k * lanes<float>;
    gates.hidden = normalized<V>(norms.q[2], q, at, k, part) + norms.bias_hh.at[k];
    gates.candidate =
        tanh(normalized<V>(norms.p[2], p, at, k, part) + norms.bias_ih.at[k] + gates.reset * gates.hidden);
  } else {
    gates.hidden = gate_input<separate>(layer, norms, p, q, 2, j, k, part);
    gates.candidate = tanh(gates.reset * gates.hidden);
  }
  return gates;
}

// One thread's share of the units, in whole blocks, so that a column is computed alike with any number of threads.
struct UnitRange {
  int64_t begin, end;
  UnitRange(int64_t units, int index, int count) {
    const int64_t blocks = (units + block_columns - 1) / block_columns;
    begin = blocks * index / count * block_columns;
    end = blocks * (index + 1) / count * block_columns;
    if (end > units) end = units;
  }
};

}  // namespace
}  // namespace NW_ISA
