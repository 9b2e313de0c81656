"""Task-specialised mixed-precision deployments of a large language model.

`register` is vLLM's entry point (`vllm.general_plugins`): it is called in every vLLM process, so importing this
package and calling it must stay cheap, harmless in servers that serve something else, and safe to repeat.
"""

import os

__version__ = "0.1.0"

TESTED_VLLM = "0.31, 0.32"
"""Releases in which the plugin was tested, by their first two numbers."""


def is_tested(vllm_version: str) -> bool:
    """Whether the plugin was tested in this release of vLLM, or the environment says that it may be tried."""
    release = ".".join(vllm_version.split(".")[:2])
    return release in TESTED_VLLM.split(", ") or os.environ.get("TAQ_UNTESTED_VLLM") == "1"


def register() -> None:
    """Make `--quantization taq` known to vLLM; does nothing if it is known already.

    In a release that was not tested it says so in vLLM's log and leaves the server as it is.
    """
    import vllm
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if "taq" in QUANTIZATION_METHODS:
        return
    if not is_tested(vllm.__version__):
        from vllm.logger import init_logger

        init_logger("vllm.taq_vllm").warning_once(
            "taq-vllm %s was tested in vLLM %s, and this is %s: --quantization taq is not available. Install one of "
            "these releases, or set TAQ_UNTESTED_VLLM=1 to try it here.",
            __version__,
            TESTED_VLLM,
            vllm.__version__,
        )
        return
    from taq_vllm.plugin.deferred import DeferredTaqConfig

    register_quantization_config("taq")(DeferredTaqConfig)
