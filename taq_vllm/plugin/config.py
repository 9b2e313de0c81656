"""`TaqConfig`: which weight matrix is served at which bits, from a checkpoint or from a plan.

Extends vLLM's compressed-tensors configuration and answers only for what is ours: linear layers and the head, where
matrices hold integer codes of 4 or 8 bits in groups of 128 (weight-only, "pack-quantized"), in any mix, also with
16-bit matrices inside a fused layer. Everything else goes to the parent. Three ways in:

- a checkpoint of `taq quantize`: `quantization_config` has a `taq` key and `taq_plan.json` lies beside the weights;
- a 16-bit checkpoint and a plan: weights are rounded to nearest while loading;
- any other compressed-tensors checkpoint, with `--quantization taq`.

Where there is a plan, nothing may differ from it: a matrix that no layer claims, one that was forgotten, other bits
or shapes in the checkpoint are errors. The plan's hash is put onto the model's config, where vLLM's compile-cache key
sees it, and so is a fingerprint of the kernel and its tuned tables.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from huggingface_hub import snapshot_download
from taq_kernels import ops, tuned
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.utils.config_utils import is_equal_or_regex_match
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_safetensors_params_metadata
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

from taq_vllm.checkpoint import check_tensors
from taq_vllm.model_files import ModelFiles
from taq_vllm.plan import GROUP_SIZE, PLAN_FILE, MatrixPlan, Plan
from taq_vllm.plugin.head import CheckedUnquantizedHeadMethod, TaqHeadMethod, tied_head_error
from taq_vllm.plugin.linear import SHARDED_LAYERS, CheckedUnquantizedMethod, MatrixSpec, TaqLinearMethod
from taq_vllm.units import HEAD, experts_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.model_executor.models.utils import WeightsMapper

# Below "vllm", because vLLM shows only the loggers of its own tree.
logger = init_logger(f"vllm.{__name__}")

PLAN_VARIABLE = "TAQ_PLAN"
_OVERRIDE = "quantization_config_file"  # vLLM's own key for a quantization file in --hf-overrides


class TaqConfig(CompressedTensorsConfig):
    """vLLM's view of a plan. Built in the main process and pickled to the workers.

    Attributes:
        plan: what each matrix gets; None for a checkpoint that carries no plan.
        rounds_while_loading: the checkpoint is in 16 bits and the plan says what becomes of it.
        rounding_dtype: 16-bit dtype that weights have when they are rounded while loading, whatever the engine's.
    """

    def __init__(
        self,
        target_scheme_map: dict[str, Any] | None = None,
        ignore: list[str] | None = None,
        quant_format: str = CompressionFormat.pack_quantized.value,
        kv_cache_scheme: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        transform_config: dict[str, Any] | None = None,
        total_num_heads: int | None = None,
        total_num_kv_heads: int | None = None,
    ) -> None:
        super().__init__(
            target_scheme_map or {},
            ignore or [],
            quant_format,
            kv_cache_scheme,
            config,
            transform_config,
            total_num_heads,
            total_num_kv_heads,
        )
        self.rounds_while_loading = config is None
        self.rounding_dtype = torch.bfloat16
        self.plan: Plan | None = None
        self._planned: dict[str, tuple[str, MatrixPlan]] = {}
        """By vLLM's name: Hugging Face's name and what the plan says."""
        self._named_plan: str | None = None
        self._stores_packed_head = False
        self._claimed: set[str] = set()
        self._open_layers = 0
        self._matrices: Counter[int] = Counter()
        self._experts: Counter[int] = Counter()
        """Blocks by the bits of their experts."""
        self._resident_bytes = 0

    # What vLLM asks to find the configuration.

    def get_name(self) -> str:
        """The name behind `--quantization`."""
        return "taq"

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that the kernels run on, as 80 for 8.0."""
        return ops.MIN_CAPABILITY

    @classmethod
    def from_config_file(cls, path: str) -> "TaqConfig":
        """A 16-bit checkpoint with a plan named in `--hf-overrides`."""
        config = cls()
        config._named_plan = str(path)
        return config

    def maybe_update_config(
        self, model_name: str, hf_config: "PreTrainedConfig | None" = None, revision: str | None = None
    ) -> None:
        """Find the plan, check that it belongs to this checkpoint, and make vLLM's cache key depend on it and on what
        decides how kernels are launched.

        Raises:
            ValueError: no plan for a 16-bit checkpoint, a plan beside a checkpoint that is already quantized, a plan
                for another model or with bits that are not served, or one that is not what the checkpoint was made
                with.
        """
        if hf_config is not None:
            hf_config.taq_kernels = tuned.fingerprint()  # compiled graphs hold the kernel's launches
        named = self._named_plan or getattr(hf_config, _OVERRIDE, None) or os.environ.get(PLAN_VARIABLE)
        if self.rounds_while_loading:
            plan = self._plan_for_16_bits(model_name, named, revision)
        else:
            plan = self._plan_of_checkpoint(model_name, named, revision)
        if plan is None:
            return
        plan.check_served(named or f"{model_name}/{PLAN_FILE}")
        self.plan = plan
        self._planned = {name: (name, matrix) for name, matrix in plan.matrices.items()}
        if hf_config is not None:
            hf_config.taq_plan_sha256 = plan.sha256()
            if getattr(hf_config, "dtype", None) == torch.float16:
                self.rounding_dtype = torch.float16  # as in `taq quantize`: fp32 models become bf16

    def _plan_for_16_bits(self, model_name: str, named: str | None, revision: str | None) -> Plan:
        where = named or f"{model_name}/{PLAN_FILE}"
        plan = Plan.load(named) if named else _plan_beside(model_name, revision)
        if plan is None:
            raise ValueError(
                f"--quantization taq: {model_name} is not quantized, and there is no plan for it. Give one of:\n"
                f"  {PLAN_FILE} beside its weights\n"
                f'  --hf-overrides \'{{"{_OVERRIDE}": "/path/to/plan.json"}}\'\n'
                f"  {PLAN_VARIABLE}=/path/to/plan.json in the environment\n"
                "  or, instead of this model, a checkpoint that `taq quantize` wrote from it.\n"
                "A plan is made with `taq score` and `taq plan`."
            )
        _check_fits(plan, where, model_name, revision)
        head = plan.matrices.get(HEAD)
        if head is not None and head.tied and head.bits < 16:
            raise ValueError(f"{where}: {tied_head_error(HEAD, head.bits)}")
        for name, matrix in plan.matrices.items():
            if experts_of(name) and matrix.bits < 16:
                raise ValueError(
                    f"{where} gives {experts_of(name)} {matrix.bits} bits, but experts are not rounded while loading. "
                    "Write a checkpoint with `taq quantize` and serve that, or plan 16 bits for the experts: "
                    "--pin 're:.*experts.*=16'"
                )
        return plan

    def _plan_of_checkpoint(self, model_name: str, named: str | None, revision: str | None) -> Plan | None:
        if named:
            raise ValueError(
                f"got the plan {named} for {model_name}, which is already quantized and cannot follow another plan; "
                f"unset {PLAN_VARIABLE} and remove {_OVERRIDE} from --hf-overrides, or serve the 16-bit model"
            )
        summary = self.config.get("taq")
        plan = _plan_beside(model_name, revision)
        if summary is None:
            if "Linear" in self.target_scheme_map:
                names = get_safetensors_params_metadata(model_name, revision=revision)
                self._stores_packed_head = any(name.endswith(f"{HEAD}.weight_packed") for name in names)
            return plan
        if plan is None:
            raise ValueError(
                f"{model_name} was written by `taq quantize` but its {PLAN_FILE} is missing, without which its load "
                "cannot be checked; restore the file, or write the checkpoint again"
            )
        if summary.get("plan_sha256") != plan.sha256():
            raise ValueError(
                f"{model_name}/{PLAN_FILE} is not the plan that the checkpoint was made with (sha256 "
                f"{plan.sha256()[:12]}, config.json says {str(summary.get('plan_sha256'))[:12]}); restore the file, "
                "or write the checkpoint again with `taq quantize`"
            )
        if any(Path(model_name).glob("*.safetensors")):
            files = ModelFiles(model_name)  # a file that is missing or cut short is named here, before anything starts
            if any(map(experts_of, plan.matrices)):
                # Other matrices are checked when they are loaded; vLLM would not notice an expert that is missing.
                check_tensors(files, plan)
        return plan

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename targets and planned matrices to vLLM's module names."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self._planned = hf_to_vllm_mapper.apply_dict(self._planned)

    # What a layer gets.

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer: ours for what this project answers for, else the parent's.

        Raises:
            ValueError: plan, checkpoint and layer do not agree.
        """
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, LinearBase | ParallelLMHead):
            specs = self._specs(layer, prefix)
            if specs is not None:
                quantized = any(spec.bits < 16 for spec in specs)
                planned = [spec.name for spec in specs if spec.shape is not None]
                self._claimed.update(planned)
                self._open_layers += bool(quantized or planned)
                if isinstance(layer, ParallelLMHead):
                    return (TaqHeadMethod if quantized else CheckedUnquantizedHeadMethod)(self, specs)
                return (TaqLinearMethod if quantized else CheckedUnquantizedMethod)(self, specs)
        return super().get_quant_method(layer, prefix)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """The parent's method, vLLM's own kernels, for the experts of a block, which all have one bitwidth."""
        planned = [entry for name, entry in self._planned.items() if name.startswith(f"{prefix}.")]
        bits = {matrix.bits for _, matrix in planned}
        try:
            method = super().get_quant_method(layer, prefix)
        except NotImplementedError as error:  # vLLM's word for having no kernel
            if not bits:  # another tool's checkpoint, of which only vLLM knows the format
                raise
            on_cpu = " On a CPU it needs AMX instructions, and 4 bits without zero points (--symmetric 4)."
            raise ValueError(
                f"{prefix}: vLLM has no kernel on this device for experts of {', '.join(map(str, sorted(bits)))} bits "
                f"({error}).{on_cpu if current_platform.is_cpu() else ''} Serve on another device, or plan 16 bits for "
                "the experts: --pin 're:.*experts.*=16'"
            ) from error
        self._claimed.update(name for name, _ in planned)
        self._experts.update(bits)
        return method

    def _specs(self, layer: LinearBase | ParallelLMHead, prefix: str) -> list[MatrixSpec] | None:
        """What each matrix of the layer is, in the order of the layer's shards; None if the parent answers."""
        fused = prefix.rpartition(".")[2]
        parts = self.packed_modules_mapping.get(fused, [fused])
        names = [prefix.removesuffix(fused) + part for part in parts]
        if type(layer) not in SHARDED_LAYERS or self.transform_config is not None:
            planned = [name for name in names if name in self._planned]
            if planned:
                raise ValueError(
                    f"the plan names {planned[0]}, a {type(layer).__name__} that this plugin does not know how to "
                    f"split; plan 16 bits for no such layer: supported are "
                    f"{', '.join(sorted(kind.__name__ for kind in SHARDED_LAYERS))}"
                )
            return None
        if self.rounds_while_loading:
            return [self._planned_spec(name) for name in names]
        specs = [self._stored_spec(layer, prefix, name) for name in names]
        if self.plan is not None:
            for name, spec in zip(names, specs, strict=True):
                self._check_against_plan(name, spec)
            specs = [
                spec and MatrixSpec(spec.name, spec.bits, spec.symmetric, self._planned_spec(name).shape, stored=True)
                for name, spec in zip(names, specs, strict=True)
            ]
        elif all(spec is None or spec.bits == 16 for spec in specs):
            return None
        return None if None in specs else specs

    def _planned_spec(self, name: str) -> MatrixSpec:
        """What the plan says of a matrix; 16 bits for one outside the plan."""
        if name in self._planned:
            original, matrix = self._planned[name]
            return MatrixSpec(
                original, matrix.bits, matrix.symmetric, matrix.shape, stored=False, rounding_dtype=self.rounding_dtype
            )
        kind = _kind(name)
        relatives = [other for other in self._planned if _kind(other) == kind]
        if relatives:
            raise ValueError(
                f"the plan does not name {name}, but it names {relatives[0]}; a plan names every matrix of a kind, "
                "with 16 bits for those that stay as they are. Make one with `taq plan`."
            )
        return MatrixSpec(name, 16, True, None, stored=False)

    def _stored_spec(self, layer: LinearBase | ParallelLMHead, prefix: str, name: str) -> MatrixSpec | None:
        """What `config_groups` and `ignore` say of a matrix; None if it is a scheme of the parent's."""
        original = self._planned[name][0] if name in self._planned else name
        is_ignored = any(entry == prefix or is_equal_or_regex_match(name, entry) for entry in self.ignore)
        scheme = None if is_ignored else self._scheme_of(layer, prefix, name)
        if scheme is None:
            return MatrixSpec(original, 16, True, None, stored=True)
        weights: QuantizationArgs = scheme["weights"]
        ours = (
            weights is not None
            and weights.type == QuantizationType.INT
            and weights.num_bits in (4, 8)
            and weights.strategy == QuantizationStrategy.GROUP
            and weights.group_size == GROUP_SIZE
            and not weights.dynamic
            and scheme.get("input_activations") is None
            and scheme.get("output_activations") is None
            and (scheme.get("format") or self.quant_format) == CompressionFormat.pack_quantized.value
        )
        return MatrixSpec(original, weights.num_bits, weights.symmetric, None, stored=True) if ours else None

    def _scheme_of(self, layer: LinearBase | ParallelLMHead, prefix: str, name: str) -> dict[str, Any] | None:
        """The scheme of the most specific target, ranked as in compressed-tensors: name, expression, class.

        Expressions were written for the names on disk: `.*v_proj` is not meant for `qkv_proj`, so the fused layer's
        name counts only where it is spelled out.
        """
        schemes = self.target_scheme_map
        # compressed-tensors sorts expressions, whatever their order in the file.
        expressions = sorted(target for target in schemes if target.startswith("re:"))
        # As in the parent, a target such as "Linear" stands for every layer with that in its class's name.
        kind = type(layer).__name__.lower()
        if isinstance(layer, ParallelLMHead) and self._stores_packed_head:
            kind = "linear"  # to the tool that wrote it; a 16-bit head that `ignore` forgets is not meant by "Linear"
        ranked = [
            name,
            *(target for target in expressions if is_equal_or_regex_match(name, target)),
            prefix,
            *(target for target in schemes if target.lower() in kind),
        ]
        return next((schemes[target] for target in ranked if target in schemes), None)

    def _check_against_plan(self, name: str, stored: MatrixSpec | None) -> None:
        planned = self._planned_spec(name)
        if stored is None and planned.shape is None:
            return
        got = "a scheme that is not 4- or 8-bit weight-only in groups of 128" if stored is None else stored.describe()
        if got != planned.describe():
            raise ValueError(
                f"{planned.name}: config.json says {got}, {PLAN_FILE} says {planned.describe()}; the two must be of "
                "one checkpoint. Restore both files, or write the checkpoint again with `taq quantize`."
            )

    # What the layers report while loading; one copy of this object per worker.

    def check_all_claimed(self) -> None:
        """Check that every planned matrix is in a layer that was built.

        Raises:
            ValueError: one is not.
        """
        unclaimed = [name for name, _ in self._planned.values() if name not in self._claimed]
        if get_pp_group().world_size > 1:
            # Blocks without any claimed matrix are on other ranks; the head, outside of blocks, is on the last.
            here = {_block(name) for name in self._claimed}
            if get_pp_group().is_last_rank:
                here.add("")
            unclaimed = [name for name in unclaimed if _block(name) in here]
        if unclaimed:
            raise ValueError(
                f"the plan names {len(unclaimed)} matrices that no layer of this model has claimed: "
                f"{', '.join(unclaimed[:3])}{' ...' if len(unclaimed) > 3 else ''}. Is it a plan for another model? "
                "Make a plan for this model with `taq plan`."
            )

    def layer_loaded(self, specs: list[MatrixSpec], resident_bytes: int, device: torch.device) -> None:
        """Count a layer that is complete; the last one logs the summary."""
        self._matrices.update(spec.bits for spec in specs)
        self._resident_bytes += resident_bytes
        self._open_layers -= 1
        if self._open_layers == 0:
            counts = ", ".join(f"{self._matrices[bits]} at {bits} bits" for bits in (4, 8, 16))
            experts = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(self._experts.items()))
            logger.info(
                "taq: %d matrices: %s; %.1f MB resident; kernel %s%s",
                self._matrices.total(),
                counts,
                self._resident_bytes / 1e6,
                ops.kernel_name(device),
                f"; vLLM's own for the experts of blocks: {experts}" if experts else "",
            )


def _plan_beside(model_name: str, revision: str | None) -> Plan | None:
    content = get_hf_file_bytes(PLAN_FILE, model_name, revision)
    return None if content is None else Plan.from_json(content.decode(), where=f"{model_name}/{PLAN_FILE}")


def _check_fits(plan: Plan, where: str, model_name: str, revision: str | None) -> None:
    """Check that a plan is for this model, if the model's files are on this machine; else say what was not checked.

    Raises:
        ValueError: the plan is for another model, or the model's folder is damaged.
    """
    folder = Path(model_name)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(model_name, revision=revision, local_files_only=True))
        files = ModelFiles(folder)
    except (OSError, ValueError) as error:
        if any(Path(model_name).glob("*.safetensors")):
            raise
        logger.warning(
            "taq: the weights of %s cannot be read yet (%s), so they were not compared with the fingerprint in %s: "
            "a plan for another fine-tune with the same shapes goes unnoticed. Started again after the download, this "
            "is checked.",
            model_name,
            str(error).splitlines()[0],
            where,
        )
        return
    plan.check_fits(files.ref.model_copy(update={"id": model_name}), files.matrices, files.head, where)


def _kind(name: str) -> str:
    """A matrix's name without its layer: what its relatives in other layers share."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _block(name: str) -> str:
    """The transformer block that a matrix belongs to; empty outside of blocks."""
    match = re.match(r".*?\.\d+\.", name)
    return match.group() if match else ""
