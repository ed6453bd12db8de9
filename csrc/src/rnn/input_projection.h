// W_ih x as matrix products over chunks of steps.
#pragma once

#include "gemm/precision.h"
#include "rnn/row_norm.h"
#include "rnn/steps.h"
#include "rnn/threads.h"

namespace NW_ISA {
namespace {

// p = W_ih x of some steps, plus bias_inner, and centered where it has a norm of its own. One product covers all of a
// thread's rows of a chunk of steps, since each panel of W_ih then comes from far memory once. `data` holds p of all
// rows, or of the rows of the current chunk.
template <class P> struct InputProjection {
  const nw_recurrent& a;
  const Layer& layer;
  const StepRows& rows;
  int64_t gate_units;
  PackedMatrix weight;
  float* data;
  bool covers_all_rows;
  float* rstd;  // (rows as in data, groups), null: p has no norm of its own

  float* row(int64_t row, int64_t chunk_first) const {
    return data + (row - (covers_all_rows ? 0 : chunk_first)) * gate_units;
  }

  float* rstd_of(int64_t row, int64_t chunk_first) const {
    return rstd + (row - (covers_all_rows ? 0 : chunk_first)) * layer.group_count;
  }

  // Computes steps s .. end-1 of the thread's samples, or its share of all rows. `memory` holds left_chunk_bytes of the
  // inputs.
  void project(ThreadShare share, int64_t s, int64_t end, void* memory) const {
    const int64_t first = rows.first(s, end), count = rows.count(s, end), all = panel_count_of<P>(gate_units);
    if (share.cooperative || share.count == 1) {
      const int64_t from = count * share.index / share.count, to = count * (share.index + 1) / share.count;
      project_rows(first + from, 1, to - from, first, 0, all, memory);
      center_rows(first + from, 1, to - from, first);
    } else if (!a.batch_sizes && a.batch % share.count == 0) {
      project_rows(first + share.index, share.count, count / share.count, first, 0, all, memory);
      center_rows(first + share.index, share.count, count / share.count, first);
    } else {
      // A panel passes over all steps while it is in the cache; but rows that must be packed are packed once, and then
      // all panels pass at every step.
      const int64_t panels_at_once = P::left_in_place ? 1 : all;
      for (int64_t panel = 0; panel < all; panel += panels_at_once) {
        for (int64_t t = s; t < end; ++t) {
          project_rows(rows.start(t) + share.index, share.count, share.sample_count(rows.samples(t)), first, panel,
                       panel + panels_at_once, memory);
        }
      }
      for (int64_t t = s; t < end; ++t) {
        center_rows(rows.start(t) + share.index, share.count, share.sample_count(rows.samples(t)), first);
      }
    }
  }

 private:
  void project_rows(int64_t from, int64_t stride, int64_t n, int64_t chunk_first, int64_t panel, int64_t last,
                    void* memory) const {
    const float* bias_inner = a.norm_placement == NW_SUM ? a.bias_inner : nullptr;
    float* to = row(from, chunk_first);
    if (bias_inner) {
      const int64_t at = panel * P::panel_width;
      const int64_t width = (last * P::panel_width < gate_units ? last * P::panel_width : gate_units) - at;
      for (int64_t i = 0; i < n; ++i) {
        std::memcpy(to + i * stride * gate_units + at, bias_inner + at, size_t(width) * sizeof *to);
      }
    }
    multiply_rows<P>(n, static_cast<const float*>(a.x) + from * a.inputs, stride * a.inputs, weight, panel, last, to,
                     stride * gate_units, bias_inner != nullptr, memory);
  }

  void center_rows(int64_t from, int64_t stride, int64_t n, int64_t chunk_first) const {
    for (int64_t i = 0; rstd && i < n; ++i) {
      const int64_t at = from + i * stride;
      float* p = row(at, chunk_first);
      for (int g = 0; g < layer.group_count; ++g) {
        const int64_t first = layer.group_begin[g] * layer.units,
                      width = layer.group_begin[g + 1] * layer.units - first;
        rstd_of(at, chunk_first)[g] = center_and_rstd(p + first, width, layer.center, layer.eps, p + first);
      }
    }
  }
};

}  // namespace
}  // namespace NW_ISA
