"""What the benchmarks measure with: inputs, models, processes, rooflines."""
