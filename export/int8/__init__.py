"""INT8: ranges, which layers take it, and the Q/DQ pairs."""
