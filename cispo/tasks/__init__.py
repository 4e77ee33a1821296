"""A seeded generator of small Python function tasks: English specification in, hidden tests out.

`python -m cispo.tasks OUT_DIR` writes the three splits and the supervised corpus; see `cispo.tasks.generate` for the
rows and `cispo.tasks.splits` for what keeps the splits apart. Nothing here loads torch or ray.
"""
