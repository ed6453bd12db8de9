"""The hooks of a layer, which its successor in a model keeps."""

from __future__ import annotations

from torch import nn

# The dictionaries in which a module keeps its hooks.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the hooks of `old`."""
    new._is_full_backward_hook = old._is_full_backward_hook
    for name in HOOKS:
        hooks, own = getattr(old, name), getattr(new, name)
        bound = {key: hook for key, hook in hooks.items() if getattr(hook, "with_module", False)}
        if own or bound:
            # Such a hook knows its module by a weak reference.
            rebound = {key: type(hook)(hook.hook, new) for key, hook in bound.items()}
            own.update({**hooks, **rebound})
        elif hooks:
            # The very dictionary, so that the handles that users hold still remove their hooks.
            setattr(new, name, hooks)
