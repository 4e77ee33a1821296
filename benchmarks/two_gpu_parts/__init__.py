"""The parts of `benchmarks/two_gpus.py`; each is run in a process of its own, under a time limit of its own."""
