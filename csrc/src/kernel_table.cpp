// One instruction set's table; compiled once for each.
#include "norm/channels.h"
#include "norm/groups.h"
#include "kernel_table.h"

namespace NW_ISA {
namespace {

template <class Args> bool well_formed(const Args& a) {
  return a.batch >= 0 && a.channels >= 1 && a.positions >= 0 &&
         (a.layout == NW_CHANNELS_FIRST || a.layout == NW_CHANNELS_LAST);
}
template <class Args> bool divides(const Args& a) { return a.groups >= 1 && a.channels % a.groups == 0; }

int groups_forward(const nw_groups_forward_args* a) {
  if (!well_formed(*a) || !divides(*a)) return NW_BAD_ARGUMENT;
  return a->layout == NW_CHANNELS_LAST ? groups_last_forward(*a) : groups_first_forward(*a);
}

int groups_backward(const nw_groups_backward_args* a) {
  if (!well_formed(*a) || !divides(*a)) return NW_BAD_ARGUMENT;
  return a->layout == NW_CHANNELS_LAST ? groups_last_backward(*a) : groups_first_backward(*a);
}

int channels_forward(const nw_channels_forward_args* a) {
  if (!well_formed(*a) || (!a->training && (!a->running_mean || !a->running_var))) return NW_BAD_ARGUMENT;
  const int status = a->layout == NW_CHANNELS_LAST ? channels_last_forward(*a) : channels_first_forward(*a);
  if (status != NW_OK || !a->training) return status;
  const int moved = a->dtype == NW_FLOAT64 ? move_averages<double>(*a) : move_averages<float>(*a);
  if (moved == NW_OK && a->tracked) ++*a->tracked;
  return moved;
}

int channels_backward(const nw_channels_backward_args* a) {
  if (!well_formed(*a)) return NW_BAD_ARGUMENT;
  return a->layout == NW_CHANNELS_LAST ? channels_last_backward(*a) : channels_first_backward(*a);
}

}  // namespace

extern const KernelTable table = {rows_forward,    rows_backward,    groups_forward,
                                  groups_backward, channels_forward, channels_backward,
                                  recurrent_saves, recurrent_forward, recurrent_backward,
                                  has_tiles};

}  // namespace NW_ISA
