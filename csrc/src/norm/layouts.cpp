// The kernels that exist for two memory layouts: checks their arguments and calls the one for the layout at hand.
#include "norm/channels.h"
#include "norm/groups.h"
#include "norm/kernels.h"

namespace NW_ISA {
namespace {

template <class Args> bool well_formed(const Args& a) {
  return a.batch >= 0 && a.channels >= 1 && a.positions >= 0 &&
         (a.layout == NW_CHANNELS_FIRST || a.layout == NW_CHANNELS_LAST);
}
template <class Args> bool channels_last(const Args& a) {
  return a.layout == NW_CHANNELS_LAST || a.positions == 1;  // where both are one
}
template <class Args> bool has_whole_groups(const Args& a) { return a.groups >= 1 && a.channels % a.groups == 0; }

}  // namespace

int groups_forward(const nw_groups_forward_args* a) {
  if (!well_formed(*a) || !has_whole_groups(*a)) return NW_BAD_ARGUMENT;
  return a->layout == NW_CHANNELS_LAST ? groups_last_forward(*a) : groups_first_forward(*a);
}

int groups_backward(const nw_groups_backward_args* a) {
  if (!well_formed(*a) || !has_whole_groups(*a)) return NW_BAD_ARGUMENT;
  return a->layout == NW_CHANNELS_LAST ? groups_last_backward(*a) : groups_first_backward(*a);
}

int channels_forward(const nw_channels_forward_args* a) {
  const bool has_statistics = a->training || (a->running_mean && a->running_var);
  if (!well_formed(*a) || a->group_samples < 1 || !has_statistics) return NW_BAD_ARGUMENT;
  const int status = channels_last(*a) ? channels_last_forward(*a) : channels_first_forward(*a);
  if (status != NW_OK || !a->training) return status;
  const int updated = a->dtype == NW_FLOAT64 ? update_running_stats<double>(*a) : update_running_stats<float>(*a);
  if (updated == NW_OK && a->num_batches_tracked) ++*a->num_batches_tracked;
  return updated;
}

int channels_backward(const nw_channels_backward_args* a) {
  if (!well_formed(*a) || a->group_samples < 1) return NW_BAD_ARGUMENT;
  return channels_last(*a) ? channels_last_backward(*a) : channels_first_backward(*a);
}

}  // namespace NW_ISA
