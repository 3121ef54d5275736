"""The diffusers engine: demo, generate and tests run on it, without ComfyUI."""
