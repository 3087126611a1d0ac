"""Annotate large sets of pictures: ``efficientface-annotate``, on one machine or on Ray."""
