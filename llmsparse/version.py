"""The version, where the build, reports and files read it."""

__version__ = "0.1.0"
