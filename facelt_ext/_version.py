"""The package's version, which is also that of its metadata."""

__version__ = "0.1.0"
