"""The bundled model; see the model card beside the files."""
