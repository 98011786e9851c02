"""What `trtllm-build --help` lists in three ranges of versions.

Reconstructed from the flags that each range is documented to have, in argparse's form; not
recorded from the library, which cannot be installed without NVIDIA's package index.
"""

from __future__ import annotations

_COMMON = """\
usage: trtllm-build [-h] [--checkpoint_dir CHECKPOINT_DIR]

options:
  -h, --help            show this help message and exit
  --checkpoint_dir CHECKPOINT_DIR
  --model_config MODEL_CONFIG
  --build_config BUILD_CONFIG
  --output_dir OUTPUT_DIR
  --workers WORKERS     The number of workers for building in parallel
  --max_batch_size MAX_BATCH_SIZE
  --max_input_len MAX_INPUT_LEN
  --max_beam_width MAX_BEAM_WIDTH
  --max_num_tokens MAX_NUM_TOKENS
  --max_prompt_embedding_table_size MAX_PROMPT_EMBEDDING_TABLE_SIZE
  --log_level LOG_LEVEL
  --gather_all_token_logits
  --gather_context_logits
  --enable_debug_output
  --gpt_attention_plugin {auto,float16,float32,bfloat16,disable}
  --gemm_plugin {auto,float16,float32,bfloat16,disable}
  --nccl_plugin {auto,float16,float32,bfloat16,disable}
  --context_fmha {enable,disable}
  --remove_input_padding {enable,disable}
"""

# 0.8 … 0.10
OLD = (
    _COMMON
    + """\
  --max_output_len MAX_OUTPUT_LEN
  --input_timing_cache INPUT_TIMING_CACHE
  --output_timing_cache OUTPUT_TIMING_CACHE
  --profiling_verbosity {layer_names_only,detailed,none}
  --builder_opt BUILDER_OPT
  --strongly_typed
  --use_fused_mlp       Enable horizontal fusion in GatedMLP
  --visualize_network
  --rmsnorm_plugin {float16,float32,bfloat16,disable}
  --context_fmha_fp32_acc {enable,disable}
  --paged_kv_cache {enable,disable}
  --tokens_per_block TOKENS_PER_BLOCK
  --multi_block_mode {enable,disable}
  --use_custom_all_reduce {enable,disable}
"""
)

# 0.11 … 0.13
MIDDLE = (
    _COMMON
    + """\
  --max_seq_len MAX_SEQ_LEN, --max_decoder_seq_len MAX_SEQ_LEN
  --opt_num_tokens OPT_NUM_TOKENS
  --input_timing_cache INPUT_TIMING_CACHE
  --output_timing_cache OUTPUT_TIMING_CACHE
  --builder_opt BUILDER_OPT
  --strongly_typed
  --weight_streaming
  --use_fused_mlp
  --visualize_network
  --context_fmha_fp32_acc {enable,disable}
  --paged_kv_cache {enable,disable}
  --tokens_per_block TOKENS_PER_BLOCK
  --multi_block_mode {enable,disable}
  --use_custom_all_reduce {enable,disable}
"""
)

# 0.14 … 1.2
NEW = (
    _COMMON
    + """\
  --max_seq_len MAX_SEQ_LEN, --max_decoder_seq_len MAX_SEQ_LEN
                        Maximum total length of one request (default: None)
  --opt_num_tokens OPT_NUM_TOKENS
  --kv_cache_type KV_CACHE_TYPE
                        Set KV cache type (continuous, paged, or disabled).
  --paged_kv_cache PAGED_KV_CACHE
                        Deprecated. Equivalent to --kv_cache_type paged.
  --input_timing_cache INPUT_TIMING_CACHE
  --output_timing_cache OUTPUT_TIMING_CACHE
  --strip_plan          Enable stripping weights
  --weight_streaming
  --fast_build
  --visualize_network VISUALIZE_NETWORK
  --dry_run
  --monitor_memory
  --tokens_per_block TOKENS_PER_BLOCK
  --use_paged_context_fmha {enable,disable}
  --use_fused_mlp {enable,disable}
  --reduce_fusion {enable,disable}
"""
)

DIALECTS = {"0.8 to 0.10": OLD, "0.11 to 0.13": MIDDLE, "0.14 to 1.2": NEW}
