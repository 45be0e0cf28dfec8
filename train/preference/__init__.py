"""Tuning on answers: DPO on pairs of a better and a worse one, or fine-tuning on the better one alone.

`python -m train.preference` is the command. `loss` holds the objectives, `data` the pairs, `reference` the
log-probabilities of the model that tuning starts from, `run` what makes a training run of them.
"""
