"""Settings for every test, made before JAX is imported."""

import os

# Most programs here run once or twice: compiling them is the cost, so compile them quickly.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
