// One row, a (step, sample) pair, as the cells read and write it.
#pragma once

#include "rnn/layer.h"

namespace NW_ISA {
namespace {

// Cells compute up to so many rows of a step at once: the sums over one row finish while the next is under way, and the
// gradients of gains and biases are loaded and stored once for all of them.
constexpr int row_block = 4;

// By gate: the rstd of its group in p and in q, and small inputs times the rstd of p.
struct RowScales {
  float rstd_p[4], rstd_q[4], scaled_x[4][max_small_inputs];
};

// The inputs of a row: p, less its means, and in the forward the rstd of its groups; or x, where it is small.
struct RowInput {
  const float *p, *x, *rstd;
};

struct ForwardRow {
  RowInput in;
  const float* q;   // gate_units, as the matrix product left it
  float* centered;  // gate_units: filled with q less its means, where it has a norm; may be q
  float* h;         // units: the state, replaced
  float* c;         // units: the state, replaced; LSTM
  float* output;    // units
  float* gates;     // gate_units: activated gates, or null
  float* cell;      // units: the new c, or null
  float* stats;     // or null
  float* scratch;   // units
};
using ForwardCell = void (*)(const Layer&, const ForwardRow*, int rows);

struct BackwardRow {
  RowInput in;
  const float* q;  // gate_units; activated gates of an LSTM without norms
  const float* stats;
  const float* h_before;    // units: the state that the step started from
  const float* c_before;    // units; LSTM
  const float* h;           // units: the row's output
  const float* cell;        // units: its c; LSTM
  const float* doutput;     // units, or null: 0
  const float* dh;          // units: the gradient of h from the next step
  float* dh_direct;         // units: filled with the part of dh_before that bypasses the products; GRU. May be dh
  float* dc;                // units: the gradient of c, replaced by that of c_before; LSTM
  float* dp;                // gate_units: filled; the same as dq unless p and q are separate; unused with small inputs
  float* dq;                // gate_units: filled
  float* dx;                // small inputs: filled, or null
  float* scratch;           // 2 * gate_units + 2 * units
  int64_t prefetch_offset;  // from p and q to those of the row that is read row_block rows later
};

// Sums over rows, from which the gradients of gains and biases are: gate_units each, and units.
template <class T> struct GainBiasSums {
  T *bias_ih, *bias_hh, *gain_ih, *gain_hh, *bias_inner;
  T *gain_c, *bias_c;

  static int64_t size(const Layer& layer) { return 5 * layer.gate_units + 2 * layer.units; }
  GainBiasSums(const Layer& layer, T* memory)
      : bias_ih(memory),
        bias_hh(memory + layer.gate_units),
        gain_ih(memory + 2 * layer.gate_units),
        gain_hh(memory + 3 * layer.gate_units),
        bias_inner(memory + 4 * layer.gate_units),
        gain_c(memory + 5 * layer.gate_units),
        bias_c(memory + 5 * layer.gate_units + layer.units) {}
};

// One thread's, and after them those of which the gradients of small inputs' weights are.
struct ParamGradSums : GainBiasSums<float> {
  float* small_weight;  // (max_small_inputs, gate_units): of dz times scaled_x
  float* small_gram;    // (groups, max_small_inputs, max_small_inputs)

  static int64_t small_input_offset(const Layer& layer) { return GainBiasSums::size(layer); }
  static int64_t size(const Layer& layer) {
    return small_input_offset(layer) + max_small_inputs * layer.gate_units + 4 * max_small_inputs * max_small_inputs;
  }
  ParamGradSums(const Layer& layer, float* memory)
      : GainBiasSums(layer, memory),
        small_weight(memory + small_input_offset(layer)),
        small_gram(small_weight + max_small_inputs * layer.gate_units) {}
};
using BackwardCell = void (*)(const Layer&, const BackwardRow*, int rows, const ParamGradSums&);

}  // namespace
}  // namespace NW_ISA
