"""The delta-rule operations: one recurrence, three gate kinds, several implementations.

Per head, with a state ``S`` in R^{K x V}, log decay ``g <= 0`` and write strength ``beta``::

    S~_t = Diag(exp(g_t)) S_{t-1}            g_t absent | a scalar | a vector in R^K
    u_t  = beta_t (v_t - S~_t^T k_t)
    S_t  = S~_t + k_t u_t^T
    o_t  = scale * S_t^T q_t

``implementation="scan"`` is this loop as written and the definition of every other form.
"""

from deltajax.ops.api import delta_rule, gated_delta_rule, kimi_delta_attention
from deltajax.ops.convolution import short_convolution
from deltajax.ops.gates import Gate
from deltajax.ops.step import delta_rule_step

__all__ = [
    "Gate",
    "delta_rule",
    "delta_rule_step",
    "gated_delta_rule",
    "kimi_delta_attention",
    "short_convolution",
]
