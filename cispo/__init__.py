"""cispo: reinforcement-learning fine-tuning of hybrid-attention mixture-of-experts policies with CISPO.

Importing this package is cheap: neither torch nor Ray is loaded before something needs them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from cispo.generate import Policy

__version__ = "0.1.0"


def load_policy(path: "str | Path", *, device: str = "auto", dtype: str = "auto") -> "Policy":
    """A policy folder or a bundled policy (`bundled:tiny`), ready to `generate`."""
    from cispo.generate import Policy

    return Policy.load(path, device=device, dtype=dtype)
