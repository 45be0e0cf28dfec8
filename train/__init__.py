"""Training of delta-rule language models: `python -m train`."""
