"""ComfyUI nodes: the only folder that imports the host."""
