import os
import subprocess
import sys

# Slow to import, and no layer needs them: kernels' compilers, and what brings data and writes checkpoints.
LATE = ("jax.experimental.pallas", "jax.experimental.mosaic", "orbax", "grain", "tyro", "tokenizers")


def test_importing_layers_and_models_asks_for_no_device_and_takes_no_kernels():
    # With no such platform, any look at the devices raises.
    code = "import sys; import deltajax.ops, deltajax.layers, deltajax.models; print(*sys.modules, sep='\\n')"
    probe = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "none_such"},
        capture_output=True,
        text=True,
    )
    assert probe.returncode == 0, probe.stderr
    imported = set(probe.stdout.split())
    assert "deltajax.models" in imported
    assert imported.isdisjoint(LATE)
