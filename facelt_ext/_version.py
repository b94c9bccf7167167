"""The version of the package, also where it has no metadata."""

VERSION = "0.1.0"
