"""The tokenizer that a command's options name."""

from deltajax.tokenizer import Tokenizer, UnknownTokenError, load_tokenizer
from train.config import ConfigError


def chosen_tokenizer(path: str | None, eos_token: str | None, prefix: str) -> Tokenizer:
    """`load_tokenizer` from options.

    Args:
        path: the option `<prefix>tokenizer`.
        eos_token: the option `<prefix>eos-token`.
        prefix: of the options' names, for messages.

    Raises:
        ConfigError: names the option that is wrong.
    """
    if eos_token is not None and path is None:
        raise ConfigError(f"argument {prefix}eos-token: goes with {prefix}tokenizer; bytes have their own")
    try:
        return load_tokenizer(path, eos_token)
    except UnknownTokenError as error:
        raise ConfigError(f"argument {prefix}eos-token: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"argument {prefix}tokenizer: {error}") from error
