"""The checks of a pipeline, one module a part of it."""
