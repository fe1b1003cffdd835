"""Half Fine-Tuning of LLaMA models on megatron-core."""

__version__ = "0.1.0"
