"""2:4 models for onnxruntime-genai on NVIDIA GPUs."""
