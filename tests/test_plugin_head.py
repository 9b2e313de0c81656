"""The head, layer by layer: vLLM's own `ParallelLMHead` with the dequantized weights is the measure."""

import math
from types import SimpleNamespace

import pytest
import torch
from compressed import compress_matrix, config_dict, scheme_of
from safetensors.torch import save_file
from test_plugin_linear import load_as_on_a_gpu
from vllm.config import LoRAConfig
from vllm.lora.utils import from_layer_logits_processor
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from taq_vllm.checkpoint import pack
from taq_vllm.plan import MatrixPlan, resident_bytes
from taq_vllm.plugin import config as plugin_config
from taq_vllm.plugin.config import TaqConfig
from taq_vllm.plugin.head import CheckedUnquantizedHeadMethod, TaqHeadMethod
from taq_vllm.quantizer import quantize

pytestmark = pytest.mark.usefixtures("vllm_world")

HEAD = "lm_head"
COLUMNS = 256

# As in test_plugin_linear: the result is rounded to bf16 once, and so are the weights that it is compared with.
LOGITS_ERROR = math.sqrt(2) * 2**-9


@pytest.fixture
def as_rank(monkeypatch):
    """Heads built afterwards take themselves for this rank of so many."""

    def become(rank, size):
        monkeypatch.setattr(vocab_parallel_embedding, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vocab_parallel_embedding, "get_tensor_model_parallel_world_size", lambda: size)

    return become


def stored(vocabulary, bits=8, symmetric=True, columns=COLUMNS):
    """The head's tensors as compressed-tensors writes them, and the weights that it makes of them again."""
    weight = torch.randn(vocabulary, columns, generator=torch.Generator().manual_seed(vocabulary)).bfloat16()
    return compress_matrix(weight, bits, symmetric)


def config_of(bits=8, symmetric=True, target=HEAD, ignore=()):
    return TaqConfig.from_config(config_dict({target: (bits, symmetric)}, ignore))


def planned(bits, shape, tied=False, symmetric=True, config=None):
    """A configuration that rounds while loading, or another one, with a plan for the head."""
    config = config or TaqConfig()
    entry = MatrixPlan(bits=bits, symmetric=symmetric, shape=shape, why="pinned", tied=tied)
    config._planned = {HEAD: (HEAD, entry)}
    config.plan = SimpleNamespace(matrices={HEAD: entry})
    return config


def build(config, vocabulary, columns=COLUMNS, **kwargs):
    return ParallelLMHead(vocabulary, columns, params_dtype=torch.bfloat16, quant_config=config, prefix=HEAD, **kwargs)


def load(head, tensors):
    """Hand the head its tensors as vLLM's loader does."""
    for kind, tensor in tensors.items():
        param = getattr(head, kind)
        param.weight_loader(param, tensor)
    head.quant_method.process_weights_after_loading(head)
    return head


def logits_of(head, x, bias=None):
    """On this rank, padded rows included."""
    return head.quant_method.apply(head, x, bias)


def activations(tokens, columns=COLUMNS):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(5)).bfloat16()


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


# Multiples of 64 and of 128 or not, as real vocabularies are (151936, 128256, 50257, 32001).
@pytest.mark.parametrize("vocabulary", [384, 448, 321, 250])
@pytest.mark.parametrize("key", [(4, False), (4, True), (8, True), (8, False)])
def test_logits_are_those_of_the_dequantized_weights_whatever_the_vocabulary(vocabulary, key):
    tensors, weight = stored(vocabulary, *key)
    head = load(build(config_of(*key), vocabulary), tensors)
    for tokens in (1, 40):
        x = activations(tokens)
        logits = LogitsProcessor(vocabulary)(head, x)
        assert (logits.dtype, logits.shape) == (torch.bfloat16, (tokens, vocabulary))
        assert error(logits, x.double() @ weight.double().t()) < LOGITS_ERROR


@pytest.mark.parametrize(("vocabulary", "size"), [(321, 2), (448, 2), (250, 4), (10, 4)])
@pytest.mark.parametrize("added", [0, 9])
def test_every_rank_has_the_rows_that_vllm_gives_it(as_rank, vocabulary, size, added):
    tensors, weight = stored(vocabulary, 4, symmetric=False)
    x = activations(3)
    parts = []
    for rank in range(size):
        as_rank(rank, size)
        sizes = {"num_embeddings": vocabulary + added, "org_num_embeddings": vocabulary}
        ours = ParallelLMHead(
            **sizes, embedding_dim=COLUMNS, params_dtype=torch.bfloat16, quant_config=config_of(4, False), prefix=HEAD
        )
        theirs = ParallelLMHead(**sizes, embedding_dim=COLUMNS, params_dtype=torch.bfloat16)
        load(ours, tensors)
        theirs.weight.weight_loader(theirs.weight, weight)
        expected = x.double() @ theirs.weight.double().t()
        got = logits_of(ours, x)
        assert got.shape == expected.shape
        # Rows that vLLM pads are exactly zero, on ranks that have nothing else too.
        assert torch.equal(got == 0, expected == 0)
        if expected.any():
            assert error(got, expected) < LOGITS_ERROR
        parts.append(got)
    logits = torch.cat(parts, dim=1)[:, ours.get_sharded_to_full_mapping()][:, :vocabulary]
    assert error(logits, x.double() @ weight.double().t()) < LOGITS_ERROR


def test_top_token_without_gathering_is_never_padding():
    """`get_top_tokens` masks what it takes for padding: as many last columns as vLLM padded."""
    weight = torch.rand(250, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()
    tensors, weight = compress_matrix(weight, 8, True)
    head = load(build(config_of(), 250), tensors)
    x = -activations(5).abs()  # every real logit is negative, below those of padding
    tokens = LogitsProcessor(250).get_top_tokens(head, x)
    assert torch.equal(tokens, (x.float() @ weight.float().t()).argmax(-1))


@pytest.mark.parametrize("tokens", [3, 300])
def test_a_gpu_computes_a_padded_head_in_ragged_tiles(interpreted, monkeypatch, tokens):
    """Loaded on a CPU by the code that loads on a GPU, computed in Triton's interpreter."""

    load_as_on_a_gpu(interpreted, monkeypatch)
    tensors, weight = stored(150)
    head = load(build(config_of(), 150), tensors)
    calls = []
    monkeypatch.setattr(torch.ops.taq, "linear", lambda *operands: calls.append(operands) or operands[0])
    x = activations(tokens)
    logits_of(head, x)
    ((*operands, bias),) = calls
    assert bias is None
    logits = interpreted.linear(*operands)
    assert logits.shape == (tokens, 192)
    assert not logits[:, 150:].any()
    # The interpreter cuts bf16 results off instead of rounding them, which doubles that error.
    assert error(logits[:, :150], x.double() @ weight.double().t()) < 2 * LOGITS_ERROR


def test_bias_is_padded_and_added():
    tensors, weight = stored(250)
    head = build(config_of(), 250, bias=True)
    bias = torch.randn(250, generator=torch.Generator().manual_seed(3)).bfloat16()
    head.bias.weight_loader(head.bias, bias)
    load(head, tensors)
    x = activations(4)
    expected = x.double() @ weight.double().t() + bias.double()
    assert error(LogitsProcessor(250)(head, x, head.bias), expected) < LOGITS_ERROR


@pytest.mark.parametrize("key", [(4, False), (8, True)])
def test_head_is_rounded_while_loading_as_it_is_offline(key):
    weight = torch.randn(321, COLUMNS, generator=torch.Generator().manual_seed(8)).bfloat16()
    online = load(build(planned(key[0], (321, COLUMNS), symmetric=key[1]), 321), {"weight": weight})
    packed = {kind.removeprefix(f"{HEAD}."): tensor for kind, tensor in pack(HEAD, quantize(weight, *key)).items()}
    offline = load(build(config_of(*key), 321), packed)
    buffers = dict(online.named_buffers())
    assert buffers.keys() == dict(offline.named_buffers()).keys()
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in offline.named_buffers())


def test_resident_bytes_are_what_the_plan_says(monkeypatch):
    lines = []
    monkeypatch.setattr(plugin_config.logger, "info", lambda message, *values: lines.append(message % values))
    tensors, _ = stored(4096, 4, symmetric=False)
    head = load(build(config_of(4, False), 4096), tensors)
    planned_bytes = resident_bytes(4, (4096, COLUMNS), symmetric=False)
    assert sum(buffer.nbytes for buffer in head.buffers()) == planned_bytes
    assert not any(parameter.numel() for parameter in head.parameters())
    (line,) = lines
    assert f"1 matrices: 1 at 4 bits, 0 at 8 bits, 0 at 16 bits; {planned_bytes / 1e6:.1f} MB resident" in line


def test_dummy_weights_have_the_padded_size():
    head = build(config_of(), 250)
    head.quant_method.is_dummy = True
    load(head, {})
    assert logits_of(head, activations(2)).shape == (2, 256)


# What vLLM reads of a head beside its product.


def test_lora_learns_dtype_and_device_of_the_head():
    head = load(build(config_of(), 320), stored(320)[0])
    wrapped = from_layer_logits_processor(LogitsProcessor(320), head, 1, LoRAConfig(lora_dtype=torch.bfloat16))
    assert (wrapped.dtype, wrapped.device) == (torch.bfloat16, torch.device("cpu"))


def test_draft_models_own_head_is_not_taken_for_the_quantized_one():
    """vLLM compares the two heads' `weight` to share one of them."""
    head = load(build(config_of(), 320), stored(320)[0])
    draft = ParallelLMHead(320, COLUMNS, params_dtype=torch.bfloat16)
    assert not torch.equal(draft.weight, head.weight)


# Checks while loading.


def give(head, kind, tensor):
    getattr(head, kind).weight_loader(getattr(head, kind), tensor)


def test_what_does_not_fit_is_refused_and_names_the_head():
    head = build(config_of(4, False), 250)
    tensors, weight = stored(250, 4, symmetric=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight_packed: got torch.int32 of shape \[256, 32\].*\[250, 32\]"):
        give(head, "weight_packed", torch.zeros(256, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"lm_head\.weight_packed: got torch.int64 .* need torch.int32"):
        give(head, "weight_packed", tensors["weight_packed"].long())
    with pytest.raises(ValueError, match=r"lm_head\.weight_shape: got \[256, 256\], the model needs \[250, 256\]"):
        give(head, "weight_shape", torch.tensor([256, 256]))
    with pytest.raises(ValueError, match="lm_head: got a tensor 'weight', but 4 bits asymmetric"):
        give(head, "weight", weight)


@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"])
def test_head_that_did_not_arrive_whole_is_an_error(missing):
    tensors, _ = stored(250, 4, symmetric=False)
    del tensors[missing]
    with pytest.raises(ValueError, match=f"lm_head: the checkpoint has no {missing}"):
        load(build(config_of(4, False), 250), tensors)


def test_other_vocabulary_than_planned_is_an_error():
    with pytest.raises(ValueError, match=r"lm_head is \[250, 256\] in this model and \[256, 256\] in the plan"):
        build(planned(8, (256, COLUMNS)), 250)


def test_in_features_that_are_not_whole_groups_are_refused():
    with pytest.raises(ValueError, match="lm_head has 192 in-features, which 128 does not divide"):
        build(config_of(), 250, columns=192)


# 16 bits in the plan.


def test_planned_head_of_16_bits_is_vllms_own_with_checks():
    config = planned(16, (250, COLUMNS))
    head = build(config, 250)
    assert type(head.quant_method) is CheckedUnquantizedHeadMethod
    with pytest.raises(ValueError, match="lm_head: got a tensor 'weight_packed', but 16 bits"):
        give(head, "weight_packed", torch.zeros(250, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"lm_head\.weight: got .* \[256, 256\], 16 bits .* \[250, 256\]"):
        give(head, "weight", torch.zeros(256, COLUMNS).bfloat16())
    weight = torch.randn(250, COLUMNS).bfloat16()
    load(head, {"weight": weight})
    x = activations(3)
    assert error(LogitsProcessor(250)(head, x), x.double() @ weight.double().t()) < LOGITS_ERROR
    config.check_all_claimed()


def test_planned_16_bit_head_that_does_not_arrive_is_an_error():
    with pytest.raises(ValueError, match="lm_head: the checkpoint has no weight"):
        load(build(planned(16, (250, COLUMNS)), 250), {})


def test_head_outside_the_plan_stays_as_it_is():
    config = planned(8, (250, COLUMNS))
    config._planned = {}
    method = build(config, 250).quant_method
    assert isinstance(method, UnquantizedEmbeddingMethod)
    assert not method.is_planned


# Tied: the embedding doubles as the head.


@pytest.mark.parametrize("is_stored", [False, True])
def test_tied_head_of_16_bits_is_the_embedding_and_holds_nothing(monkeypatch, is_stored):
    config = config_of(4, True, target="model.layers.0.fc", ignore=[HEAD]) if is_stored else None
    lines = []
    monkeypatch.setattr(plugin_config.logger, "info", lambda message, *values: lines.append(message % values))
    embedding = VocabParallelEmbedding(320, COLUMNS, params_dtype=torch.bfloat16)
    head = build(planned(16, (320, COLUMNS), tied=True, config=config), 320)
    assert head.tie_weights(embedding) is head
    load(head, {})
    assert head.weight is embedding.weight
    (line,) = lines
    assert "1 matrices: 0 at 4 bits, 0 at 8 bits, 1 at 16 bits; 0.0 MB resident" in line


def test_tied_head_cannot_be_rounded_while_loading():
    embedding = VocabParallelEmbedding(320, COLUMNS, params_dtype=torch.bfloat16)
    head = build(planned(8, (320, COLUMNS)), 320)
    with pytest.raises(ValueError, match=r"plan gives lm_head 8 bits.* doubles as its head.*`taq quantize`"):
        head.tie_weights(embedding)


def test_stored_head_of_a_config_that_ties_it_is_an_error():
    embedding = VocabParallelEmbedding(320, COLUMNS, params_dtype=torch.bfloat16)
    head = build(config_of(4, False), 320)
    with pytest.raises(ValueError, match=r"tie_word_embeddings: true, .* lm_head, with 4 bits asymmetric"):
        head.tie_weights(embedding)


# Which method the head gets.


def method_of(config):
    return type(build(config, 320).quant_method)


def test_head_is_a_target_by_name_and_by_expression():
    assert method_of(config_of(4, False)) is TaqHeadMethod
    assert method_of(config_of(8, True, target="re:.*lm_head")) is TaqHeadMethod
    assert method_of(config_of(8, True, target="re:.*layers.*")) is UnquantizedEmbeddingMethod


@pytest.mark.parametrize("entry", [HEAD, "re:.*lm_head"])
def test_head_in_ignore_is_vllms(entry):
    config = config_of(8, True, target="Linear", ignore=[entry])
    config._stores_packed_head = True
    assert method_of(config) is UnquantizedEmbeddingMethod


@pytest.mark.parametrize(("kind", "method"), [("weight_packed", TaqHeadMethod), ("weight", UnquantizedEmbeddingMethod)])
def test_class_linear_is_a_target_for_the_head_where_the_checkpoint_holds_it_packed(tmp_path, kind, method):
    save_file({f"{HEAD}.{kind}": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = config_of(8, True, target="Linear")
    config.maybe_update_config(str(tmp_path))
    assert method_of(config) is method


def test_other_schemes_of_a_head_go_to_the_parent():
    record = config_dict({HEAD: (4, True)})
    record["config_groups"]["group_0"] = scheme_of(4, True, [HEAD]).model_dump()
    record["config_groups"]["group_0"]["weights"]["group_size"] = 64
    assert method_of(TaqConfig.from_config(record)) is CompressedTensorsLinearMethod


def test_embedding_is_left_alone():
    config = config_of(8, True, target="Linear")
    embedding = VocabParallelEmbedding(320, COLUMNS, quant_config=config, prefix="model.embed_tokens")
    assert type(embedding.quant_method) is UnquantizedEmbeddingMethod


def test_planned_head_of_an_unknown_kind_is_an_error():
    class Peculiar(ParallelLMHead):
        pass

    with pytest.raises(ValueError, match="names lm_head, a Peculiar that this plugin does not know how to split"):
        Peculiar(320, COLUMNS, quant_config=planned(8, (320, COLUMNS)), prefix=HEAD)


class _Stage:
    def __init__(self, is_last_rank):
        self.world_size, self.is_last_rank = 2, is_last_rank


@pytest.mark.parametrize("is_last_rank", [True, False])
def test_head_is_claimed_on_the_last_stage_of_a_pipeline_and_not_missed_on_others(monkeypatch, is_last_rank):
    monkeypatch.setattr(plugin_config, "get_pp_group", lambda: _Stage(is_last_rank))
    config = planned(8, (320, COLUMNS))
    if is_last_rank:
        with pytest.raises(ValueError, match="no layer of this model has claimed: lm_head"):
            config.check_all_claimed()
        build(config, 320)
    config.check_all_claimed()
