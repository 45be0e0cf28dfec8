"""The training run: set up, resume, step, evaluate, sample, save, report."""

import json
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deltajax.models import LanguageModel
from train import config as options
from train.checkpoint import Checkpoints
from train.command import command
from train.config import ConfigError, TrainConfig
from train.config_checks import check
from train.config_dict import differing_fields, to_dict
from train.data import Batch, train_batches
from train.evaluation import Evaluation
from train.failure import NonFiniteError, save_failure
from train.guard import StopRequest, check_directory, only_run_in, stop_on_signals
from train.hard import HardBatches
from train.layout import laid_out
from train.mesh import ShardingRules, data_group, global_batch, mesh_of
from train.mixture import Data, load_data
from train.model_state import ModelState, model_state
from train.objective import Objective, next_token
from train.optimizer import make_optimizer, make_schedule, state_layout
from train.processes import Processes
from train.recorder import Recorder
from train.report import Report
from train.sample import sample_text
from train.step import Params, StepMetrics, TrainState, make_gate_step, make_sums_step, make_train_step
from train.trace import Trace

# Options whose change between a checkpoint and its resumption is worth a note.
_SHAPES_TRAINING = (
    "model.",
    "train.steps",
    "train.seed",
    "train.data",
    "train.loss",
    "train.optimizer",
    "train.eval",
    "preference",
    "corpus",
)


def train(config: TrainConfig, processes: Processes) -> int:
    """Runs (or resumes) training.

    Args:
        config: the options.
        processes: joined here, once the options are checked.

    Returns:
        The exit status: 0 when complete, 1 when stopped by a loss that is not finite, 128 + the signal's
        number when stopped by SIGTERM or SIGINT after saving.

    Raises:
        ConfigError: options that do not work together or with the run directory.
        DataError: text that cannot be used.
        CheckpointError: a run directory whose checkpoints are all damaged.
    """
    check(config)
    processes.join(config.mesh)
    report = Report(enabled=processes.index == 0, every=config.log.every)
    directory = Path(config.run_dir or f"runs/{config.preset}")
    check_directory(directory)
    return execute(Run.build(config, directory, report, processes))


def execute(run: "Run") -> int:
    """Trains in the run's directory, which is made if absent; see `train` for the exit status."""
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"argument --run-dir: {run.directory} cannot be made ({error})") from error
    if run.processes.index != 0:
        return run.go()
    with only_run_in(run.directory):
        return run.go()


@dataclass
class Run:
    """The parts of a run, and where it stands."""

    config: TrainConfig
    directory: Path
    report: Report
    processes: Processes
    data: Data
    model: ModelState
    rules: ShardingRules = field(default_factory=ShardingRules)
    _evaluated: tuple[int, dict[str, float]] | None = None  # the last evaluation: step, what it found
    _told_bad: int = 0  # of the bad records skipped, those reported

    @classmethod
    def build(cls, config: TrainConfig, directory: Path, report: Report, processes: Processes) -> "Run":
        """Reads or opens the data and traces the model; makes no arrays and writes nothing."""
        data = load_data(config.data)
        try:
            if config.layout == "auto":
                chosen = options.model_config(config, data.tokenizer.vocab_size)
                config, layout = laid_out(config, chosen)
                report.say(f"layout: {layout.arguments}")
            mesh = mesh_of(config.mesh)
            data_group(mesh, ShardingRules())
            model = model_state(
                options.model_config(config, data.tokenizer.vocab_size), mesh, ShardingRules()
            )
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
        run = cls(config, directory, report, processes, data, model)
        run.check()
        return run

    def check(self) -> None:
        """Traces the model.

        Raises:
            ConfigError: rows that do not split over the devices, or what the model has to say against its
                options or the device.
        """
        data, optimizer = self.config.data, self.config.optimizer
        parts = ShardingRules().parts(self.model.mesh, "batch")
        if data.batch_size % (parts * optimizer.accumulate):
            raise ConfigError(
                f"argument --data.batch-size: {data.batch_size} rows do not split over "
                f"{parts} devices x {optimizer.accumulate} micro-batches"
            )
        try:
            self._trace()
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"arguments {options.model_arguments(self.config)}: {error}") from error

    @property
    def abstract_batch(self) -> dict[str, Any]:
        """Shapes of a micro-batch."""
        rows = self.config.data.batch_size // self.config.optimizer.accumulate
        ids = jax.ShapeDtypeStruct((rows, self.config.data.seq_len), jnp.int32)
        return dict.fromkeys(("tokens", "targets", "segment_ids"), ids)

    def _trace(self) -> None:
        batch = self.abstract_batch
        loss = jax.jit(lambda params, batch: self.objective(self.model.model(params), batch))
        if self.model.config.implementation == "pallas":  # refuses a device only when lowered for it
            loss.lower(self.model.abstract, batch)
        else:
            jax.eval_shape(loss, self.model.abstract, batch)

    def go(self) -> int:
        """Trains to the last step; see `train` for the exit status."""
        checkpoints = Checkpoints(self.directory / "checkpoints", self.config.checkpoint.keep)
        data = self.batches()
        if self.config.data.hard_window:
            data = HardBatches(data, self.config.data.hard_window, self.config.data.hard_fraction)
        try:
            with stop_on_signals() as stop, jax.set_mesh(self.model.mesh):
                return self._go(checkpoints, data, stop)
        except NonFiniteError as error:
            where = save_failure(self.directory / "failure", error)
            self.report.say(f"stopped: {error}; the state before that step and its batch are in {where}")
            return 1
        finally:
            self.report.close()
            checkpoints.close()
            data.close()  # its thread would otherwise outlive the interpreter

    def batches(self) -> Any:
        """The Grain iterator over this process's rows of each batch."""
        return train_batches(self.data.train, **self.reading)

    @property
    def reading(self) -> dict[str, int]:
        """How this process reads its share of the batches: arguments of `train.data.train_batches`."""
        group, groups = self.data_group
        data = self.config.data
        return dict(
            seq_len=data.seq_len,
            batch_size=data.batch_size,
            seed=self.config.seed,
            process_index=group,
            process_count=groups,
            prefetch=data.prefetch,
        )

    def _go(self, checkpoints: Checkpoints, data: Any, stop: StopRequest) -> int:
        steps, report = self.config.steps, self.report
        state = self._start_or_resume(checkpoints, data)
        start = int(state.step)
        self.introduce()
        if start >= steps:
            more = 2 * start
            report.say(
                f"already complete: resumed at step {start} of {steps}; pass --steps {more} to train on"
            )
        else:
            tensorboard = self.directory / "tensorboard" if self.config.log.tensorboard else None
            report.start(tensorboard, start, steps)
            state = self._steps(state, start, checkpoints, data, stop)
            checkpoints.wait()
            if stop.signal is not None:
                step = int(state.step)
                report.close()
                report.say(
                    f"stopped by {stop.signal.name} after step {step} of {steps}; saved, and the same "
                    "command resumes"
                )
                return 128 + stop.signal.value
        self._finish(state, checkpoints)
        return 0

    def introduce(self) -> None:
        """Says what is trained on what."""
        report, devices, described = self.report, self.model.mesh.devices, self.data.description()
        report.say(
            f"{self.config.preset}: {self.model.num_parameters:,} parameters on "
            f"{dict(self.model.mesh.shape)} of {devices.flat[0].device_kind}; {described[0]}"
        )
        for line in described[1:]:
            report.say(line)
        if self.data.bad.count:
            report.say(self.data.bad.summary())
            self._told_bad = self.data.bad.count
        report.say(f"to reproduce: {command(self.config)}")
        report.say(f"bigram baseline: {self.evaluation.units(self.bigram)} on held-out text")

    def initial_state(self) -> TrainState:
        """Step 0."""
        return self.model.init_train_state(self.optimizer, self.config.seed)

    def _start_or_resume(self, checkpoints: Checkpoints, data: Any) -> TrainState:
        """The state to go on from; `data` and metrics.jsonl are set to match."""
        found = checkpoints.steps()
        if found and not self.config.checkpoint.resume:
            raise ConfigError(
                f"argument --checkpoint.no-resume: {self.directory} has checkpoints up to step {found[-1]}; "
                "choose another --run-dir, or delete it"
            )
        restored = checkpoints.restore_newest(
            self.model.abstract_train_state(self.optimizer),
            data,
            self._saved_config,
            self.report.say,
        )
        if restored is None:
            self.report.say(f"new run in {self.directory}")
            state = self.initial_state()
        else:
            state = restored.state
            self.report.say(f"resumed {self.directory} at step {int(state.step)}")
            changed = differing_fields(restored.config, self._saved_config)
            for name, (a, b) in changed.items():
                if name.startswith(_SHAPES_TRAINING):
                    self.report.say(f"note: {name} was {a!r} when that was saved and is {b!r} now")
        if jax.process_index() == 0:
            text = json.dumps(self._saved_config, indent=2)
            (self.directory / "config.json").write_text(text + "\n")
        return state

    def _steps(
        self, state: TrainState, start: int, checkpoints: Checkpoints, data: Any, stop: StopRequest
    ) -> TrainState:
        """Steps from `start` to the end, or until asked to stop; saves at the end either way.

        Asked to stop it saves at once, without evaluation: what sent the signal may not wait long.
        A step's numbers are read one step late, while the next one runs.
        """
        config = self.config
        shardings = jax.tree.map(lambda x: x.sharding, self.model.abstract_train_state(self.optimizer))
        train_step = make_train_step(
            self.model.model,
            self.optimizer,
            self.schedule,
            shardings,
            self.model.mesh,
            self.rules,
            config.optimizer.accumulate,
            self.objective,
            config.optimizer.balance_rate,
        )
        path = self.directory / "metrics.jsonl" if self.processes.index == 0 else None
        recorder = Recorder(config, self._saved_config, self.model, self.report, path, start)
        trace = Trace(self.directory / "trace", config.log.trace_at if path else None, config.log.trace_steps)
        gate_step = make_gate_step(self.model.model, self.model.shardings, self.model.mesh, self.rules)
        gates_every = config.log.gates_every

        ok = jnp.ones((), bool)
        pending: tuple[int, StepMetrics, Batch] | None = None
        for step in range(start + 1, config.steps + 1):
            self.processes.now(f"in step {step}")
            if isinstance(data, HardBatches) and data.empty:
                recorder.note(step, data.refill(partial(self._batch_loss, state.params)))
            batch = next(data)
            placed = global_batch(batch, self.model.mesh, self.rules)
            trace.before(step)
            state, metrics = train_step(state, placed, ok)
            ok = metrics.ok
            if step == start + 1:
                recorder.throughput.restart()  # that call compiled
            if pending is not None:
                recorder.write(recorder.line(*pending, state))
            pending = (step, metrics, batch)

            stopping = stop.agreed(step)
            last = step == config.steps or stopping
            evaluate = (step % config.eval.every == 0 or last) and not stopping
            save = step % config.checkpoint.every == 0 or last
            sample = step % config.sample.every == 0 and not last
            gates = gates_every > 0 and step % gates_every == 0 and not stopping
            traced = trace.ends(step)
            if not (evaluate or save or sample or gates or traced):
                continue
            line = recorder.line(*pending, state)
            pending = None
            if traced:
                trace.close()
                self.report.say(f"trace of steps up to {step}: {self.directory / 'trace'}")
            if gates:
                found = jax.device_get(gate_step(state.params, placed))
                line |= {f"gates/{name}": x.item() for name, x in found.items()}
            if evaluate:
                line |= self.evaluate(state)
            recorder.write(line)  # before saving: a resumed run finds the lines of all steps before it
            if save:
                checkpoints.save(step, state, data, self._saved_config, line.get("eval_loss"))
            if sample and self._can_sample and not stop:
                self.report.text("sample", self._sample(state), step)
            if last:
                break
            recorder.throughput.restart()
        trace.close()
        recorder.close()
        return state

    def _batch_loss(self, params: Params, batch: Batch) -> float:
        """The objective's mean over a batch, of which this process has its rows."""
        loss, sums = self._sums_step(params, global_batch(batch, self.model.mesh, self.rules))
        return float(loss) / max(float(sums["count"]), 1.0)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """What `measure` finds, kept until the next step."""
        found = self.measure(state.params)
        self._evaluated = (int(state.step), found)
        return found

    def measure(self, params: Params) -> dict[str, float]:
        """`eval_loss`, the mean on held-out batches in nats per token, and what else is recorded."""
        return {"eval_loss": self.evaluation.loss(params)}

    def conclude(self, evaluated: dict[str, float]) -> None:
        """Says what came of it."""
        reached, baseline = (self.evaluation.units(x) for x in (evaluated["eval_loss"], self.bigram))
        self.report.say(f"eval loss {reached}, bigram baseline {baseline}")

    def _finish(self, state: TrainState, checkpoints: Checkpoints) -> None:
        """Evaluates, samples, and says what came of it and how to go on."""
        evaluated = self._evaluated
        found = evaluated[1] if evaluated and evaluated[0] == int(state.step) else self.evaluate(state)
        if self._can_sample:
            self.report.text("sample", self._sample(state), int(state.step))
        self.report.close()
        saved = checkpoints.directory / str(checkpoints.steps()[-1])
        self.conclude(found)
        if self.data.bad.count > self._told_bad:
            self.report.say(self.data.bad.summary())
        self.report.say(f"checkpoint: {saved}")
        more = max(self.config.steps, int(state.step)) * 2
        self.report.say(f"to train on, add to the same command: --steps {more}")
        self.report.say('to generate: --sample.prompt "class " --sample.tokens 400')

    def _sample(self, state: TrainState) -> str:
        model: LanguageModel = self.model.model(state.params)
        return sample_text(model, self.data.tokenizer, self.config.sample, self.config.seed)

    @property
    def _can_sample(self) -> bool:
        # Generation runs in one process; parameters spread over several are out of its reach.
        return self.config.sample.tokens > 0 and jax.process_count() == 1

    @cached_property
    def _saved_config(self) -> dict[str, Any]:
        return {
            "model": to_dict(self.model.config),
            "optimizer_state": state_layout(self.config.optimizer),
            "train": to_dict(self.config),
            "corpus": {"fingerprint": self.data.fingerprint, "tokenizer": self.data.tokenizer.fingerprint},
        }

    @cached_property
    def data_group(self) -> tuple[int, int]:
        """Which share of the rows this process reads, of how many."""
        return data_group(self.model.mesh, self.rules)

    @cached_property
    def objective(self) -> Objective:
        """What is minimised."""
        return next_token(self.config.loss.z_loss)

    @cached_property
    def _sums_step(self) -> Any:
        return make_sums_step(
            self.model.model, self.model.shardings, self.model.mesh, self.rules, self.objective
        )

    @cached_property
    def schedule(self) -> Any:
        """Step -> learning rate."""
        return make_schedule(self.config.optimizer, self.config.steps)

    @cached_property
    def optimizer(self) -> Any:
        """The Optax optimizer."""
        return make_optimizer(self.config.optimizer, self.schedule, self.model.logical_axes)

    @cached_property
    def evaluation(self) -> Evaluation:
        """Of this run's model on its held-out text."""
        return Evaluation(
            self.model,
            self.rules,
            self.data.held_out,
            seq_len=self.config.data.seq_len,
            batch_size=self.config.data.batch_size,
            max_batches=self.config.eval.batches,
        )

    @cached_property
    def bigram(self) -> float:
        """The baseline's loss on the held-out batches, nats per token."""
        return self.evaluation.bigram(self.data.train, self.data.tokenizer.vocab_size)
