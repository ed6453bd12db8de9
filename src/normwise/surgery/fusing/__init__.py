"""What `fuse` is made of: forwards are followed, pairs found in them, and modules given a forward of fused calls."""
