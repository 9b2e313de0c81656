"""Writes compressed-tensors checkpoints of a local model with llm-compressor: input that this project did not make.

    make peers-llmcompressor
    .venv-llmcompressor/bin/python benchmarks/peers/make_llmcompressor_checkpoints.py MODEL OUT_DIR [--only NAME ...]

Each is data-free round to nearest (`QuantizationModifier`) of every linear but lm_head, group 128, pack-quantized:
w4a16 and w8a16 (symmetric), w4a16-asym (packed zero points), mix (bits differ between layers and modules, alike
inside q/k/v and gate/up) and mix-fused (bits differ inside q/k/v and gate/up, with one v at 16 bits), which stock
vLLM refuses. A folder appears under its name only when it is whole; one that is there is left as it is.
"""

import argparse
import shutil
import sys
from pathlib import Path

GROUP_SIZE = 128
NAMES = ("w4a16", "w8a16", "w4a16-asym", "mix", "mix-fused")


def recipe_of(name: str, layers: int) -> tuple[dict[str, dict], list[str]]:
    """The config groups and the ignored modules of one checkpoint, for a model of `layers` blocks."""
    ignore = ["lm_head"]
    if name == "w4a16":
        return {"group_0": _group(4, ["Linear"])}, ignore
    if name == "w8a16":
        return {"group_0": _group(8, ["Linear"])}, ignore
    if name == "w4a16-asym":
        return {"group_0": _group(4, ["Linear"], symmetric=False)}, ignore
    if name == "mix":
        # The first quarter of the layers at 8 bits, and every down_proj.
        first = "|".join(str(i) for i in range(max(1, layers // 4)))
        rest = "|".join(str(i) for i in range(max(1, layers // 4), layers))
        high = [rf"re:.*\.layers\.({first})\..*_proj$", rf"re:.*\.layers\.({rest})\.mlp\.down_proj$"]
        low = [rf"re:.*\.layers\.({rest})\.(self_attn\.[qkvo]|mlp\.(gate|up))_proj$"]
        return {"group_0": _group(4, low), "group_1": _group(8, high)}, ignore
    if name == "mix-fused":
        low, high = [r"re:.*\.(q|o|gate)_proj$"], [r"re:.*\.(k|v|up|down)_proj$"]
        return {"group_0": _group(4, low), "group_1": _group(8, high)}, [*ignore, "model.layers.0.self_attn.v_proj"]
    raise ValueError(f"checkpoint name: got {name!r}, allowed {', '.join(NAMES)}")


def write_checkpoint(model_dir: Path, out: Path, name: str) -> None:
    """Quantizes the model at `model_dir` as `recipe_of` says and saves it to `out`, with its tokenizer."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    groups, ignore = recipe_of(name, model.config.num_hidden_layers)
    oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=ignore), pipeline="datafree")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, save_compressed=True)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(partial)
    partial.rename(out)


def _group(bits: int, targets: list[str], *, symmetric: bool = True) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP_SIZE}
    return {"targets": targets, "weights": weights}


def main() -> int:
    """Reads the arguments and writes what is missing; 2 if MODEL is no model folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a local 16-bit model")
    parser.add_argument("out_dir", type=Path, help="folder that gets one folder per checkpoint")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="some of the checkpoints")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        print(f"MODEL: no config.json in {options.model}; give the folder of a local model", file=sys.stderr)
        return 2
    options.out_dir.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        out = options.out_dir / name
        if out.exists():
            print(f"{out} is there, left as it is")
            continue
        write_checkpoint(options.model, out, name)
        print(f"{out}: {sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
