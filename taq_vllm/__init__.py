"""Task-specialised mixed-precision deployments of a large language model.

`register` is vLLM's entry point (`vllm.general_plugins`): it is called in every vLLM process, so importing this
package and calling it must stay cheap, harmless in servers that serve something else, and safe to repeat.
"""

__version__ = "0.1.0"
