"""Models from elsewhere and for elsewhere: folders as transformers saves them, and the local hub that holds them.

    model = hub.load("folder")            # or a name in the local hub, "owner/name@revision"
    hub.logits(model, [[1, 2, 3]])        # numpy, [B, T, V]
    hub.save(model, "another folder")
"""

from lm_jax.hub.model import batch, labelled, load, logits, save
from lm_jax.hub.store import path

__all__ = ["batch", "labelled", "load", "logits", "path", "save"]
