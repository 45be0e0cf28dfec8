"""Text from a model, to look at."""

import jax
import jax.numpy as jnp
import numpy as np

from deltajax.models import LanguageModel, generate
from deltajax.tokenizer import Tokenizer
from train.config import SampleConfig


def sample_text(model: LanguageModel, tokenizer: Tokenizer, config: SampleConfig, seed: int) -> str:
    """The prompt and its continuation, up to the end of the document.

    The prompt follows an end-of-document id, as every document does in training.
    """
    prompt = np.concatenate([[tokenizer.eos_id], tokenizer.encode(config.prompt.encode())])
    new = generate(
        model,
        jnp.asarray(prompt[None], jnp.int32),
        max_new_tokens=config.tokens,
        temperature=config.temperature,
        key=jax.random.key(seed),
        stop_tokens=(tokenizer.eos_id,),
        pad_token=tokenizer.eos_id,
    )
    # Decoded together: a character's bytes may be split between prompt and continuation.
    return tokenizer.decode(np.concatenate([prompt, np.asarray(new)[0]]))
