"""Results: PST and its rivals in one harness. Run as `python -m benchmarks.results`; see README.md."""
