"""Benchmarks: `pytest bench/`. Cases are declared in bench/cases.py, their peers in bench/peers.py."""
