"""What every model does besides its forward pass; LoRA, quantization, recomputation, bigram."""
