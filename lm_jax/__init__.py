"""`lm_jax`: language models in JAX, from raw text to a scaling law. Importing this does nothing."""

__version__ = "0.1.0"


def pipeline(task: str, model, **knobs):
    """A task on texts by name, with the model of a folder or of the local hub: `lm_jax.pipelines` has the tasks.

    lm_jax.pipeline("text-classification", model="folder")("What a film!")
    """
    from lm_jax import pipelines  # here, so that importing lm_jax stays light

    return pipelines.pipeline(task, model, **knobs)
