// What both layouts of BatchNorm share: from statistics to the numbers that every element needs.
#pragma once

#include "../include/normwise.h"
#include "moments.h"
#include "planes.h"

namespace NW_ISA {

int channels_first_forward(const nw_channels_forward_args& a);
int channels_first_backward(const nw_channels_backward_args& a);
int channels_last_forward(const nw_channels_forward_args& a);
int channels_last_backward(const nw_channels_backward_args& a);

namespace {

template <class C> void update(void* running, int64_t c, double momentum, double now) {
  if (!running) return;
  C& value = static_cast<C*>(running)[c];
  value = C((1 - momentum) * double(value) + momentum * now);
}

// Training: writes the saved statistics of channel c and moves the running ones.
template <class C> void settle(const nw_channels_forward_args& a, int64_t c, const Moments& m) {
  a.mean[c] = m.mean;
  a.rstd[c] = m.rstd(a.eps);
  if (m.count == 0) return;
  update<C>(a.running_mean, c, a.momentum, m.mean);
  update<C>(a.running_var, c, a.momentum, m.count > 1 ? m.m2 / (m.count - 1) : m.m2);
}

// Eval: the running statistics, in the form that the backward pass wants.
template <class C> void recall(const nw_channels_forward_args& a, int64_t c) {
  a.mean[c] = double(static_cast<const C*>(a.running_mean)[c]);
  a.rstd[c] = 1.0 / std::sqrt(double(static_cast<const C*>(a.running_var)[c]) + a.eps);
}

template <class C, class Args> Line<C> line_of(const Args& a, int64_t c) {
  return Line<C>(a.mean[c], a.rstd[c], parameter<C>(a.weight, c, 1), parameter<C>(a.bias, c, 0));
}

// dx = g * gain - offset - distance * slope. In eval the statistics are constants and only the gain is left.
template <class C> struct Backward {
  C gain, offset = 0, slope = 0;
  Backward(const nw_channels_backward_args& a, int64_t c, const Sums& s, double count) {
    const double rstd = a.rstd[c], scale = rstd * parameter<C>(a.weight, c, 1);
    gain = C(scale);
    if (a.training && count > 0) {
      offset = C(scale * s.g / count);
      slope = C(scale * rstd * rstd * s.gx / count);
    }
    if (a.dweight) static_cast<C*>(a.dweight)[c] = C(s.gx * rstd);
    if (a.dbias) static_cast<C*>(a.dbias)[c] = C(s.g);
  }
};

inline double count_valid(const uint8_t* mask, int64_t n) {
  if (!mask) return double(n);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
  return double(count);
}

}  // namespace
}  // namespace NW_ISA
