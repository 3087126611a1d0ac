"""ONNX graphs: read, traced, written anew for a target, their precision."""
