"""Tensors in, tensors out: no files, no printing, no modules, no global state."""
