"""The version of this package, for whatever must name it without importing the package."""

VERSION = "0.1.0"
