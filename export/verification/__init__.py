"""Does an artifact compute what PyTorch computed, and what is recorded of it."""
