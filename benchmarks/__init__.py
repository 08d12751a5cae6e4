"""Benchmarks: figures with the command that makes them. Results live in benchmarks/results/."""
