"""Measuring attention: workloads, contenders in interleaved rounds, ceilings, records, tables and plots.

``python -m attnkit.bench.demo`` shows it; ``attnkit bench`` is its command; bench/README.md explains the numbers.
"""
