"""Registers the quantizer when transformers needs it, at no cost until then.

torch calls `autoload` through the entry point group ``torch.backends`` when it is imported
(``_entropress_autoload`` stands between), and so does ``import compress``. All it does is to put a
finder in front of the import system, which waits for transformers' table of quantizers and adds
ours to it. ``ENTROPRESS_AUTOLOAD=0`` switches that off; importing ``compress.hf`` registers all the
same. Nothing in here may fail: it runs inside other libraries.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OPT_OUT = "ENTROPRESS_AUTOLOAD"
_TABLE = "transformers.quantizers.auto"
_QUANTIZER = "compress.hf.quantizer"


def autoload() -> None:
    """The entry point for torch: `install`, unless ``ENTROPRESS_AUTOLOAD`` is 0."""
    if os.environ.get(OPT_OUT) != "0":
        install()


def install() -> None:
    """Register the quantizer now if transformers' table is there, else as soon as it is."""
    if _table_is_ready():
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _table_is_ready() -> bool:
    table = sys.modules.get(_TABLE)
    return table is not None and not getattr(table.__spec__, "_initializing", False)


@functools.cache
def _register() -> None:
    """Import the module whose decorators register, once."""
    try:
        __import__(_QUANTIZER)
    except Exception as error:
        # transformers works on; a coded checkpoint then fails to load with wrong shapes.
        logging.getLogger("entropress").warning("cannot register with transformers: %s", error)


class _Finder(MetaPathFinder):
    """Finds nothing itself: asks the other finders for the table's module and follows its loading.

    It stays in ``sys.meta_path`` for good, since removing it could make an import that runs in
    another thread skip the finder after it.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _TABLE:
            return _followed(_spec_from_others(self, name, path, target))
        # When torch itself is first imported by the table's module, that one is too far on to be
        # followed; any later module of transformers tells that it is ready.
        if name.startswith("transformers.") and _QUANTIZER not in sys.modules and _table_is_ready():
            _register()
        return None


def _spec_from_others(
    finder: MetaPathFinder, name: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for other in list(sys.meta_path):
        find = None if other is finder else getattr(other, "find_spec", None)
        spec: ModuleSpec | None = find and find(name, path, target)
        if spec is not None:
            return spec
    return None


def _followed(spec: ModuleSpec | None) -> ModuleSpec | None:
    """The same spec, which calls `_register` once its module has been executed."""
    if spec is None or spec.loader is None:
        return spec
    loader: Loader = spec.loader
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _register()

    # A foreign loader may have slots; then `find_spec` catches up at the next module.
    with contextlib.suppress(AttributeError):
        loader.exec_module = execute_and_register  # type: ignore[method-assign]
    return spec
