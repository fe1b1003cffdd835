"""Pre-training data: token files of Megatron's, and the samples that megatron-core cuts them into."""
