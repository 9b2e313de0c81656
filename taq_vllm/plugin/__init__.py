"""The vLLM plugin: the only part of this project that imports vLLM's layers.

`deferred` is what vLLM registers, and imports the rest when it is needed; `config` decides what is served and which
layer gets what; `linear` loads the shards of a layer and computes it.
"""
