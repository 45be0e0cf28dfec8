"""Language models of other layers and equal size."""

from deltajax.models import ModelConfig, count_parameters, kda_mla_pattern
from train.config import ConfigError
from train.experiments.language_options import LanguageOptions

# Parameters of a variant differ from the first's by no more.
MATCH = 0.02


def model_configs(options: LanguageOptions, vocab_size: int) -> dict[str, ModelConfig]:
    """Every variant's configuration, with MLPs as wide as its number of parameters asks for.

    Raises:
        ConfigError: a variant that no width makes equal within `MATCH`, or sizes that a model refuses.
    """
    n = options.num_layers
    two_global = tuple("full_attention" if i in (1, n // 2) else "delta_net" for i in range(n))
    patterns: dict[str, tuple[str, ...]] = {
        "delta_net": ("delta_net",),
        "gated_delta_net": ("gated_delta_net",),
        "kda": ("kda",),
        "transformer": ("full_attention",),
        "delta_net_swa": ("delta_net", "sliding_window"),
        "delta_net_global": two_global,
        "kda_mla": kda_mla_pattern(n, 3),
    }
    found: dict[str, ModelConfig] = {}
    for name in options.variants:
        # Latent attention has no positions, as in Kimi Linear.
        latent = "latent_attention" in patterns[name]
        try:
            config = ModelConfig(
                vocab_size=-(-vocab_size // 4) * 4,
                hidden_size=options.hidden_size,
                num_layers=n,
                layer_pattern=patterns[name],
                num_heads=options.num_heads,
                head_dim=options.head_dim,
                attn_head_dim=options.head_dim,
                intermediate_size=options.intermediate_size,
                window_size=options.window_size,
                rope_theta=None if latent else 10000.0,
                kv_lora_rank=options.hidden_size // 2,
                qk_nope_head_dim=options.head_dim,
                qk_rope_head_dim=options.head_dim // 2,
                latent_v_head_dim=options.head_dim,
                dtype=options.dtype,
                scan_layers=False,
            )
        except ValueError as error:
            raise ConfigError(f"variant {name}: {error}") from error
        if found:
            first = count_parameters(next(iter(found.values())))
            unit = 3 * config.hidden_size * n  # parameters of one channel of all MLPs
            width = config.intermediate_size + round((first - count_parameters(config)) / unit / 8) * 8
            config = config.replace(intermediate_size=max(width, 8))
            if abs(count_parameters(config) / first - 1) > MATCH:
                raise ConfigError(
                    f"argument --intermediate-size: {options.intermediate_size} leaves {name} with "
                    f"{count_parameters(config):,} parameters, and {next(iter(found))} with {first:,}"
                )
        found[name] = config
    return found
