"""Sizes and marks that callers need before a kernel runs: apart, since Mosaic is slow to import."""

MULTIPROCESSORS = 132  # of an H100, over which work is spread; fewer or more are right, too

CHUNK = 64  # tokens a chunk: one warpgroup's rows in a wgmma

# The delta rule's log decays, and what becomes of a token, second row of ``tokens``.
MIN_LOG_DECAY = -100.0
ABSENT, PRESENT, RESET = 0.0, 1.0, 2.0

# Taps of the convolution.
TAPS_ROWS = TAPS_CHANNELS = 64  # of a block
HALO = 8  # rows of tokens before and after it; at least W - 1

# Products of the experts.
EXPERT_ROWS = 128  # of a block
EXPERT_COLUMNS = 128  # of a block's result, for each warpgroup that multiplies

# Latent attention of one token.
SHARED_KEY = 64  # channels
