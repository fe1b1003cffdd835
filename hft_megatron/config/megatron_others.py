"""Megatron-LM's flags that no dense LLaMA of this project needs, by family: each family is refused for one reason."""

from hft_megatron.config.megatron_rows import family

OTHERS = (
    family(
        "Inference and text generation",
        "nothing is generated while a model trains; leave it out",
        """
        flash-decode batch-invariant-mode batch-invariant-backend= symmetric-ar-type= nccl-all-reduce-for-prefill
        inference-fuse-tp-communication inference-disable-triton-nvls-kernels inference-grouped-gemm-backend=
        inference-moe-disable-fused-quant-kernels inference-moe-token-dispatcher-type= mlp-chunks-for-prefill=
        inference-rng-tracker inference-batch-times-seqlen-threshold= inference-max-requests=
        inference-max-seq-length= inference-dynamic-batching inference-dynamic-batching-buffer-size-gb=
        inference-dynamic-batching-paused-buffer-size-gb= inference-dynamic-batching-mamba-memory-ratio=
        inference-dynamic-batching-block-size= inference-dynamic-batching-max-requests=
        inference-dynamic-batching-max-tokens= inference-dynamic-batching-num-cuda-graphs=
        inference-dynamic-batching-track-paused-request-events inference-dynamic-batching-track-generated-token-events
        inference-cuda-graph-all-prefills inference-cuda-graph-max-tokens=
        inference-dynamic-batching-unified-memory-level= inference-dynamic-batching-prefix-caching
        no-inference-dynamic-batching-prefix-caching inference-dynamic-batching-prefix-caching-eviction-policy=
        inference-dynamic-batching-prefix-caching-coordinator-policy=
        inference-dynamic-batching-prefix-caching-routing-alpha= inference-dynamic-batching-prefix-caching-mamba-gb=
        inference-dynamic-batching-cuda-graph-mixed-prefill-count=
        inference-dynamic-batching-cuda-graph-sizing-distribution= inference-dynamic-batching-sampling-backend=
        inference-dynamic-batching-async-sched-mode= inference-dynamic-batching-logprobs-mode=
        inference-logging-step-interval= inference-text-gen-server-logging no-inference-text-gen-server-logging
        inference-wandb-logging no-inference-wandb-logging inference-coordinator-port=
        mamba-inference-conv-states-dtype= mamba-inference-ssm-states-dtype= inference-use-synchronous-zmq-collectives
        no-inference-use-synchronous-zmq-collectives inference-disable-ep-consensus no-inference-disable-ep-consensus
        inference-shards= inference-max-batch-size= inference-dynamic-batching-cuda-graph-max-tokens=
        inference-dynamic-batching-buffer-guaranteed-fraction= inference-dynamic-batching-buffer-overflow-factor=
        inference-dynamic-batching-max-requests-override= inference-dynamic-batching-max-tokens-override=
        max-tokens-to-oom= use-legacy-static-engine decode-only-cuda-graphs enable-chunked-prefill
        num-speculative-tokens= use-same-sampling-seed-across-dp-ranks disable-chunked-prefill
        """,
    ),
    family(
        "CUDA graphs",
        "CUDA graphs are not built; leave it out",
        """
        inference-cuda-graph-scope= cuda-graph-scope=* cuda-graph-modules=* enable-cuda-graph cuda-graph-warmup-steps=
        external-cuda-graph cuda-graph-impl=
        """,
    ),
    family(
        "Reinforcement learning",
        "reinforcement learning is not built; `hft-megatron dpo` learns from preference pairs",
        """
        perform-rl-step rl-prompts-per-eval= grpo-prompts-per-step= grpo-group-size= rl-generation-lag=
        rl-max-inflight-requests= rl-submission-granularity= rl-consumption-granularity= rl-durable-rollout-bank
        rl-rollout-bank-dir= rl-rollout-bank-max-bytes= grpo-iterations= grpo-clamp-eps-lower= grpo-clamp-eps-upper=
        grpo-kl-beta= grpo-entropy-term-weight= grpo-filter-groups-with-same-reward langrl-env-config=
        rl-default-temperature= rl-default-top-p= rl-default-top-k= rl-offload-optimizer-during-inference
        rl-kv-cache-management-mode= rl-persist-cuda-graphs no-rl-persist-cuda-graphs rl-partial-rollouts
        no-rl-partial-rollouts rl-inference-logprobs-is-correction no-rl-inference-logprobs-is-correction
        rl-importance-sampling-truncation-coef= rl-use-sequence-packing no-rl-use-sequence-packing
        rl-sequence-packing-max-sequences-per-bin= rl-sequence-packing-algo= rl-training-cuda-graphs
        no-rl-training-cuda-graphs rl-inference-tensor-model-parallel-size= rl-inference-pipeline-model-parallel-size=
        rl-inference-expert-model-parallel-size= rl-inference-expert-tensor-model-parallel-size=
        rl-inference-model-unified-memory-level= rl-offload-inference-model-weights-when-idle
        no-rl-offload-inference-model-weights-when-idle refit-method= rl-verify-model-weights-swap
        no-rl-verify-model-weights-swap rl-skip-bos-token no-rl-skip-bos-token rl-profile rl-profile-dir=
        rl-inference-parsers=* langrl-inference-server-type= langrl-inference-server-conversation-template=
        langrl-external-server no-langrl-external-server rl-offload-kv-cache-during-training
        no-rl-offload-kv-cache-during-training rl-remove-kv-cache-during-training
        no-rl-remove-kv-cache-during-training rl-reset-cuda-graphs no-rl-reset-cuda-graphs
        rl-parallel-generation-tasks=
        """,
    ),
    family(
        "Mixtures of experts",
        "mixtures of experts are not built; only dense LLaMA models train",
        """
        expert-tensor-parallel-num-weight-shards= overlap-moe-expert-parallel-comm
        overlap-dispatch-backward-with-experts-wgrad ep-overlap-early-attn-memory-release
        high-priority-a2a-comm-stream moe-shared-expert-intermediate-size= moe-shared-expert-gate
        moe-shared-expert-overlap use-grouped-gemm-for-shared-expert moe-shared-expert-glu-interleave-size=
        moe-ffn-hidden-size= moe-router-topk= moe-enable-routing-replay moe-router-padding-for-quantization
        moe-router-padding-for-fp8 moe-router-num-groups= moe-router-group-topk= moe-router-pre-softmax
        moe-router-topk-scaling-factor= moe-router-score-function= moe-router-dtype= moe-router-enable-expert-bias
        moe-router-bias-update-rate= moe-router-quantile-balancing-ema= moe-router-force-load-balancing
        moe-router-force-biased= use-grouped-gemm-for-dense-mlp moe-grouped-gemm moe-use-grouped-tensor
        moe-single-grouped-weight moe-single-grouped-bias moe-z-loss-coeff= moe-input-jitter-eps=
        moe-token-dispatcher-type= moe-enable-deepep moe-flex-dispatcher-backend= moe-permute-fusion-into-hybridep
        moe-hybridep-pad-uneven-dispatch-inputs moe-per-layer-logging moe-expert-capacity-factor=
        moe-pad-expert-input-to-capacity moe-pad-experts-for-cuda-graph-inference moe-token-drop-policy=
        moe-layer-recompute moe-permute-fusion moe-router-fusion moe-apply-probs-on-input moe-latent-size=
        moe-flex-dispatcher-num-sms= moe-deepep-num-sms= moe-hybridep-num-sms= moe-hybridep-num-blocks-permute=
        moe-hybridep-num-blocks-unpermute= moe-hybridep-num-sms-preprocessing= moe-ncclep-zero-copy
        moe-dispatch-fwd-dtype= moe-combine-bwd-dtype= moe-mlp-glu-interleave-size= moe-expert-rank-capacity-factor=
        enable-mhc-connections mhc-num-residual-streams= mhc-sinkhorn-iterations= mhc-init-gating-factor=
        mhc-recompute-layer-num= moe-paged-stash moe-paged-stash-page-size= moe-paged-stash-buffer-size-factor-cuda=
        moe-paged-stash-buffer-size-factor-cpu= moe-ncclep-static-shape moe-extended-tp moe-use-legacy-grouped-gemm
        save-tokens-per-expert-interval= num-experts= moe-layer-freq= moe-use-upcycling
        moe-router-load-balancing-type=* moe-aux-loss-coeff=* moe-upcycling-granularity= moe-routing-trace-path=
        moe-routing-trace-max-training-iters= moe-routing-trace-capture-logits moe-routing-trace-capture-hidden-states
        moe-routing-trace-dump-weights
        """,
    ),
    family(
        "FP8 and FP4",
        "training in 8 or 4 bits is not built; weights are bf16 or fp32",
        """
        fp8-recipe= fp8-quantizer-factory= fp8-margin= fp8-interval= fp8-amax-history-len= fp8-amax-compute-algo=
        no-fp8-wgrad disable-fp8-wgrad fp8-output-proj first-last-layers-bf16 num-layers-at-start-in-bf16=
        num-layers-at-end-in-bf16= use-kitchen-attention kitchen-attention-backend= fp4-format= fp4-recipe=
        fp4-quantizer-factory= reuse-grad-buf-for-mxfp8-param-ag keep-fp8-transpose-cache fp4-param-gather
        fp8-param-gather te-precision-config-file= keep-fp8-transpose-cache-when-using-custom-fsdp
        kitchen-config-file= kitchen-recipe-number=
        """,
    ),
    family(
        "Fully sharded data parallelism",
        "FSDP is not built; data parallelism shards the optimizer alone",
        """
        gtp-remat-opt-in-modules=* no-strict-fsdp-dtensor-load disable-strict-fsdp-dtensor-load use-torch-fsdp2
        gtp-remat-reduce-scatter-with-fp32-accumulation megatron-fsdp-version= gtp-remat-nccl-ub
        gtp-expert-remat-nccl-ub fsdp-manual-registration create-all-gather-group data-parallel-sharding-strategy=
        outer-dp-sharding-strategy= fsdp-double-buffer suggested-communication-unit-size= enable-full-sharding-in-hsdp
        torch-fsdp2-no-reshard-after-forward megatron-fsdp-main-params-dtype= megatron-fsdp-main-grads-dtype=
        megatron-fsdp-grad-comm-dtype= megatron-fsdp-enable-fine-grained-param-gather
        megatron-fsdp-max-pool-double-buffer fsdp-db-use-persist-buf-on-alloc-fail use-custom-fsdp
        """,
    ),
    family(
        "Context parallelism",
        "context parallelism is not built; split activations by --sequence-parallel",
        """
        hierarchical-context-parallel-sizes=* max-seqlen-per-dp-cp-rank= hybrid-context-parallel
        """,
    ),
    family(
        "State-space and hybrid models",
        "only LLaMA's layers of attention and feed-forward are built",
        """
        is-hybrid-model mamba-state-dim= mamba-head-dim= mamba-num-groups= mamba-num-heads= gdp-num-householder=
        disable-mamba-mem-eff-path gdp-cutedsl-kernel gdp-num-chunk-states-to-recompute=
        mamba-training-ssm-states-dtype= hybrid-layer-pattern= hybrid-override-pattern= hybrid-attention-ratio=
        hybrid-mlp-ratio=
        """,
    ),
    family(
        "Other attentions and architectures",
        "only LLaMA's attention is built; leave it out",
        """
        multi-latent-attention experimental-attention-variant= dsa-indexer-n-heads= dsa-indexer-head-dim=
        dsa-indexer-topk= dsa-indexer-topk-freq= dsa-indexer-skip-topk-offset= dsa-indexer-loss-coeff=
        dsa-indexer-use-sparse-loss dsa-kernel-backend= dsa-indexer-rope-interleaved no-dsa-indexer-rotate-activation
        disable-dsa-indexer-rotate-activation no-dsa-indexer-scoring-relu disable-dsa-indexer-scoring-relu
        dsa-indexer-k-norm-epsilon= dsa-indexer-k-norm-fp32 linear-conv-kernel-dim= linear-key-head-dim=
        linear-value-head-dim= linear-num-key-heads= linear-num-value-heads= mrope-section=* linear-attention-freq=
        q-lora-rank= kv-lora-rank= qk-head-dim= qk-pos-emb-head-dim= v-head-dim= rotary-scaling-factor= mscale=
        mscale-all-dim= cache-mla-latents mla-down-proj-fusion heterogeneous-layers-config-path=
        heterogeneous-layers-config-encoded-json=
        """,
    ),
    family(
        "Multi-token prediction",
        "only the next token is predicted; leave it out",
        """
        mtp-standalone mtp-num-layers= mtp-loss-scaling-factor= mtp-use-repeated-layer mtp-detach-heads mtp-hsm
        mtp-hybrid-override-pattern=
        """,
    ),
    family(
        "Maximal update parametrization",
        "muP is not built; leave it out",
        """
        use-mup mup-width-mult= mup-base-hidden-size= mup-embedding-mult= mup-output-mult= mup-base-head-dim=
        mup-attn-scale-power=
        """,
    ),
    family(
        "Vision",
        "only text is trained on",
        """
        num-classes= img-h= img-w= num-channels= patch-dim= classes-fraction= data-per-class-fraction=
        no-data-sharding head-lr-mult= vision-pretraining vision-pretraining-type= vision-backbone-type=
        swin-backbone-type= mask-type= mask-factor= iter-per-epoch= dino-local-img-size= dino-local-crops-number=
        dino-head-hidden-size= dino-bottleneck-size= dino-freeze-last-layer= dino-norm-last-layer
        dino-warmup-teacher-temp= dino-teacher-temp= dino-warmup-teacher-temp-epochs=
        """,
    ),
    family(
        "BERT, T5 and retrieval",
        "only decoders of text are trained; leave it out",
        """
        output-bert-embeddings bert-embedder-type= bert-no-binary-head mask-prob= short-seq-prob=
        retriever-seq-length= bert-load= ict-head-size= biencoder-projection-dim= biencoder-shared-query-context-model
        ict-load= titles-data-path= query-in-block-prob= use-one-sent-docs evidence-data-path=
        retriever-report-topk-accuracies=* retriever-score-scaling block-data-path= embedding-path=
        indexer-batch-size= indexer-log-interval= retro-project-dir= retro-add-retriever retro-cyclic-train-iters=
        retro-encoder-layers= retro-encoder-hidden-dropout= retro-encoder-attention-dropout= retro-num-neighbors=
        retro-num-retrieved-chunks= retro-attention-gate= retro-no-verify-neighbor-count
        """,
    ),
    family(
        "Fill in the middle",
        "documents are trained from left to right; leave it out",
        """
        fim-data fim-rate= fim-spm-rate= fim-split-sample= fim-fragment-rate= fim-no-prefix= fim-prefix-token=
        fim-middle-token= fim-suffix-token= fim-pad-token= fim-eod-token=
        """,
    ),
    family(
        "Other optimizers",
        "the optimizer is AdamW; leave it out",
        """
        sgd-momentum= muon-momentum= muon-no-split-qkv muon-nesterov muon-scale-mode= muon-fp32-matmul-prec=
        muon-coefficient-type= muon-num-ns-steps= muon-tp-mode= muon-use-syrk muon-extra-scale-factor=
        muon-scalar-optimizer= lion-beta1= lion-beta2= muon-use-nesterov no-use-layer-wise-param-layout
        """,
    ),
    family(
        "Optimizer state in host memory",
        "optimizer state stays on the device; --hft-frozen-moments host keeps that of frozen weights in host memory",
        """
        optimizer-cpu-offload optimizer-offload-fraction= use-torch-optimizer-for-cpu-offload
        overlap-cpu-optimizer-d2h-h2d no-pin-cpu-grads no-pin-cpu-params
        """,
    ),
    family(
        "Activations in host memory",
        "activations stay on the device; --recompute-granularity keeps fewer of them",
        """
        cpu-offloading-num-layers= cpu-offloading-retain-pinned-cpu-buffers fine-grained-activation-offloading
        offload-modules=* min-offloaded-tensor-size= delay-offload-until-cuda-graph
        delta-offload-bytes-across-pp-ranks= activation-offload-fraction=
        fine-grained-offloading-max-inflight-offloads=
        """,
    ),
    family(
        "Recomputation of parts",
        "whole layers or their attention are recomputed; give --recompute-granularity full or selective",
        """
        distribute-saved-activations recompute-modules=* mlp-chunks-for-training= checkpoint-activations
        """,
    ),
    family(
        "Speed of communication and products",
        "it is not built, and what is learned doesn't depend on it; leave it out",
        """
        tensor-parallel-num-weight-shards= pipeline-model-parallel-comm-backend= tp-comm-overlap no-tp-comm-bulk-wgrad
        disable-tp-comm-bulk-wgrad no-tp-comm-bulk-dgrad disable-tp-comm-bulk-dgrad no-tp-comm-overlap-ag
        disable-tp-comm-overlap-ag no-tp-comm-overlap-rs disable-tp-comm-overlap-rs tp-comm-overlap-rs-dgrad
        no-tp-comm-split-ag disable-tp-comm-split-ag no-tp-comm-split-rs disable-tp-comm-split-rs
        tp-comm-bootstrap-backend= delay-wgrad-compute use-ring-exchange-p2p defer-embedding-wgrad-compute
        wgrad-deferral-limit= overlap-p2p-communication-warmup-flush microbatch-group-size-per-virtual-pipeline-stage=
        no-clone-scatter-output-in-embedding disable-clone-scatter-output-in-embedding
        no-async-tensor-model-parallel-allreduce disable-async-tensor-model-parallel-allreduce tp-comm-overlap-cfg=
        no-align-grad-reduce disable-align-grad-reduce nccl-communicator-config-path= disable-gloo-process-groups
        use-sharp sharp-enabled-group= high-priority-stream-groups=* ddp-pad-buckets-for-high-nccl-busbw
        ddp-reduce-scatter-with-fp32-accumulation ddp-param-name-patterns-for-fp32-local-accumulation=*
        ddp-average-in-collective overlap-param-gather-with-optimizer-step no-align-param-gather use-nccl-ub
        disable-symmetric-registration no-gradient-reduce-div-fusion delay-param-gather
        """,
    ),
    family(
        "How checkpoints are written",
        "how a checkpoint is written and read is not chosen here; leave it out",
        """
        async-strategy= use-persistent-ckpt-worker async-ckpt-cpu-priority= async-ckpt-io-priority=
        async-ckpt-use-cpu-shm ckpt-fully-parallel-load-exchange-algo= ckpt-fully-parallel-load-per-rank-objects
        ckpt-fully-parallel-save-process-group= ckpt-fully-parallel-load-process-group= ckpt-assume-constant-structure
        ckpt-pg-tensors-cache-path= ckpt-pg-tensors-cache-create dist-ckpt-workers=
        """,
    ),
    family(
        "Local and replicated checkpoints",
        "checkpoints go to --save alone; leave it out",
        """
        non-persistent-save-interval= non-persistent-ckpt-type= non-persistent-global-ckpt-dir=
        non-persistent-local-ckpt-dir= non-persistent-local-ckpt-algo= replication replication-jump=
        replication-factor=
        """,
    ),
    family(
        "Dumps of gradients and activations",
        "gradients and activations are not written; leave it out",
        """
        config-logger-dir= save-activations-interval= save-wgrads-interval= save-dgrads-interval=
        """,
    ),
    family(
        "Details of profiles",
        "profiles are not built yet; leave it out",
        """
        pytorch-profiler-collect-shapes pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra
        record-memory-history memory-snapshot-path= record-shapes nvtx-ranges
        """,
    ),
    family(
        "Watching over ranks",
        "a rank that is silent or slow is named here without it; leave it out",
        """
        distributed-timeout-seconds-after-init= flight-recorder-dump-path= flight-recorder-trace-buffer-size=
        no-flight-recorder-dump-on-timeout disable-flight-recorder-dump-on-timeout flight-recorder-include-stack-trace
        no-flight-recorder-include-only-active disable-flight-recorder-include-only-active
        no-flight-recorder-extra-dump-on-exec disable-flight-recorder-extra-dump-on-exec fake-process-group
        log-straggler straggler-ctrlr-port= straggler-minmax-count= disable-straggler-on-startup
        run-workload-inspector-server enable-ft-package calc-ft-timeouts ft-num-warmup-iters=
        """,
    ),
    family(
        "Restarts",
        "torchrun restarts failed ranks, and --load resumes; leave it out",
        """
        inprocess-restart inprocess-max-iterations= inprocess-monitor-thread-interval=
        inprocess-monitor-process-interval= inprocess-progress-watchdog-interval= inprocess-heartbeat-interval=
        inprocess-soft-timeout= inprocess-hard-timeout= inprocess-heartbeat-timeout= inprocess-barrier-timeout=
        inprocess-completion-timeout= inprocess-last-call-wait= inprocess-termination-grace-time=
        inprocess-granularity= inprocess-active-world-size= inprocess-empty-cuda-cache adlr-autoresume
        adlr-autoresume-interval=
        """,
    ),
    family(
        "Faults on purpose",
        "faults are not made on purpose; leave it out",
        """
        error-injection-rate= error-injection-type= rerun-mode= fault-injector-ranks= fault-injector-num-ranks=
        fault-injector-fault-types= fault-injector-fault-probabilities= fault-injector-fault-delay=
        fault-injector-delay-start-iteration= fault-injector-mtti-seconds= fault-injector-offset-seconds=
        fault-injector-seed=
        """,
    ),
    family(
        "Other loggers and stores",
        "metrics go to the log, metrics.jsonl, TensorBoard and wandb; leave it out",
        """
        otel-enabled otel-service-name= otel-span-groups= one-logger-project= one-logger-run-name= one-logger-async
        app-tag-run-name= app-tag-run-version= enable-msc
        """,
    ),
    family(
        "Distillation and ModelOpt",
        "distillation and what ModelOpt does are not built; leave it out",
        """
        logits-save-top-k= logits-save-top-p= logits-save-top-p-min-k= logits-save-dir= logits-save-dtype=
        logits-load-dir= logits-load-decode-threads= logits-load-prefetch-factor= logits-load-msc-prefetch-depth=
        logits-load-kd-loss-alpha= logits-load-ignore-errors export-model-type= export-legacy-megatron
        export-te-mcore-model export-default-te-spec export-force-local-attention export-kv-cache-quant=
        export-real-quant-cfg= export-quant-cfg= export-kd-teacher-load= export-kd-teacher-model-config=
        export-kd-teacher-ckpt-format= export-kd-cfg= finetune-data-split= finetune-data-files=* qad-train-target=
        freeze-base-for-mtp export-qk-l2-norm export-moe-apply-probs-on-input export-offline-model modelopt-enabled
        enable-gpt-oss
        """,
    ),
    family(
        "Data sets of the Hugging Face hub",
        "data is read from files; save the data set and give its files as --train-data-path",
        """
        finetune-hf-dataset=
        """,
    ),
    family(
        "Experiments",
        "what it turns on is not built; leave it out",
        """
        enable-experimental
        """,
    ),
    family(
        "Options in a file",
        "options of a YAML file are read by --config",
        """
        yaml-cfg=
        """,
    ),
)
"""Families, by topic; names as ``megatron_rows`` writes them."""
