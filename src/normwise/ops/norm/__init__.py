"""The operations of the norms and what they share: one file an op."""
