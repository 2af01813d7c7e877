"""Patching: where a pattern can go, the proof that it is reached, and putting it there and taking it out."""
