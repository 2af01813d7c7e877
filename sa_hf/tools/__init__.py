"""Tools around the library: the command line, benchmarks, pictures, cards."""
