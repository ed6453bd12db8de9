"""`python -m benchmarks gpu`: minutes on a GPU, in one command. Each phase is a process of its own: one that hangs or
spoils its CUDA context takes no other with it."""
