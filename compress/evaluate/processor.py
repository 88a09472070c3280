"""The part of a model that sees which makes its inputs of images and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.errors import BadInput, Missing

_MEND = "run: pip install 'entropress[vision]'"


def load_processor(directory: Path) -> Any:
    """The transformers processor of a model directory.

    Raises `Missing` for packages that it needs and that are not there, `BadInput` where there is
    none that reads images.
    """
    from transformers import AutoProcessor

    try:
        import PIL  # noqa: F401

        processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise Missing(
            f"its processor needs a package: {reason}", where=directory, mend=_MEND
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(f"has no processor: {error}", where=directory) from error
    if not hasattr(processor, "image_processor"):
        raise BadInput("its processor reads no images", where=directory)
    return processor
