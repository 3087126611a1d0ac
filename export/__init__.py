"""Export: trace to ONNX, choose a precision, build TensorRT engines, verify all of it."""
