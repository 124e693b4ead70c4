"""Measurements that run beside the package."""
