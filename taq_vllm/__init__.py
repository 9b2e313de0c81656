"""Task-specialised mixed-precision deployments of a large language model.

`register` is vLLM's entry point (`vllm.general_plugins`): it is called in every vLLM process, so importing this
package and calling it must stay cheap, harmless in servers that serve something else, and safe to repeat.
"""

__version__ = "0.1.0"


def register() -> None:
    """Make `--quantization taq` known to vLLM; does nothing if it is known already."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if "taq" in QUANTIZATION_METHODS:
        return
    # vLLM wants the class itself, and its parent lives among vLLM's layers: under half a second for a process that
    # loads a model, and no CUDA context.
    from taq_vllm.plugin.config import TaqConfig

    register_quantization_config("taq")(TaqConfig)
