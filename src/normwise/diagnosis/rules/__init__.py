"""The rules that turn numbers into findings: one table, small pure functions, one file for each kind of number."""
