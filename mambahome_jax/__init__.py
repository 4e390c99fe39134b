"""Mamba-HoME in JAX: 3D medical image segmentation with Mamba layers and hierarchical soft mixtures of experts.

Names load when they are first used, so that importing this package costs nothing; `__init__.pyi` lists them. The
package needs no other for this, as an exported model runs where hardly any is installed.
"""

import ast as _ast
import importlib as _importlib
from pathlib import Path as _Path

_MODULES = {
    alias.asname or alias.name: f"{__name__}.{statement.module}"
    for statement in _ast.parse(_Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(statement, _ast.ImportFrom)
    for alias in statement.names
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(_importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
