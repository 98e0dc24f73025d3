"""What makes a training step right and fast: LoRALinear, the frozen linears, the blocks that they make, kernels."""
