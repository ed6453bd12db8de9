"""torch's own kernels, and the step loop of a recurrence in torch's own operations."""
