"""Named backends of an operation: one that is asked for works, or says why not; and what they are traced for."""

import contextlib
import contextvars
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

_OLDEST_JAX = (0, 11)  # whose Pallas has what the mosaic_gpu backends are written in


class Target(NamedTuple):
    """The platform of an exported program, and the batch for which it is planned where its own is symbolic."""

    platform: str
    batch: int


_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def exporting(platform: str, batch: int) -> Iterator[None]:
    """Trace for a platform of `jax.default_backend` that need not be here: "cpu", "gpu" or "tpu"."""
    token = _TARGET.set(Target(platform, batch))
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform() -> str:
    """That of the program to export, else of the default device."""
    target = _TARGET.get()
    return jax.default_backend() if target is None else target.platform


def planned_batch(batch: int) -> int:
    """The batch as a number: of a symbolic one, that for which the program is planned."""
    target = _TARGET.get()
    return batch if target is None or isinstance(batch, int) else target.batch


def why_not_exported() -> str | None:
    """Why a Pallas kernel cannot be part of the program to export; None where none is exported."""
    target = _TARGET.get()
    if target is None:
        return None
    if target.platform != "gpu":
        return f"it needs an NVIDIA GPU, and the program is for a {target.platform}"
    return "it is made for one batch on the GPU at hand, and an exported program takes any batch on any GPU"


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
        if name == "mosaic_gpu" and (reason := why_not_exported()):
            return reason
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
