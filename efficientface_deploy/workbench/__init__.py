"""What training, export and benchmarks share. The runtime never imports it."""
