#!/usr/bin/env python3
"""Makes the fixtures of the source tests with software that is not UPG's.

families/NAME/   a tiny random model as transformers saves it, and the same weights as model.gguf,
                 written with llama.cpp's `gguf` package and named by its tensor map
ggml_blocks.safetensors   random blocks of every quantized type with their values by `gguf`
smollm2_q4_1.json         checksums and first values of a real file's tensors, likewise
                          (only if the path of SmolLM2-135M-Instruct.Q4_1.gguf is given)

Needs: pip install torch transformers gguf safetensors. Usage: make_fixtures.py [SMOLLM2.gguf]
"""
import json, math, sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

HERE = Path(__file__).parent
SMALL = dict(
    vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, rms_norm_eps=1e-5,
)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=32)
SHORT, LONG = [1.0, 1.05, 1.1], [1.5, 1.9, 2.3]
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75,
                short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=32)
FAMILIES = {
    "llama3": ("llama", "bfloat16", dict(head_dim=12, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama-bias": ("llama", "float32", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("mistral", "float16", dict(sliding_window=16, head_dim=6)),
    "qwen2": ("qwen2", "bfloat16", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", "bfloat16", dict(head_dim=8)),
    "phi3": ("phi3", "float16", dict(sliding_window=None, original_max_position_embeddings=64)),
    "phi4-mini": ("phi3", "bfloat16", dict(hidden_size=32, sliding_window=48, rope_parameters=LONGROPE,
                  partial_rotary_factor=0.75, original_max_position_embeddings=32, tie_word_embeddings=True)),
}
TYPES = {"bfloat16": Q.BF16, "float16": Q.F16, "float32": Q.F32}


def permute(w, heads):
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def llama3_factors(dim, p):
    """LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py."""
    out = []
    for freq in 1.0 / (p["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelen = 2 * math.pi / freq
        old = p["original_max_position_embeddings"]
        if wavelen < old / p["high_freq_factor"]:
            out.append(1)
        elif wavelen > old / p["low_freq_factor"]:
            out.append(p["factor"])
        else:
            smooth = (old / wavelen - p["low_freq_factor"]) / (p["high_freq_factor"] - p["low_freq_factor"])
            out.append(1 / ((1 - smooth) / p["factor"] + smooth))
    return np.array(out, dtype=np.float32)


def write_gguf(path, model, config, dtype):
    arch = "llama" if config.model_type == "mistral" else config.model_type
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    rotary = int(rope.get("partial_rotary_factor", 1.0) * head_dim)
    w = gguf.GGUFWriter(path, arch)
    w.add_name(path.parent.name)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_dimension_count(rotary)
    if head_dim * heads != config.hidden_size:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    if config.model_type in ("mistral", "phi3"):
        w.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "phi3":
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        w.add_rope_scaling_orig_ctx_len(original)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    tokens = [f"t{i}" for i in range(config.vocab_size)]
    tokens[20:23] = ["t", "1", "2"]  # the parts of the merges below
    w.add_token_list(tokens)
    w.add_token_types([1] * config.vocab_size)
    w.add_token_merges(["t 1", "t 2"])
    w.add_bos_token_id(config.bos_token_id)
    w.add_eos_token_id(config.eos_token_id)
    w.add_pad_token_id(config.pad_token_id)
    w.add_add_bos_token(False)
    w.add_chat_template("{{ messages[0].content }}")

    def add(name, values, kind):
        if kind == Q.F32 or values.ndim == 1:
            return w.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
        if kind == Q.F16:
            return w.add_tensor(name, np.ascontiguousarray(values, dtype=np.float16))
        return w.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    if rope["rope_type"] == "llama3":
        add("rope_freqs.weight", llama3_factors(head_dim, rope), Q.F32)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        add("rope_factors_long.weight", np.array(LONG), Q.F32)
        add("rope_factors_short.weight", np.array(SHORT), Q.F32)
    undo = LlamaTensorProcessor({"num_attention_heads": heads, "num_key_value_heads": kv_heads})
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.to(torch.float32).numpy()
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = permute(values, heads if "q_proj" in name else kv_heads)
            assert (undo.process(stored, to).weights == values).all()
            values = stored
        add(to, values, TYPES[dtype])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def families():
    for name, (kind, dtype, extra) in FAMILIES.items():
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, **{**SMALL, **extra})
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        for parameter in model.parameters():  # norms and biases are constant otherwise
            torch.nn.init.normal_(parameter)
        out = HERE / "families" / name
        model.save_pretrained(out)
        write_gguf(out / "model.gguf", model, model.config, dtype)


def blocks():
    rng = np.random.default_rng(7)
    out = {}
    # Where the f16 scales of a block are; random bits there would be infinities too.
    scales = {Q.Q4_0: [0], Q.Q4_1: [0, 2], Q.Q5_0: [0], Q.Q5_1: [0, 2], Q.Q8_0: [0], Q.Q2_K: [80, 82],
              Q.Q3_K: [108], Q.Q4_K: [0, 2], Q.Q5_K: [0, 2], Q.Q6_K: [208]}
    for kind, places in scales.items():
        size = gguf.GGML_QUANT_SIZES[kind][1]
        data = rng.integers(0, 256, (3, size), dtype=np.uint8)
        for at in places:
            data[:, at:at + 2] = rng.normal(0, 0.1, (3, 1)).astype(np.float16).view(np.uint8)
        out[f"{kind.name}.blocks"] = data
        out[f"{kind.name}.values"] = gguf.quants.dequantize(data, kind).astype(np.float32)
    save_file(out, HERE / "ggml_blocks.safetensors")


def smollm2(path):
    reader = gguf.GGUFReader(path)
    undo = LlamaTensorProcessor({"num_attention_heads": 9, "num_key_value_heads": 3})
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    config = AutoConfig.for_model("llama", num_hidden_layers=30)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    hf_names = {names.get_name(n, try_suffixes=(".weight",)): n for n in model.state_dict()}
    tensors = {}
    for t in reader.tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        values = np.ascontiguousarray(undo.process(values, t.name).weights)
        bits = values.reshape(-1).view(np.uint32).astype(np.uint64)
        place = np.arange(1, bits.size + 1, dtype=np.uint64)
        entry = {"type": t.tensor_type.name, "shape": list(values.shape), "checksum": int((bits * place).sum())}
        if ".0." in t.name or "blk" not in t.name:
            entry["first"] = [float(x) for x in values.reshape(-1)[:16]]
        tensors[hf_names[t.name]] = entry
    text = json.dumps({"tensors": tensors}, indent=0, sort_keys=True)
    (HERE / "smollm2_q4_1.json").write_text(text + "\n")


families()
blocks()
if len(sys.argv) > 1:
    smollm2(sys.argv[1])
