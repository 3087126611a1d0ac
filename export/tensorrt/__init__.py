"""TensorRT engines: built from a finished ONNX file."""
