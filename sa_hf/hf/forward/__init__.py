"""One forward of a patched model, from the outer call to what each layer's pattern is given."""
