"""The head (`lm_head`, vLLM's `ParallelLMHead`): the product that turns hidden states into logits.

It is loaded, split, packed and computed as any other matrix; `linear` cuts the vocabulary as vLLM does, rows of a rank
and zero rows up to its padded size, whose logits `LogitsProcessor` cuts away. What differs is here: a head can be the
embedding itself (tied), which is only possible in 16 bits, and some of vLLM asks for `lm_head.weight`.
"""

from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from taq_vllm.plugin.linear import Checks, TaqLinearMethod


class TaqHeadMethod(TaqLinearMethod):
    """A quantized head."""

    # LoRA reads dtype and device of `weight`, and draft models that bring a head of their own compare theirs with it:
    # an empty one has the dtype and the device, and equals none.
    kept_names = ("weight", "weight_packed")

    def tie_weights(self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        """What vLLM calls where the model's config says that the embedding doubles as the head.

        Raises:
            ValueError: always; the embedding is in 16 bits.
        """
        (spec,) = self.specs
        if spec.stored:
            raise ValueError(
                f"config.json has tie_word_embeddings: true, but the checkpoint has a head of its own, {spec.name}, "
                f"with {spec.describe()}; restore the file, in which it is false, or write the checkpoint again with "
                "`taq quantize`"
            )
        raise ValueError(tied_head_error(spec.name, spec.bits))


class CheckedUnquantizedHeadMethod(Checks, UnquantizedEmbeddingMethod):
    """A head that stays at 16 bits: vLLM's own method, with the same checks as for other matrices if it is planned."""

    def tie_weights(self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        """The embedding in place of the head."""
        self.is_embedding = True
        self.missing.clear()
        return super().tie_weights(layer, embed_tokens)


def tied_head_error(name: str, bits: int) -> str:
    """Why a tied head cannot be quantized while loading, and what to do instead."""
    return (
        f"the plan gives {name} {bits} bits, but this model's embedding doubles as its head, and a head of its own "
        "cannot be made while loading. Write a checkpoint with `taq quantize` and serve that, or plan the head at 16 "
        "bits"
    )
