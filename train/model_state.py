"""From an NNX model to plain pytrees: parameters as a nested dict, placed on a mesh, and back."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltajax.models import LanguageModel, ModelConfig, abstract_model
from train.mesh import ShardingRules
from train.optimizer import state_shardings
from train.step import Params, TrainState


@dataclass(frozen=True)
class ModelState:
    """A language model's structure, apart from its parameters' values.

    Attributes:
        config: the model's configuration.
        abstract: nested dict of `jax.ShapeDtypeStruct`s, one per parameter.
        logical_axes: the same tree of logical axis names.
        shardings: the same tree of `NamedSharding`s.
        mesh: the mesh they lie on.
    """

    config: ModelConfig
    abstract: Params
    logical_axes: Params
    shardings: Params
    mesh: Mesh
    _graph: Any
    _state: Any

    @property
    def num_parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(x.size for x in jax.tree.leaves(self.abstract))

    def init(self, seed: int) -> Params:
        """Initial parameters, made in place on the mesh."""

        def make() -> Params:
            model = LanguageModel(self.config, rngs=nnx.Rngs(seed))
            return nnx.to_pure_dict(nnx.state(model, nnx.Param))

        return jax.jit(make, out_shardings=self.shardings)()

    def model(self, params: Params) -> LanguageModel:
        """The NNX model with these parameters (shared, not copied)."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the parameters."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, self.shardings
        )

    def abstract_train_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """Shapes, dtypes and shardings of a `TrainState`: what a checkpoint is restored into."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        opt_state = jax.eval_shape(optimizer.init, self.abstract)
        opt_shardings = state_shardings(optimizer, self.abstract, self.shardings, replicated)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            TrainState(step, self.abstract, opt_state),
            TrainState(replicated, self.shardings, opt_shardings),
        )

    def init_train_state(self, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
        """Step 0, of parameters drawn from a seed."""
        return self.train_state(optimizer, self.init(seed))

    def train_state(self, optimizer: optax.GradientTransformation, params: Params) -> TrainState:
        """Step 0, of given parameters."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract_train_state(optimizer))
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
        return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state)


def model_state(config: ModelConfig, mesh: Mesh, rules: ShardingRules) -> ModelState:
    """Traces a model (no arrays are made) and places its parameters by their logical axis names.

    Raises:
        ValueError: a parameter that the rules or the mesh cannot place, or sizes of the model that the mesh
            does not divide; the message names them.
        NotImplementedError: a model with state besides its parameters.
    """
    rules.check_model(config, mesh)
    model = abstract_model(config)
    graph, state, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types the filters
    if jax.tree.leaves(rest):
        raise NotImplementedError(f"model state besides parameters: {nnx.to_pure_dict(rest)}")
    abstract = nnx.to_pure_dict(state)
    axes, shardings = {}, {}
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata().get("out_sharding") or (None,) * len(variable.shape)
        where = "parameter " + ".".join(str(part) for part in path)
        axes[path] = tuple(names)
        shardings[path] = rules.sharding(mesh, axes[path], variable.shape, where)
    return ModelState(
        config=config,
        abstract=abstract,
        logical_axes=nnx.traversals.unflatten_mapping(axes),
        shardings=nnx.traversals.unflatten_mapping(shardings),
        mesh=mesh,
        _graph=graph,
        _state=state,
    )
