"""Self-distilled Knowledge Delegator: exemplar-free class-incremental learning in JAX."""

__version__ = "0.1.0"
