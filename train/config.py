"""Every option of `python -m train`: typed dataclasses, parsed by tyro; and the model they choose."""

import dataclasses
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import tyro

from deltajax.models import PRESETS, ModelConfig, get_preset, kda_mla_pattern
from deltajax.models.config import REMAT

# The choices come from tables, which a static type cannot name.
if typing.TYPE_CHECKING:
    Preset = str
    Remat = str
else:
    Preset = tyro.extras.literal_type_from_choices(list(PRESETS))
    Remat = tyro.extras.literal_type_from_choices(list(REMAT))


Layout = Literal["given", "auto"]


class ConfigError(ValueError):
    """Options that cannot be used together, or with what a run directory holds."""


@dataclass(frozen=True)
class ModelOptions:
    """Overrides of the preset; what is left out is the preset's."""

    num_layers: int | None = None
    """number of blocks"""
    hidden_size: int | None = None
    """width of the residual stream"""
    num_heads: int | None = None
    """query/key heads of the delta-rule layers"""
    head_dim: int | None = None
    """query/key head size of the delta-rule layers"""
    intermediate_size: int | None = None
    """width of the MLP"""
    kda_per_mla: int | None = None
    """KDA layers before each layer of latent attention (0: that alone), for presets with both; the last layer
    is latent attention too"""
    allow_neg_eigval: bool | None = None
    """write strengths in [0, 2] instead of [0, 1]"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """compute dtype; parameters are float32 always"""
    remat: Remat | None = None
    """what blocks keep for the backward pass, from fastest to smallest; the rest is computed again"""
    scan_layers: bool | None = None
    """one loop over equal layers; without it compiling takes longer, and a step less time"""
    chunk_size: int | None = None
    """chunk of the delta-rule ops"""
    implementation: Literal["pallas", "chunked", "scan"] | None = None
    """backend of the delta-rule ops"""
    attention_implementation: Literal["xla", "cudnn"] | None = None
    """softmax attention: cuDNN's kernels where they run, by default; xla: none; cudnn: an error where they do
    not run"""


@dataclass(frozen=True)
class DataConfig:
    """Text, tokens and batches."""

    files: tuple[str, ...] = ()
    """text, .jsonl and .parquet files, directories made by train.prepare, or globs; to mix sources, each with
    its share of the tokens: 'web/*.jsonl@0.7' 'code@0.3'; none means the running Python's standard library"""
    text_field: str = "text"
    """field of a .jsonl record, or column of a .parquet file, that holds the text"""
    on_error: Literal["raise", "skip"] = "raise"
    """bad files and records: stop at the first, or count them, pass over them and report"""
    tokenizer: str | None = None
    """Hugging Face tokenizers JSON file; none means the one of prepared data, or bytes"""
    eos_token: str | None = None
    """the tokenizer's document separator, where its name is unusual"""
    seq_len: int = 256
    """tokens per row"""
    batch_size: int = 8
    """rows per step, over all devices"""
    held_out_fraction: float = 0.05
    """share of the documents kept for evaluation; prepared data has its own"""
    prefetch: int = 2
    """batches prepared ahead in a background thread; 0 for none"""
    hard_window: int = 0
    """batches measured (without updates) at a time, to train on the hardest of them; 0 for all batches"""
    hard_fraction: float = 0.5
    """share of a window's batches that is trained on, those of the highest loss"""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised beside the cross entropy."""

    z_loss: float = 0.0
    """weight of the squared log normaliser of each token, part of the training loss only"""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    """muon: for the matrices of blocks, AdamW for the rest; adafactor: without parameter scaling"""
    learning_rate: float = 2e-3
    """peak learning rate; one that suits adamw suits the others"""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """after warm-up: a cosine to the end, or stable and then a linear decay"""
    warmup_steps: int = 20
    """steps of linear warm-up"""
    decay_fraction: float = 0.2
    """share of the run spent decaying (wsd)"""
    final_fraction: float = 0.1
    """final learning rate as a share of the peak"""
    b1: float = 0.9
    """decay of the first moment; muon's matrices have 0.95; adafactor keeps no first moment at 0"""
    b2: float = 0.95
    """decay of the second moment; adafactor has its own"""
    eps: float = 1e-8
    """added to the root of the second moment; adafactor has its own"""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the first moment"""
    second_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the second moment; bfloat16 is rounded at random, up or down, so that small changes add up; not for
    adafactor, whose second moments are sums over rows and columns"""
    weight_decay: float = 0.1
    """decoupled weight decay of matrices, never of norms, biases, taps, A_log and dt_bias"""
    decay_embeddings: bool = True
    """weight decay of the embedding table too"""
    clip_norm: float = 1.0
    """largest global gradient norm"""
    balance_rate: float = 1e-3
    """how much a router's correction bias (where there is one) moves in every step: down for experts chosen
    more often than the mean, up for others; 0 for not at all"""
    accumulate: int = 1
    """micro-batches a step is cut into, to save memory; the result is the same up to rounding"""


@dataclass(frozen=True)
class EvalConfig:
    """Loss on held-out text."""

    every: int = 50
    """steps between evaluations"""
    batches: int = 16
    """held-out batches per evaluation"""


@dataclass(frozen=True)
class SampleConfig:
    """Text generated along the way and at the end."""

    every: int = 100
    """steps between samples"""
    prompt: str = "def "
    """text to continue"""
    tokens: int = 160
    """tokens to generate; 0 for no samples"""
    temperature: float = 0.7
    """softmax temperature; 0 takes the likeliest token"""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and whether a run continues."""

    every: int = 50
    """steps between checkpoints; the last step is always saved"""
    keep: int = 2
    """newest checkpoints kept, besides the one of the lowest evaluation loss"""
    resume: bool = True
    """continue from the newest complete checkpoint; --checkpoint.no-resume refuses a used run directory"""


@dataclass(frozen=True)
class MeshConfig:
    """How devices share the work."""

    data: int = -1
    """copies of the model; -1 takes the devices that the others leave"""
    fsdp: int = 1
    """parts that parameters and optimizer state are split into"""
    expert: int = 1
    """parts that the experts of a mixture are split into; divides their number"""
    context: int = 1
    """parts that each row's tokens are split into (context parallelism); divides their number"""
    tensor: int = 1
    """parts that heads, MLP and vocabulary are split into; divides the model's numbers of heads"""
    distributed: bool = False
    """this is one of several processes; JAX finds the others on Cloud TPU pods (Compute Engine and GKE),
    Slurm, Open MPI and Kubernetes; one process per TPU host, and on Slurm and Open MPI one per GPU"""
    coordinator: str | None = None
    """where it cannot: host:port of process 0"""
    num_processes: int | None = None
    """where it cannot: how many processes"""
    process_id: int | None = None
    """where it cannot: which of them this is, from 0"""
    join_within: int = 300
    """seconds that all processes may take to come together at the start"""
    lost_after: int = 60
    """seconds without a sign of life after which a process is lost, and the others end"""


@dataclass(frozen=True)
class LogConfig:
    """What is shown and recorded."""

    every: int = 10
    """steps between printed lines, where there is no terminal for a progress bar"""
    tensorboard: bool = True
    """write TensorBoard event files into the run directory"""
    gates_every: int = 100
    """steps between statistics of each layer's write strengths and decays, which cost a forward pass; 0 for
    none"""
    trace_at: int | None = None
    """first step of a profiler trace, written into the run directory; not the step that compiles"""
    trace_steps: int = 3
    """steps traced"""
    peak_tflops: float | None = None
    """peak TFLOP/s of one device for MFU, where it is not one known to train.metrics"""


@dataclass(frozen=True)
class TrainConfig:
    """Train a delta-rule language model; run again to resume."""

    preset: Preset = "tiny_gated_delta_net"
    """the model"""
    steps: int = 300
    """optimizer steps in all, those before a resume included"""
    seed: int = 0
    """seed of the parameters, the data order and the samples"""
    run_dir: str | None = None
    """where checkpoints, metrics and the configuration go; runs/<preset> by default"""
    layout: Layout = "given"
    """auto: mesh sizes and, unless given, --model.remat by model size, batch, devices and their memory"""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)


def model_arguments(config: TrainConfig) -> str:
    """The arguments that chose the model, for messages."""
    given = {k.replace("_", "-"): v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    return " ".join(
        [f"--preset {config.preset}", *(f"--model.{name} {value}" for name, value in given.items())]
    )


def model_config(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The preset with its overrides, and a vocabulary that fits the tokenizer.

    The vocabulary is rounded up (to 4, or to 128 beyond 1,024) so that it tiles and splits evenly.

    Raises:
        ConfigError: an override that the model refuses.
    """
    changes = {k: v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    ratio = changes.pop("kda_per_mla", None)
    multiple = 128 if vocab_size > 1024 else 4
    vocab_size = -(-vocab_size // multiple) * multiple
    try:
        preset = get_preset(config.preset)
        # A hybrid cut short keeps the head of its pattern.
        pattern = preset.layer_pattern[: config.model.num_layers]
        if ratio is not None:
            kinds = sorted(set(preset.layer_pattern))
            if kinds != ["kda", "latent_attention"]:
                raise ValueError(f"kda_per_mla={ratio}: the preset's layers are {', '.join(kinds)}")
            pattern = kda_mla_pattern(config.model.num_layers or preset.num_layers, ratio)
        return preset.replace(
            vocab_size=vocab_size, param_dtype="float32", **{"layer_pattern": pattern, **changes}
        )
    except ValueError as error:
        raise ConfigError(f"arguments {model_arguments(config)}: {error}") from error


def parse(args: Sequence[str] | None = None) -> TrainConfig:
    """Options from the command line; prints usage and exits with status 2 if they are wrong."""
    args = list(sys.argv[1:] if args is None else args)
    for i, arg in enumerate(args):  # presets may be spelt with dashes, as `get_preset` allows
        if i and args[i - 1] == "--preset":
            args[i] = arg.replace("-", "_")
        elif arg.startswith("--preset="):
            args[i] = "--preset=" + arg.removeprefix("--preset=").replace("-", "_")
    return tyro.cli(TrainConfig, prog="python -m train", args=args)
