"""transformers integration: importing this package, or torch, teaches it the format."""

from __future__ import annotations

from compress._autoload import install

install()
