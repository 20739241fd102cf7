"""Load tests and benchmarks.  They start what they measure, on loopback, bounded in time and count."""
