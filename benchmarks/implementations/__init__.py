"""What the benchmarks compare: views, loaders, steps and training, ours and others' (baselines)."""
