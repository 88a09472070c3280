"""An image and the patches of it that stay, small enough for a manifest, as reports show them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.errors import BadInput
from compress.stages.visual_inputs import Pictured
from compress.tokens import TokenPolicy, last_report, pruning

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 224  # pixels
_MOST = 3  # pictures
_COLOURS = 256  # with as many as a palette has, a photograph takes a third of the bytes


def picture(image: Image, kept: Sequence[int], rows: int, columns: int) -> dict[str, Any]:
    """An entry of a manifest's ``pictures``: ``image``, a PNG in base64, with its patches.

    ``image``: what the model sees, in any mode and size; it is made smaller where a side has more
    than 224 pixels, and nothing but its colours is taken over. ``kept``: those of its ``rows`` by
    ``columns`` equal patches that stay, row by row from 0. The same image gives the same bytes.
    Raises `BadInput` for patches that there are not, and for none.
    """
    patches = sorted(set(kept))
    if not patches or patches[0] < 0 or patches[-1] >= rows * columns:
        raise BadInput(
            "no patches of an image",
            where="kept",
            got=f"{patches[0]} to {patches[-1]}" if patches else "none",
            expected=f"some of 0 to {rows * columns - 1}",
        )
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    small = small.quantize(_COLOURS)
    small.info.clear()  # profiles and resolutions would be written along
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return {
        "image": base64.b64encode(file.getvalue()).decode(),
        "rows": rows,
        "columns": columns,
        "kept": patches,
    }


def pictures(
    model: Any, policy: TokenPolicy, examples: Sequence[Pictured], inputs: Sequence[Any]
) -> list[dict[str, Any]]:
    """Entries for the first images, pruned as ``policy`` says, that are one grid of tokens each.

    ``inputs``: those of `visual_inputs` for the ``examples``.
    """
    import torch

    found = []
    for example, given in zip(examples[:_MOST], inputs, strict=False):
        with pruning(model, policy), torch.inference_mode():
            model(**given, use_cache=False)
            report = last_report(model)
        segments = report.segments if report else ()
        grid = _grid(given, segments[0].tokens) if len(segments) == 1 else None
        if grid:
            kept = (segments[0].positions - segments[0].start).tolist()
            found.append(picture(_seen(example, given), kept, *grid))
    return found


def _grid(given: Any, tokens: int) -> tuple[int, int] | None:
    """Rows and columns of an image's tokens; None where they are no grid that is known."""
    if "image_grid_thw" in given:  # patches, a square of which is one token
        _, rows, columns = given["image_grid_thw"][0].tolist()
        side = math.isqrt(rows * columns // tokens) or 1
        rows, columns = rows // side, columns // side
    else:
        rows = columns = math.isqrt(tokens)
    return (rows, columns) if rows * columns == tokens else None


def _seen(example: Pictured, given: Any) -> Image:
    """The image as the model sees it, where its pixels are still in their places."""
    from PIL import Image

    pixels = given.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
        with Image.open(example.image) as image:
            return image.convert("RGB")
    low, high = pixels.min(), pixels.max()
    scaled = (pixels[0] - low) / (high - low).clamp(min=1e-6) * 255
    return Image.fromarray(scaled.round().byte().permute(1, 2, 0).numpy())
