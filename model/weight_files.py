"""Which safetensors files hold the weights of a policy folder: one, or those that an index names. Loads no torch."""

import json
from pathlib import Path

from cispo.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files, which need not exist; CheckpointError for an index that cannot be read."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return [folder / WEIGHTS_NAME]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of weights ({type(error).__name__}: {error}); restore it from its source"
        ) from error


def missing_weights(folder: Path) -> list[str]:
    """Names of the files that are not there."""
    return [file.name for file in weight_files(folder) if not file.is_file()]
