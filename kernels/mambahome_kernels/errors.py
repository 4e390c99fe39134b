"""Errors of the kernels."""


class Unsupported(ValueError):
    """A backend that was asked for by name cannot run these arguments here."""
