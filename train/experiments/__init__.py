"""The papers' experiments, each a command: see docs/experiments.md."""
