"""The vLLM plugin: the only part of this project that imports vLLM's layers.

`config` decides what is served and which layer gets what; `linear` loads the shards of a layer and computes it.
"""
