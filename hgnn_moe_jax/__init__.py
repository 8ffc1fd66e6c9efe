"""Coupled-expert language models in JAX, and losses that keep the experts different."""

__version__ = "0.1.0"
