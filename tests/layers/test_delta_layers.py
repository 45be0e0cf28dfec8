"""Defaults, initial values and argument errors of the delta-rule layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltajax.layers import DeltaNet, GatedDeltaNet, KimiDeltaAttention


def shapes(layer):
    state = nnx.to_flat_state(nnx.state(layer, nnx.Param))
    return {".".join(map(str, path)): tuple(p.shape) for path, p in state}


def abstract(cls, **options):
    return nnx.eval_shape(lambda: cls(rngs=nnx.Rngs(0), **options))


def test_delta_net_defaults_are_the_reference_shapes():
    assert shapes(abstract(DeltaNet)) == {
        "q_proj.kernel": (1024, 1024),
        "k_proj.kernel": (1024, 1024),
        "v_proj.kernel": (1024, 1024),
        "b_proj.kernel": (1024, 4),
        "q_conv": (1024, 4),
        "k_conv": (1024, 4),
        "v_conv": (1024, 4),
        "o_norm.scale": (256,),
        "o_proj.kernel": (1024, 1024),
    }


def test_gated_delta_net_defaults_are_the_reference_shapes():
    assert shapes(abstract(GatedDeltaNet)) == {
        "q_proj.kernel": (2048, 1536),
        "k_proj.kernel": (2048, 1536),
        "v_proj.kernel": (2048, 3072),
        "a_proj.kernel": (2048, 6),
        "b_proj.kernel": (2048, 6),
        "q_conv": (1536, 4),
        "k_conv": (1536, 4),
        "v_conv": (3072, 4),
        "A_log": (6,),
        "dt_bias": (6,),
        "g_proj.kernel": (2048, 3072),
        "o_norm.scale": (512,),
        "o_proj.kernel": (3072, 2048),
    }


def test_kimi_delta_attention_defaults_are_the_reference_shapes():
    assert shapes(abstract(KimiDeltaAttention)) == {
        "q_proj.kernel": (2048, 2048),
        "k_proj.kernel": (2048, 2048),
        "v_proj.kernel": (2048, 2048),
        "b_proj.kernel": (2048, 16),
        "q_conv": (2048, 4),
        "k_conv": (2048, 4),
        "v_conv": (2048, 4),
        "f_a_proj.kernel": (2048, 128),
        "f_b_proj.kernel": (128, 2048),
        "A_log": (16,),
        "dt_bias": (16, 128),
        "g_a_proj.kernel": (2048, 128),
        "g_b_proj.kernel": (128, 2048),
        "g_b_proj.bias": (2048,),
        "o_norm.scale": (128,),
        "o_proj.kernel": (2048, 2048),
    }


@pytest.mark.parametrize(("cls", "low"), [(GatedDeltaNet, 0.0), (KimiDeltaAttention, 1.0)])
def test_gate_parameters_start_in_the_published_ranges_and_stay_float32(cls, low):
    layer = cls(hidden_size=8, num_heads=512, head_dim=2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer.A_log.dtype == layer.dt_bias.dtype == jnp.float32
    rate, step = jnp.exp(layer.A_log[...]), jax.nn.softplus(layer.dt_bias[...])
    assert low <= rate.min() < low + 0.5 and 15.5 < rate.max() <= 16
    assert abs(rate.mean() - (low + 16) / 2) < 1  # uniform
    assert 0.00099 < step.min() < 0.002 and 0.05 < step.max() < 0.1001
    assert abs(jnp.log(step).mean() - np.log(0.01)) < 0.2  # log-uniform


def test_kernels_and_taps_start_at_the_initializer_range_and_each_draws_its_own():
    layer = DeltaNet(hidden_size=256, num_heads=2, rngs=nnx.Rngs(0))
    for value in (layer.q_proj.kernel, layer.o_proj.kernel, layer.v_conv):
        assert abs(float(jnp.std(value[...])) - 0.02) < 0.002
    assert not jnp.array_equal(layer.q_proj.kernel[...], layer.k_proj.kernel[...])
    assert not jnp.array_equal(layer.q_conv[...], layer.k_conv[...])


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (DeltaNet, dict(hidden_size=10), r"hidden_size=10: expected a multiple of num_heads=4"),
        (DeltaNet, dict(num_heads=0), r"num_heads=0: expected a positive integer"),
        (GatedDeltaNet, dict(num_heads=0), r"num_heads=0: expected a positive integer"),
        (KimiDeltaAttention, dict(num_v_heads=0), r"num_v_heads=0: expected a positive integer"),
        (DeltaNet, dict(head_v_dim=0), r"head_v_dim=0: expected a positive integer"),
        (GatedDeltaNet, dict(head_dim=300), r"head_dim=300: expected at most 256"),
        (KimiDeltaAttention, dict(head_v_dim=600), r"head_v_dim=600: expected at most 512"),
        (
            DeltaNet,
            dict(implementation="Scan"),
            r"implementation='Scan': expected one of \('pallas', 'chunked'",
        ),
        (DeltaNet, dict(num_v_heads=6), r"num_v_heads=6: expected a multiple of num_heads=4"),
        (DeltaNet, dict(conv_size=1), r"conv_size=1: expected at least 2"),
        (GatedDeltaNet, dict(head_dim=5, expand_v=1.5), r"expand_v=1.5: expected .* to be whole"),
        (KimiDeltaAttention, dict(lower_bound=5.0), r"lower_bound=5.0: expected a negative number"),
    ],
)
def test_layers_refuse_sizes_that_do_not_fit(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(rngs=nnx.Rngs(0), **options)


def test_inputs_that_do_not_fit_are_named():
    layer = DeltaNet(hidden_size=8, num_heads=2, head_dim=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x must have 3 axes \[B, T, D\], got shape \(5, 8\)"):
        layer(jnp.ones((5, 8)))
    for shape in ((1, 5, 7), (0, 5, 8), (1, 0, 8)):
        with pytest.raises(
            ValueError, match=r"x must have shape \[B, T, D\] with D = 8 .*, got \(" + str(shape[0])
        ):
            layer(jnp.ones(shape))
