// The recurrent kernels against the equations of normwise.h in double: outputs element by element, and every gradient
// by the change of a random functional of all outputs along a random direction.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "checks.h"

namespace {

using Numbers = std::vector<double>;

std::mt19937 generator(2);

Numbers normals(size_t n, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  Numbers v(n);
  for (double& x : v) x = double(float(normal(generator)));  // exact in float, so that both sides get the same numbers
  return v;
}

struct Recurrence {
  int cell, norm_placement, cell_norm = NW_CELL_NONE, groups[4] = {};
  bool center = true, reset_candidate = false, update_paper = false;
};

struct Size {
  int64_t steps, batch, inputs, units;
};

enum StepLayout { EQUAL_LENGTHS, RAGGED, RESET, REVERSE };

// Everything with a gradient; empty: null in the call.
enum Field { X, H0, C0, W_IH, W_HH, B_IH, B_HH, G_IH, G_HH, B_INNER, G_C, B_C, FIELDS };
const char* const field_names[FIELDS] = {"x",       "h0",      "c0",      "weight_ih",  "weight_hh", "bias_ih",
                                         "bias_hh", "gain_ih", "gain_hh", "bias_inner", "gain_c",    "bias_c"};

struct Problem {
  Recurrence recurrence;
  Size size;
  int gates;
  bool reverse;
  double eps = 1e-2, offset = 0.25;
  std::vector<int64_t> batch_sizes;
  std::vector<uint8_t> reset;
  std::vector<int64_t> start;  // of each step's rows
  int64_t rows = 0;

  Problem(const Recurrence& recurrence, const Size& size, StepLayout layout)
      : recurrence(recurrence),
        size(size),
        gates(recurrence.cell == NW_LSTM  ? 4
              : recurrence.cell == NW_GRU ? 3
                                          : 1),
        reverse(layout == REVERSE) {
    for (int64_t s = 0; s < size.steps; ++s) {
      start.push_back(rows);
      rows += layout == RAGGED ? std::max<int64_t>(1, size.batch - 2 * s) : size.batch;
      if (layout == RAGGED) batch_sizes.push_back(rows - start.back());
    }
    for (int64_t r = 0; layout == RESET && r < rows; ++r) reset.push_back(uint8_t(r % 3 == 1));
  }

  std::vector<Numbers> inputs() const {
    const size_t units = size_t(size.units), wide = size_t(gates) * units, ins = size_t(size.inputs);
    const bool norm = recurrence.norm_placement != NW_UNNORMALIZED, separate = recurrence.norm_placement == NW_SEPARATE;
    std::vector<Numbers> v(FIELDS);
    v[X] = normals(size_t(rows) * ins);
    v[H0] = normals(size_t(size.batch) * units);
    if (recurrence.cell == NW_LSTM) v[C0] = normals(size_t(size.batch) * units);
    v[W_IH] = normals(wide * ins, 1 / std::sqrt(double(ins)));
    v[W_HH] = normals(wide * units, 1 / std::sqrt(double(units)));
    v[B_IH] = normals(wide);
    if (!reverse) v[B_HH] = normals(wide);  // one case without
    if (separate) v[G_IH] = normals(wide);
    if (norm) v[G_HH] = normals(wide);
    if (recurrence.norm_placement == NW_SUM) v[B_INNER] = normals(wide);
    if (recurrence.cell_norm != NW_CELL_NONE) v[G_C] = normals(units), v[B_C] = normals(units);
    return v;
  }
};

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

void normalize(double* v, int64_t n, bool center, double eps, const double* gain) {
  double mean = 0, var = 0;
  for (int64_t i = 0; i < n; ++i) mean += center ? v[i] / double(n) : 0;
  for (int64_t i = 0; i < n; ++i) var += (v[i] - mean) * (v[i] - mean) / double(n);
  for (int64_t i = 0; i < n; ++i) v[i] = (v[i] - mean) / std::sqrt(var + eps) * gain[i];
}

struct Outcome {
  Numbers output, h, c;
};

// The equations, one sample at a time.
Outcome truth(const Problem& p, const std::vector<Numbers>& v) {
  const int64_t units = p.size.units, wide = p.gates * units, ins = p.size.inputs;
  Outcome out{Numbers(size_t(p.rows * units)), v[H0], v[C0]};
  auto at = [&](Field f, int64_t i) { return v[f].empty() ? 0.0 : v[f][size_t(i)]; };
  auto norm_groups = [&](Numbers& n, Field gain) {
    int64_t first = 0;
    for (int count : p.recurrence.groups) {
      if (count) normalize(&n[size_t(first)], count * units, p.recurrence.center, p.eps, &v[gain][size_t(first)]);
      first += count * units;
    }
  };
  for (int64_t k = 0; k < p.size.steps; ++k) {
    const int64_t s = p.reverse ? p.size.steps - 1 - k : k;
    const int64_t samples = p.batch_sizes.empty() ? p.size.batch : p.batch_sizes[size_t(s)];
    for (int64_t b = 0; b < samples; ++b) {
      const int64_t row = p.start[size_t(s)] + b;
      double *h = &out.h[size_t(b * units)], *c = out.c.empty() ? nullptr : &out.c[size_t(b * units)];
      for (int64_t u = 0; u < units && !p.reset.empty() && p.reset[size_t(row)]; ++u) {
        h[u] = 0;
        if (c) c[u] = 0;
      }
      Numbers in(size_t(wide), 0.0), hid(size_t(wide), 0.0);
      for (int64_t g = 0; g < wide; ++g) {
        for (int64_t i = 0; i < ins; ++i) in[size_t(g)] += at(W_IH, g * ins + i) * at(X, row * ins + i);
        for (int64_t u = 0; u < units; ++u) hid[size_t(g)] += at(W_HH, g * units + u) * h[u];
      }
      if (p.recurrence.norm_placement == NW_SEPARATE) norm_groups(in, G_IH), norm_groups(hid, G_HH);
      if (p.recurrence.norm_placement == NW_SUM) {
        for (int64_t g = 0; g < wide; ++g) in[size_t(g)] += hid[size_t(g)] + at(B_INNER, g), hid[size_t(g)] = 0;
        norm_groups(in, G_HH);
      }
      for (int64_t g = 0; g < wide; ++g) in[size_t(g)] += at(B_IH, g), hid[size_t(g)] += at(B_HH, g);
      auto gate = [&](int64_t which, int64_t u) {
        return in[size_t(which * units + u)] + hid[size_t(which * units + u)];
      };
      Numbers fresh(static_cast<size_t>(units));
      if (p.recurrence.cell == NW_LSTM) {
        for (int64_t u = 0; u < units; ++u)
          c[u] = sigmoid(gate(1, u)) * c[u] + sigmoid(gate(0, u)) * std::tanh(gate(2, u));
        Numbers seen(c, c + units);
        if (p.recurrence.cell_norm != NW_CELL_NONE) {
          normalize(seen.data(), units, p.recurrence.center, p.eps, v[G_C].data());
          for (int64_t u = 0; u < units; ++u) seen[size_t(u)] += at(B_C, u);
        }
        if (p.recurrence.cell_norm == NW_CELL_STATE) std::copy(seen.begin(), seen.end(), c);
        for (int64_t u = 0; u < units; ++u) fresh[size_t(u)] = sigmoid(gate(3, u)) * std::tanh(seen[size_t(u)]);
      } else if (p.recurrence.cell == NW_GRU) {
        for (int64_t u = 0; u < units; ++u) {
          const double r = sigmoid(gate(0, u)), z = sigmoid(gate(1, u) + p.offset);
          const size_t n = size_t(2 * units + u);
          const double candidate = std::tanh(p.recurrence.reset_candidate ? r * (in[n] + hid[n]) : in[n] + r * hid[n]);
          const double old = p.recurrence.update_paper ? 1 - z : z;
          fresh[size_t(u)] = old * h[u] + (1 - old) * candidate;
        }
      } else {
        for (int64_t u = 0; u < units; ++u) {
          fresh[size_t(u)] = p.recurrence.cell == NW_RNN_TANH ? std::tanh(gate(0, u)) : std::max(gate(0, u), 0.0);
        }
      }
      std::copy(fresh.begin(), fresh.end(), h);
      std::copy(h, h + units, &out.output[size_t(row * units)]);
    }
  }
  return out;
}

double dot(const Numbers& a, const Numbers& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// A heap block of exactly n floats, full of NaN or with given numbers; n = 0 gives null.
struct Floats {
  std::unique_ptr<float[]> data;
  size_t n;
  explicit Floats(size_t n) : data(n ? new float[n] : nullptr), n(n) { std::fill_n(data.get(), n, NAN); }
  explicit Floats(const Numbers& v) : Floats(v.size()) { std::copy(v.begin(), v.end(), data.get()); }
  float* get() const { return data.get(); }
};

void check(const Recurrence& recurrence, const Size& size, StepLayout layout, int threads, int products) {
  const Problem p(recurrence, size, layout);
  const std::vector<Numbers> v = p.inputs();
  const std::string what = "recurrent cell " + std::to_string(recurrence.cell) + " norm placement " +
                           std::to_string(recurrence.norm_placement) + " norm of c " +
                           std::to_string(recurrence.cell_norm) + " layout " + std::to_string(layout) + " products " +
                           std::to_string(products);
  std::vector<Floats> given;
  for (const Numbers& numbers : v) given.emplace_back(numbers);
  const size_t state = size_t(size.batch * size.units), lstm = recurrence.cell == NW_LSTM ? state : 0;
  Floats output(size_t(p.rows * size.units)), h(state), c(lstm);

  nw_recurrent layer{};
  layer.x = given[X].get();
  layer.batch_sizes = p.batch_sizes.empty() ? nullptr : p.batch_sizes.data();
  layer.reset = p.reset.empty() ? nullptr : p.reset.data();
  layer.weight_ih = given[W_IH].get();
  layer.weight_hh = given[W_HH].get();
  const float** fields[] = {&layer.bias_ih,    &layer.bias_hh, &layer.gain_ih, &layer.gain_hh,
                            &layer.bias_inner, &layer.gain_c,  &layer.bias_c};
  for (int f = B_IH; f < FIELDS; ++f) *fields[f - B_IH] = given[size_t(f)].get();
  layer.h0 = given[H0].get();
  layer.c0 = given[C0].get();
  layer.output = output.get();
  layer.steps = size.steps, layer.batch = size.batch, layer.rows = p.rows;
  layer.inputs = size.inputs, layer.units = size.units;
  layer.eps = p.eps, layer.update_offset = p.offset;
  layer.dtype = NW_FLOAT32, layer.cell = recurrence.cell, layer.norm_placement = recurrence.norm_placement,
  layer.center = recurrence.center;
  layer.cell_norm = recurrence.cell_norm, layer.reset_candidate = recurrence.reset_candidate,
  layer.update_paper = recurrence.update_paper;
  layer.reverse = p.reverse, layer.threads = threads, layer.products = products;
  std::copy(recurrence.groups, recurrence.groups + 4, layer.groups);
  int64_t widths[4];
  check_status(what + " saves", nw_recurrent_saves(&layer, widths));
  std::vector<Floats> saved;
  for (int64_t width : widths) saved.emplace_back(size_t(p.rows * width));
  layer.input_terms = saved[0].get(), layer.hidden_terms = saved[1].get();
  layer.cells = saved[2].get(), layer.stats = saved[3].get();

  nw_recurrent_forward_args forward{.layer = layer, .h = h.get(), .c = c.get()};
  check_status(what + " forward", nw_recurrent_forward(&forward));
  const Outcome exact = truth(p, v);
  auto same = [&](const std::string& name, const Floats& got, const Numbers& expected) {
    for (size_t i = 0; i < got.n; ++i) close(what + " " + name, products, got.get()[i], expected[i], 10);
  };
  same("output", output, exact.output), same("h", h, exact.h), same("c", c, exact.c);

  const Numbers up = normals(output.n), up_h = normals(state), up_c = normals(lstm);
  Floats doutput(up), dh(up_h), dc(up_c);
  std::vector<Floats> grads;
  for (int f = 0; f < FIELDS; ++f) grads.emplace_back(f == H0 || f == C0 ? 0 : v[size_t(f)].size());
  nw_recurrent_backward_args backward{.layer = layer,
                                      .doutput = doutput.get(),
                                      .dh = dh.get(),
                                      .dc = dc.get(),
                                      .dx = grads[X].get(),
                                      .dweight_ih = grads[W_IH].get(),
                                      .dweight_hh = grads[W_HH].get(),
                                      .dbias_ih = grads[B_IH].get(),
                                      .dbias_hh = grads[B_HH].get(),
                                      .dgain_ih = grads[G_IH].get(),
                                      .dgain_hh = grads[G_HH].get(),
                                      .dbias_inner = grads[B_INNER].get(),
                                      .dgain_c = grads[G_C].get(),
                                      .dbias_c = grads[B_C].get()};
  check_status(what + " backward", nw_recurrent_backward(&backward));
  auto functional = [&](const std::vector<Numbers>& at) {
    const Outcome o = truth(p, at);
    return dot(up, o.output) + dot(up_h, o.h) + dot(up_c, o.c);
  };
  for (int f = 0; f < FIELDS; ++f) {
    if (v[size_t(f)].empty()) continue;
    const Floats& gradient = f == H0 ? dh : f == C0 ? dc : grads[size_t(f)];
    const Numbers direction = normals(v[size_t(f)].size());
    const double step = 1e-7;  // so small that hardly a unit of a ReLU crosses 0 between the two ends
    std::vector<Numbers> plus = v, minus = v;
    double along = 0, scale = 0;
    for (size_t i = 0; i < direction.size(); ++i) {
      plus[size_t(f)][i] += step * direction[i], minus[size_t(f)][i] -= step * direction[i];
      along += double(gradient.get()[i]) * direction[i];
      scale += std::fabs(double(gradient.get()[i]) * direction[i]);
    }
    const double expected = (functional(plus) - functional(minus)) / (2 * step);
    close(what + " gradient of " + field_names[f], products, along, expected, 10 * (1 + scale));
  }
}

}  // namespace

void check_recurrent() {
  const Recurrence recurrences[] = {
      {.cell = NW_LSTM, .norm_placement = NW_UNNORMALIZED},
      {.cell = NW_LSTM, .norm_placement = NW_SEPARATE, .cell_norm = NW_CELL_READOUT, .groups = {4}},
      {.cell = NW_LSTM, .norm_placement = NW_SEPARATE, .groups = {1, 1, 1, 1}, .center = false},
      {.cell = NW_LSTM, .norm_placement = NW_SUM, .cell_norm = NW_CELL_STATE, .groups = {1, 1, 1, 1}},
      {.cell = NW_GRU, .norm_placement = NW_UNNORMALIZED},
      {.cell = NW_GRU, .norm_placement = NW_SEPARATE, .groups = {2, 1}, .update_paper = true},
      {.cell = NW_GRU, .norm_placement = NW_SUM, .groups = {3}, .center = false, .reset_candidate = true},
      {.cell = NW_RNN_TANH, .norm_placement = NW_SEPARATE, .groups = {1}},
      {.cell = NW_RNN_TANH, .norm_placement = NW_SUM, .groups = {1}, .center = false},
      {.cell = NW_RNN_RELU, .norm_placement = NW_UNNORMALIZED},
  };
  const Size sizes[] = {{1, 1, 1, 2}, {3, 5, 2, 7}, {2, 9, 5, 19}, {3, 1, 3, 65}};  // steps, batch, inputs, units
  for (const Recurrence& recurrence : recurrences) {
    for (const Size& size : sizes) {
      for (StepLayout layout : {EQUAL_LENGTHS, RAGGED, RESET, REVERSE}) {
        check(recurrence, size, layout, layout == EQUAL_LENGTHS ? 3 : 1, NW_FLOAT32);
      }
    }
  }
  // Sizes around a tile of 16 rows and columns and of depth 32, so that tiles end where the memory does.
  const Size tiles[] = {{2, 33, 5, 3}, {2, 3, 33, 17}, {1, 17, 31, 16}};
  for (const Recurrence& recurrence : recurrences) {
    for (const Size& size : tiles) {
      for (StepLayout layout : {EQUAL_LENGTHS, RAGGED}) {
        check(recurrence, size, layout, layout == EQUAL_LENGTHS ? 2 : 1, NW_BFLOAT16);
      }
    }
  }
}
