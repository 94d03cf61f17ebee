"""CUDA sources, compiled when first used. They include no headers: NVRTC then needs no toolkit."""
