"""compressed-tensors checkpoints and matrices written by that library itself: what the plugin is tested against."""

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM

GROUP_SIZE = 128


def scheme_of(bits, symmetric, targets=("Linear",)):
    weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=GROUP_SIZE)
    return QuantizationScheme(targets=list(targets), weights=weights, format="pack-quantized")


def compress_matrix(weight, bits, symmetric):
    """The tensors of one matrix, and the weights [N, K] that the library makes of them again."""
    scheme = scheme_of(bits, symmetric)
    groups = weight.view(weight.shape[0], -1, GROUP_SIZE)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    tensors = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    if not symmetric:
        tensors["weight_zero_point"] = zero_point.to(torch.int8)
    tensors = PackedQuantizationCompressor.compress(tensors, scheme)
    return tensors, PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]


def groups_of(bits_of):
    """Matrix name -> (bits, symmetric) as config groups."""
    targets = {}
    for name, key in bits_of.items():
        targets.setdefault(key, []).append(name)
    return {
        f"group_{index}": scheme_of(bits, symmetric, names)
        for index, ((bits, symmetric), names) in enumerate(targets.items())
    }


def config_dict(bits_of, ignore=()):
    """A checkpoint's `quantization_config`."""
    config = QuantizationConfig(config_groups=groups_of(bits_of), ignore=list(ignore), format="pack-quantized")
    return {"quant_method": "compressed-tensors", **config.model_dump(exclude=["quant_method"])}


def compress_checkpoint(source, target, bits_of):
    """Quantize a checkpoint with round-to-nearest; linear layers that are not named stay at 16 bits.

    A tied head that is named becomes a matrix of its own.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if "lm_head" in bits_of and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ignore = [name for name in linears if name not in bits_of]
    apply_quantization_config(model, QuantizationConfig(config_groups=groups_of(bits_of), ignore=ignore))
    for name, (_, symmetric) in bits_of.items():
        module = model.get_submodule(name)
        groups = module.weight.detach().view(module.weight.shape[0], -1, GROUP_SIZE)
        args = module.quantization_scheme.weights
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        module.weight_scale.data.copy_(scale)
        if not symmetric:
            module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))
    return target
