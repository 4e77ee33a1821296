"""cispo: reinforcement-learning fine-tuning of hybrid-attention mixture-of-experts policies with CISPO.

Importing this package is cheap: neither torch nor Ray is loaded before something needs them.
"""

__version__ = "0.1.0"
