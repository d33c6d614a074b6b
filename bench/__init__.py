"""Microbenchmarks: `make bench` runs every bench_*.py and prints the ratios against the baselines."""
