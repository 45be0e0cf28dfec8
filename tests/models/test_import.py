import os
import subprocess
import sys


def test_importing_layers_and_models_asks_for_no_device():
    # With no such platform, any look at the devices raises.
    probe = subprocess.run(
        [sys.executable, "-c", "import deltajax.layers, deltajax.models"],
        env=os.environ | {"JAX_PLATFORMS": "none_such"},
        capture_output=True,
        text=True,
    )
    assert probe.returncode == 0, probe.stderr
