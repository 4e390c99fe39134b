"""Named backends of an operation: one that is asked for by name works, or says why not."""

import importlib
from collections.abc import Iterator
from typing import Any

import jax

_OLDEST_JAX = (0, 11)  # whose Pallas has what the mosaic_gpu backends are written in


class Unsupported(ValueError):
    """A backend that was asked for by name cannot run these arguments here."""


class Backends:
    """The backends of one operation, each the BACKEND of a module, imported when it is first needed.

    BACKEND has `why_not(*arguments)`: None where it can run them, else the reason a user reads.
    """

    def __init__(self, package: str, **modules: str):
        self._modules = {name: f"{package}.{module}" for name, module in modules.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __getitem__(self, name: str) -> Any:
        return importlib.import_module(self._modules[name]).BACKEND

    def why_not(self, name: str, *arguments: Any) -> str | None:
        if name == "mosaic_gpu" and jax.__version_info__ < _OLDEST_JAX:
            return f"it needs JAX {'.'.join(map(str, _OLDEST_JAX))} or newer, and this is {jax.__version__}"
        try:
            return self[name].why_not(*arguments)
        except ImportError as error:  # Pallas' own parts move between versions
            return f"JAX {jax.__version__} lacks what it is written in: {error}"

    def choose(self, name: str | None, *arguments: Any) -> str:
        """The named backend, or for None mosaic_gpu where it can run, else xla.

        Raises Unsupported where a named backend cannot run here, ValueError for an unknown name.
        """
        if name is None:
            return "mosaic_gpu" if "mosaic_gpu" in self and not self.why_not("mosaic_gpu", *arguments) else "xla"
        if name not in self:
            raise ValueError(f"backend {name!r} is unknown; expected one of {', '.join(self)}, or None for the best")
        if reason := self.why_not(name, *arguments):
            raise Unsupported(f"backend {name!r} cannot run here: {reason}")
        return name
