"""Models in few bits: GPTQ, pruning, profiles, and the checkpoints that they make. (`dsv3_jax.compress` is the function.)"""
