"""`DeferredTaqConfig`: what vLLM registers, without importing any of vLLM's layers.

Every vLLM process calls the plugin, also those that load no model or another one. The configuration itself and the
layers that it extends, a thousand modules, are imported when vLLM asks for one.
"""

from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

if TYPE_CHECKING:
    from taq_vllm.plugin.config import TaqConfig


class DeferredTaqConfig(QuantizationConfig):
    """The class behind `--quantization taq`; its instances are `TaqConfig`s."""

    def __new__(cls) -> "TaqConfig":
        """The configuration of a 16-bit checkpoint, before its plan is found."""
        return _config()()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim compressed-tensors checkpoints: our own always, others if the user asks."""
        if hf_quant_cfg.get("quant_method") != "compressed-tensors":
            return None
        ours = user_quant == "taq" or (user_quant is None and "taq" in hf_quant_cfg)
        return "taq" if ours else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TaqConfig":
        """A checkpoint whose config.json describes its quantization."""
        return _config().from_config(config)

    @classmethod
    def from_config_file(cls, path: str) -> "TaqConfig":
        """A 16-bit checkpoint with a plan named in `--hf-overrides`."""
        return _config().from_config_file(path)

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the plan beside a checkpoint is found by `TaqConfig.maybe_update_config`."""
        return []


def _config() -> type["TaqConfig"]:
    from taq_vllm.plugin.config import TaqConfig

    return TaqConfig
