"""One file per claim about speed or memory; each prints its figures and writes them to `benchmarks/results/`."""
