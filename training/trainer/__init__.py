"""The training loop and what it needs: data, targets, checkpoints, processes."""
