"""Options of the language-model comparison."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from train.config import ConfigError
from train.experiments.options import check_lanes


@dataclass(frozen=True)
class LanguageOptions:
    """Compare layers as language models on the same text."""

    variants: tuple[
        Literal[
            "delta_net",
            "gated_delta_net",
            "kda",
            "transformer",
            "delta_net_swa",
            "delta_net_global",
            "kda_mla",
        ],
        ...,
    ] = ("delta_net", "gated_delta_net", "kda", "transformer", "delta_net_swa", "delta_net_global", "kda_mla")
    """models; the first one's number of parameters is all others'"""
    out: Path = Path("runs/language.json")
    """results, as JSON; a table goes beside them"""
    files: tuple[str, ...] = ()
    """text, as for python -m train --data.files; none means the running Python's standard library"""
    steps: int = 200
    """optimizer steps"""
    eval_every: int = 50
    """steps between evaluations, which are also taken in one call of the device"""
    seq_len: int = 128
    """tokens of a row"""
    batch_size: int = 8
    """rows of a step"""
    eval_batches: int = 8
    """held-out batches"""
    learning_rates: tuple[float, ...] = (3e-3,)
    """each has models of its own, trained side by side; the best counts"""
    seeds: tuple[int, ...] = (0, 1)
    """of the parameters; each has models of its own"""
    num_layers: int = 4
    """blocks"""
    hidden_size: int = 64
    """width"""
    num_heads: int = 2
    """heads"""
    head_dim: int = 32
    """size of keys and values"""
    intermediate_size: int = 160
    """width of the first variant's MLPs"""
    window_size: int = 32
    """tokens that sliding-window layers see"""
    weight_decay: float = 0.1
    """of matrices"""
    warmup_steps: int = 20
    """of the learning rate, which then falls as a cosine to a tenth"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype"""
    data_seed: int = 0
    """of the batches"""
    budget_seconds: float | None = None
    """starts no further variant after so many seconds"""
    compile_ahead: int = 1
    """programs compiled at a time in the background"""


FULL = LanguageOptions(
    out=Path("runs/language_full.json"),
    steps=600,
    eval_every=100,
    seq_len=512,
    batch_size=64,
    eval_batches=8,
    learning_rates=(1e-3, 2e-3),
    num_layers=8,
    hidden_size=512,
    num_heads=4,
    head_dim=128,
    intermediate_size=1408,
    window_size=128,
    warmup_steps=60,
    dtype="bfloat16",
    compile_ahead=3,
)


def check(options: LanguageOptions) -> None:
    """Raises ConfigError, naming the argument, for values that cannot work."""
    for name, value in asdict(options).items():
        dashed = name.replace("_", "-")
        if name in ("variants", "learning_rates", "seeds") and not value:
            raise ConfigError(f"argument --{dashed}: expected at least one")
        may_be_zero = name in ("data_seed", "warmup_steps", "weight_decay")
        if isinstance(value, (int, float)) and not (value > 0 or (may_be_zero and value == 0)):
            raise ConfigError(f"argument --{dashed}: must be positive, got {value}")
    check_lanes(options)
