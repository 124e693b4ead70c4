"""What `benchmarks/training_cost.py` is made of."""
