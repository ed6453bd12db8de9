"""What functions of torch do to the features of a tensor, by the functions' names."""

from __future__ import annotations

# Each value stays as it is and stands elsewhere, at all features alike; `to` may round.
MOVES = frozenset(
    (
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
        "t",
        "T",
        "mT",
        "contiguous",
        "clone",
        "detach",
        "data",
        "expand",
        "unsqueeze",
        "squeeze",
        "__getitem__",
        "select",
        "narrow",
        "chunk",
        "split",
        "unbind",
        "index_select",
        "roll",
        "repeat",
        "repeat_interleave",
        "tile",
        "broadcast_to",
        "type",
        "float",
        "double",
        "half",
        "bfloat16",
        "cpu",
        "cuda",
        "flip",
        "embedding",
    )
)
# Of another tensor they take dtype or shape only.
LIKE = frozenset(("to", "type_as", "expand_as", "view_as", "reshape_as"))
NEW = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")
JOINS = frozenset(("cat", "concat", "concatenate", "stack", "hstack", "vstack"))
ADDS = frozenset(
    (
        "add",
        "__add__",
        "__radd__",
        "__iadd__",
        "add_",
        "sub",
        "subtract",
        "__sub__",
        "__isub__",
        "sub_",
        "__rsub__",
        "rsub",
    )
)
FACTORS = frozenset(
    (
        "mul",
        "multiply",
        "__mul__",
        "__rmul__",
        "__imul__",
        "mul_",
        "div",
        "divide",
        "true_divide",
        "__truediv__",
        "__itruediv__",
        "div_",
    )
)
# They tell no values.
QUERIES = frozenset(
    (
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "storage_offset",
        "element_size",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "get_device",
        "__len__",
        "__hash__",
        "__repr__",
        "is_tensor",
        "is_same_size",
        "_is_view",
    )
)
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
