"""The version of this package: its one home, which pyproject.toml reads."""

__version__ = "0.1.0"
