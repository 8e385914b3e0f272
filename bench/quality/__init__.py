"""Quality: QLoRA beside 16-bit LoRA on real weights, by validation loss."""
