"""The browser's page: the same model in ONNX Runtime Web, and nothing leaves the machine.

``static`` holds what a browser loads. See docs/web.md.
"""
