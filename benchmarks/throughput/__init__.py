"""The throughput benchmarks, all sections in one command; see `__main__`."""
