"""Delta-rule linear attention for JAX: DeltaNet, Gated DeltaNet and Kimi Delta Attention."""
