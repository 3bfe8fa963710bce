"""What `python -m lm_jax.bench` measures, a file a question: each gives `figures.Figure`s."""
