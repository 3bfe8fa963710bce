"""`lm_jax`: language models in JAX, from raw text to a scaling law. Importing this does nothing."""

__version__ = "0.1.0"
