"""Options of published training scripts, as a shell would split them: names and values, with stand-ins for paths.

Of Megatron-LM (core_r0.16 and later) and ms-swift 3; TOKENIZER, DATA, RUN and LOGS are paths.
"""

_LLAMA3_8B = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192 --max-position-embeddings 8192
--position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0
--swiglu --normalization RMSNorm --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p
--untie-embeddings-and-output-weights --disable-bias-linear --micro-batch-size 1 --global-batch-size 128
--train-samples 1953125000 --lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001
--decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1
--adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss
--manual-gc --empty-unused-memory-level 1 --exit-duration-in-mins 235 --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather
"""
_LLAMA3_8B_PARALLEL = "--tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel"
_LLAMA3_8B_LOG = """
--log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput --profile
--profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist --distributed-timeout-minutes 60 --save RUN
--load RUN --tensorboard-dir LOGS
"""

LLAMA3_8B_FP8_MOCK = f"""
{_LLAMA3_8B}
--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather
{_LLAMA3_8B_PARALLEL}
--mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --data-cache-path CACHE --tiktoken-pattern v2
--split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1
{_LLAMA3_8B_LOG}
"""
"""examples/llama/train_llama3_8b_h100_fp8.sh of Megatron-LM, as it is."""

LLAMA3_8B_BF16 = f"""
{_LLAMA3_8B}
{_LLAMA3_8B_PARALLEL}
--data-path DATA --tokenizer-type HuggingFaceTokenizer --tokenizer-model TOKENIZER --data-cache-path CACHE
--split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 --vocab-size 128256
{_LLAMA3_8B_LOG}
"""
"""The same with its DTYPE other than fp8, and with data."""

LLAMA32_1B_FINETUNE = """
--save-interval 100000 --micro-batch-size 1 --bf16 --no-masked-softmax-fusion --disable-bias-linear
--use-rotary-position-embeddings --no-rope-fusion --no-position-embedding --normalization RMSNorm --swiglu
--num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32 --group-query-attention
--num-query-groups 8 --seq-length 4096 --max-position-embeddings 8192 --tokenizer-type HuggingFaceTokenizer
--make-vocab-size-divisible-by 1 --use-mcore-models --rotary-percent 1.0 --rotary-base 500000 --use-rope-scaling
--tensor-model-parallel-size 1 --expert-tensor-parallel-size 1 --expert-model-parallel-size 1
--pipeline-model-parallel-size 1 --context-parallel-size 1 --cp-comm-type p2p --tokenizer-model TOKENIZER --load RUN
--save RUN2 --train-samples 128000 --lr-decay-samples 128000 --lr-warmup-samples 0 --split 100,0,0
--finetune-hf-dataset Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered --lr 5.0e-5 --min-lr 1.0e-7
--lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.010
--use-distributed-optimizer --no-gradient-accumulation-fusion --reset-position-ids --reset-attention-mask
--eod-mask-loss --micro-batch-size 1 --attention-dropout 0.0 --hidden-dropout 0.0 --no-check-for-nan-in-loss-and-grad
--attention-backend auto --eval-iters 1 --eval-interval 1000 --save-interval 1000 --log-interval 100
--distributed-timeout-minutes 30 --auto-detect-ckpt-format --export-te-mcore-model --finetune
"""
"""examples/post_training/modelopt/finetune.sh of Megatron-LM for meta-llama/Llama-3.2-1B-Instruct."""

MS_SWIFT_SFT = """
--model Qwen/Qwen2.5-7B-Instruct --save_safetensors true --dataset AI-ModelScope/alpaca-gpt4-data-zh#500
AI-ModelScope/alpaca-gpt4-data-en#500 swift/self-cognition#500 --tensor_model_parallel_size 2 --sequence_parallel true
--micro_batch_size 16 --global_batch_size 16 --recompute_granularity full --recompute_method uniform
--recompute_num_layers 1 --finetune true --cross_entropy_loss_fusion true --lr 1e-5 --lr_warmup_fraction 0.05
--min_lr 1e-6 --num_train_epochs 1 --output_dir RUN --save_steps 100 --max_length 2048
--system 'You are a helpful assistant.' --dataloader_num_workers 4 --no_save_optim true --no_save_rng true
--dataset_num_proc 4 --model_author swift --model_name swift-robot
"""
"""examples/megatron/sft.sh of ms-swift."""

MS_SWIFT_LONG_TEXT = """
--model Qwen/Qwen2.5-7B --save_safetensors true --dataset ZhipuAI/LongWriter-6k --load_from_cache_file true
--split_dataset_ratio 0.01 --tensor_model_parallel_size 4 --micro_batch_size 1 --global_batch_size 8 --packing true
--recompute_granularity full --recompute_method uniform --recompute_num_layers 1 --train_iters 1000 --eval_iters 50
--finetune true --cross_entropy_loss_fusion true --lr 1e-5 --lr_warmup_fraction 0.05 --min_lr 1e-6 --output_dir RUN
--eval_steps 200 --save_steps 200 --max_length 32768 --dataloader_num_workers 8 --dataset_num_proc 8
--no_save_optim true --no_save_rng true --sequence_parallel true --attention_backend flash
"""
"""examples/megatron/long_text.sh of ms-swift."""
