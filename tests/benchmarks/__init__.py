"""Benchmarks beside peers: ``make bench``. Never part of the tests."""
