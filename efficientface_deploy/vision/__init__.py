"""Pictures, faces and videos: from bytes to the model's input, and back onto the picture."""
