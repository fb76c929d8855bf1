"""Writes expected.safetensors of every folder here with Hugging Face transformers (float32, CPU).

    python make_expected.py [FOLDER]

Variants have the weights of another folder and a config of their own (config.json is written too);
llama-bias has small random weights of its own. Models are loaded by from_pretrained: a model that
was converted to bfloat16 and back has rounded rotary frequencies, which shows in the logits.
"""
import json, os, sys, torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
ROOT = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
VARIANTS = {
    'qwen2-yarn-window': ('qwen2', dict(
        use_sliding_window=True, sliding_window=16, max_window_layers=1, layer_types=None,
        rope_parameters=dict(rope_type='yarn', rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32))),
    'qwen3-layer-types': ('qwen3', dict(
        use_sliding_window=True, sliding_window=9, layer_types=['sliding_attention', 'full_attention'],
        rope_parameters=dict(rope_type='yarn', rope_theta=500000.0, factor=8.0, beta_fast=8.0, beta_slow=0.5,
                             mscale=0.7, mscale_all_dim=0.3, truncate=False, original_max_position_embeddings=64))),
    'mistral-linear': ('mistral', dict(
        sliding_window=None, rope_parameters=dict(rope_type='linear', rope_theta=10000.0, factor=2.5))),
    'phi3-window': ('phi3', dict(sliding_window=10)),
}


def make_llama_bias(folder):
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=12, max_position_embeddings=256, attention_bias=True, mlp_bias=True,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2, tie_word_embeddings=True,
        rope_parameters=dict(rope_type='default', rope_theta=10000.0)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'norm' in name or name.endswith('bias'):
                p.add_(torch.randn_like(p) * 0.2)
    model.bfloat16().save_pretrained(folder)


def write_variant(folder, base, changes):
    os.makedirs(folder, exist_ok=True)
    with open(f'{ROOT}/{base}/config.json') as f:
        config = json.load(f)
    config.update(changes)
    with open(f'{folder}/config.json', 'w') as f:
        json.dump({k: v for k, v in config.items() if v is not None or k == 'sliding_window'}, f, indent=2)
        f.write('\n')


def expect(folder, weights):
    config = transformers.AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(weights, config=config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(100)
    tensors = {}
    for i, length in enumerate((1, 7, 24, 80)):
        ids = torch.randint(3, config.vocab_size, (1, length), generator=generator)
        old = f'{folder}/expected.safetensors'
        if os.path.exists(old):
            ids = load_file(old)[f'case{i}.input_ids'][None]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
            greedy = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        tensors[f'case{i}.input_ids'] = ids[0].contiguous()
        tensors[f'case{i}.logits'] = (logits if length <= 24 else logits[-8:]).contiguous()
        tensors[f'case{i}.greedy'] = greedy[0, length:].contiguous()
    save_file(tensors, f'{folder}/expected.safetensors', metadata={
        'made_with': f'transformers {transformers.__version__}, torch {torch.__version__}, float32 CPU',
        'note': 'logits: every position, or the last 8 when the prompt is longer than 24; greedy: 8 tokens, eos ignored'})


if 'llama3-rope' in os.listdir(ROOT) and not os.path.exists(f'{ROOT}/llama-bias/model.safetensors'):
    make_llama_bias(f'{ROOT}/llama-bias')
for name, (base, changes) in VARIANTS.items():
    write_variant(f'{ROOT}/{name}', base, changes)
for name in sorted(os.listdir(ROOT)):
    if os.path.isdir(f'{ROOT}/{name}'):
        expect(f'{ROOT}/{name}', f'{ROOT}/{VARIANTS[name][0] if name in VARIANTS else name}')
